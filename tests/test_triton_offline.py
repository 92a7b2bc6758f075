"""What the Triton kernels compile to for GPUs that are not here: shared memory, spills."""

from __future__ import annotations

import importlib.util

import pytest

from shear_ops.ops import backends

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton"),
    pytest.mark.skipif(backends.interpreted(), reason="the interpreter compiles nothing"),
]

KERNELS = {
    "sq_norm_kernel", "rollout_norm_kernel", "group_norm_kernel", "count_kernel",
    "center_sum_kernel", "center_kernel", "centered_sq_norm_kernel", "round_kernel",
    "token_cost_kernel", "repair_kernel", "windows_kernel", "means_kernel", "solve_kernel",
    "nearest_kernel", "pairs_kernel", "keep_kernel", "sum_kernel", "unit_kernel", "cosine_kernel",
    "token_weights_kernel",
}  # fmt: skip


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_every_kernel_compiles(target: str) -> None:
    from bench.machine_code import SHARED, compile_all, facts

    try:
        found = [facts(kernel) for kernel in compile_all(target)]
    except RuntimeError as error:
        if target != "gfx942":
            raise
        pytest.skip(f"this Triton has no AMD backend: {error}")
    assert {kernel["kernel"] for kernel in found} == KERNELS
    assert all(kernel["shared_bytes"] <= SHARED[target] for kernel in found)
    loops = {(k["kernel"], k["variant"]): k["hot_loop"] for k in found if "hot_loop" in k}
    if target == "gfx942":
        return
    if not any("registers" in kernel for kernel in found):
        pytest.skip("this Triton comes without cuobjdump: no loops to look at")
    solver = {variant: loop for (name, variant), loop in loops.items() if name == "solve_kernel"}
    assert len(solver) == 4  # three tiles, and what fits none
    for variant, loop in solver.items():
        assert loop["multiplies_with"] == "FFMA", variant
        assert loop["spills"] == 0, variant
    rounded = [loop for (_, v), loop in loops.items() if "ROUNDED=True" in v]
    assert rounded
    for loop in rounded:  # int8 products: on tensor cores, nothing spilled
        assert loop["multiplies_with"] == ("IGMMA" if target == "sm_90" else "IMMA")
        assert loop["spills"] == 0
