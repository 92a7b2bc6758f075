"""What nvcc makes of the CUDA kernels: a regression of the machine code shows without a GPU."""

from __future__ import annotations

import json

import pytest
from bench import machine_code

from shear_ops import _C
from shear_ops.ops import cuda

WHOLE = json.loads(machine_code.CUDA_RECORD.read_text(encoding="utf-8"))
RECORD, TOOLKIT = WHOLE["kernels"], WHOLE["toolkit"]


@pytest.fixture(scope="module")
def kernels() -> dict[str, dict[str, int]]:
    if why := machine_code.missing_tool():
        pytest.skip(why)
    if (toolkit := machine_code.toolkit()).split(".")[:2] != TOOLKIT.split(".")[:2]:
        pytest.skip(
            f"the record is of nvcc {TOOLKIT}, here is {toolkit}: python -m bench.machine_code cuda"
        )
    return machine_code.cuda_kernels()


def test_the_record_has_every_solver() -> None:
    assert sum(name.startswith("sinkhorn") for name in RECORD) == 5
    assert "sinkhorn<2,7,25,4>" in RECORD
    assert sum(name.startswith("token_costs") for name in RECORD) == 18


@pytest.mark.parametrize("name", RECORD)
def test_registers_spills_and_instructions(name: str, kernels: dict[str, dict[str, int]]) -> None:
    seen, recorded = kernels[name], RECORD[name]
    assert seen["spilled_bytes"] == seen["stack_bytes"] == 0
    assert seen["static_shared_bytes"] <= _C.STATIC_SHARED_BYTES
    assert seen["registers"] <= 1.1 * recorded["registers"]
    assert 0.9 <= seen["loop_instructions"] / recorded["loop_instructions"] <= 1.1


@pytest.mark.parametrize(
    ("capability", "architectures", "runs"),
    [
        ((9, 0), "80-real 90-real 100", True),
        ((8, 6), "80-real 90-real 100", True),
        ((12, 0), "80-real 90-real 100", True),  # by PTX
        ((10, 3), "80-real 90-real 100", True),
        ((7, 5), "80-real 90-real 100", False),
        ((10, 0), "80-real 90-real", False),
        ((8, 0), "86-real", False),
        ((8, 6), "90-virtual", False),
        ((9, 0), "80-virtual", True),
        ((9, 0), "90a", True),
        ((10, 0), "90a-virtual", False),
        ((9, 0), "native", True),
    ],
)
def test_which_devices_the_module_runs_on(
    capability: tuple[int, int], architectures: str, runs: bool
) -> None:
    assert cuda.runs_on(capability, architectures) is runs
