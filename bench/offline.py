"""What the Triton kernels compile to, without a GPU: registers, shared memory, spills, hot loops.

    python -m bench.offline                # writes bench/results/offline/triton.json

A call of span_weights is made under a driver that names a target and launches nothing, so that what
is compiled is what that call would compile there.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import click
import torch

from shear_ops import SpanConfig

from .record import RESULTS, run_facts

TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "gfx942": ("hip", "gfx942", 64)}
SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "gfx942": 64 * 1024}  # bytes of a program
SPANS = (32, 64, 100, 200)  # one for every tile of the solver, and one that fits none
DIM = 3584


RECORD = RESULTS / "offline" / "triton.json"  # not one of a device: bench.report reads those
HOT = ("token_cost_kernel", "solve_kernel")
# multiply-adds of a loop that is taken for the innermost one of the work: on tensor cores, or not
LEAST = {"HGMMA": 2, "HMMA": 16, "FFMA": 16}


@dataclass(frozen=True)
class Kernel:
    """A kernel as it was compiled."""

    name: str
    variant: str  # its compile-time arguments
    shared: int  # bytes
    warps: int
    binary: bytes  # a cubin, or empty


class _Driver:
    """Names a target; nothing runs on it."""

    def __init__(self, name: str) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget(*TARGETS[name])
        self.device = list(TARGETS).index(name)

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self.target


@contextmanager
def compiling_for(name: str) -> Iterator[list[Kernel]]:
    """Inside, launches of Triton kernels compile for this target, and are listed; none runs."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from shear_ops.triton import sinkhorn, target, token_cost

    kernels: dict[tuple[str, str], Kernel] = {}
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        compiled = run(self, *args, grid=grid, warmup=True, **options)
        variant = ", ".join(f"{k}={v}" for k, v in options.items() if k.isupper() or len(k) == 1)
        kernels[self.__name__, variant] = Kernel(
            self.__name__, variant, compiled.metadata.shared, compiled.metadata.num_warps,
            compiled.asm.get("cubin", b""),
        )  # fmt: skip
        found[:] = kernels.values()
        return compiled

    found: list[Kernel] = []
    backend = TARGETS[name][0]
    on_nvidia = backend == "cuda"
    facts = target.Target(
        132, on_nvidia, "tf32x3" if on_nvidia else "ieee", SHARED[name], int(not on_nvidia), False
    )
    with (
        mock.patch.object(driver, "_active", _Driver(name)),
        mock.patch.object(JITFunction, "run", compile_only),
        mock.patch.object(sinkhorn, "target_of", return_value=facts),
        mock.patch.object(token_cost, "target_of", return_value=facts),
    ):
        yield found


def compile_all(name: str, spans: tuple[int, ...] = SPANS) -> list[Kernel]:
    """Compile every kernel that calls with these spans take, for all dtypes and distances."""
    from shear_ops.triton import ops

    offsets, groups, labels = (torch.tensor(v) for v in ([0, 256, 512], [0, 0], [1, 0]))
    with compiling_for(name) as kernels:
        for dtype in (torch.bfloat16, torch.float32):
            hidden = torch.zeros(512, DIM, dtype=dtype)
            for span in spans:
                config = SpanConfig(span=span, stride=span // 4, check_finite=False)
                ops.span_weights(hidden, offsets, groups, labels, **config.op_arguments())
            for distance in ("mmd", "cosine"):
                config = SpanConfig(distance=distance, check_finite=False)
                ops.span_weights(hidden, offsets, groups, labels, **config.op_arguments())
    return list(kernels)


def _tool(name: str) -> Path:
    """A program that comes with Triton's wheel."""
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name


def resources(kernel: Kernel) -> dict[str, int]:
    """Registers of a thread and bytes of local memory (the stack) of a cubin."""
    out = _dump("-res-usage", kernel)
    found = re.search(r"REG:(\d+) STACK:(\d+)", out)
    assert found is not None, out
    return {"registers": int(found[1]), "stack_bytes": int(found[2])}


def _dump(option: str, kernel: Kernel) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.binary)
        file.flush()
        command = [str(_tool("cuobjdump")), option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)([^;]*);", re.M)


def hot_loop(kernel: Kernel) -> tuple[str, Counter[str]] | None:
    """What the innermost loop of a kernel's work multiplies with, and the loop's instructions.

    A loop is a jump back and everything between it and its target; the innermost one is the
    smallest that has LEAST multiply-adds.
    """
    code = [(int(at, 16), op, rest) for at, op, rest in LINE.findall(_dump("-sass", kernel))]
    loops = []
    for at, op, rest in code:
        jump = re.search(r"0x([0-9a-f]+)", rest)
        if op.startswith("BRA") and jump and int(jump[1], 16) <= at:
            begin = int(jump[1], 16)
            loops.append(Counter(o.split(".")[0] for a, o, _ in code if begin <= a <= at))
    for instruction, least in LEAST.items():
        some = [loop for loop in loops if loop[instruction] >= least]
        if some:
            return instruction, min(some, key=lambda loop: loop.total())
    return None


def facts(kernel: Kernel) -> dict[str, Any]:
    """What goes into the record."""
    out: dict[str, Any] = {
        "kernel": kernel.name, "variant": kernel.variant, "warps": kernel.warps,
        "shared_bytes": kernel.shared,
    }  # fmt: skip
    if not kernel.binary or not _tool("cuobjdump").exists():
        return out
    out |= resources(kernel)
    loop = hot_loop(kernel)
    if kernel.name in HOT and loop is not None:
        instruction, counts = loop
        out["hot_loop"] = {
            "instructions": counts.total(), "multiplies_with": instruction,
            "spills": counts["LDL"] + counts["STL"], **dict(counts.most_common(8)),
        }  # fmt: skip
    return out


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), default=RECORD)
@click.option("--target", multiple=True, type=click.Choice(list(TARGETS)), help="[default: all]")
def main(out: Path, target: tuple[str, ...]) -> None:
    """Compile all Triton kernels for GPUs that need not be here, and record what came out.

    Takes about two minutes; nothing in the record was measured on a GPU.

    Example: python -m bench.offline --target sm_90 --out /tmp/sm_90.json
    """
    from importlib.metadata import version

    record = {
        "run": {k: v for k, v in run_facts("").items() if k in ("commit", "dirty", "date")},
        "triton": version("triton"),
        "targets": {name: [facts(k) for k in compile_all(name)] for name in target or TARGETS},
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n")
    click.echo(f"written: {out}")


if __name__ == "__main__":
    main()
