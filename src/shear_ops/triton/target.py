"""What the kernels run on: facts that choose between variants of a kernel."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl

INTERPRETED: bool = triton.knobs.runtime.interpret


@dataclass(frozen=True)
class Target:
    """Facts of one device.

    Attributes:
        processors: how many programs run side by side at least.
        approximate: whether to use the PTX instructions for exp2 and log2, which are not guarded
            against denormals; Triton's own expand to several instructions.
        precision: how Triton multiplies float32 matrices. One product of TF32 is too coarse; three
            are as good as float32, on tensor cores.
        shared: bytes of shared memory that a program may take.
        extra_stages: of a pipelined loop, that take no shared memory.
    """

    processors: int
    approximate: bool
    precision: str
    shared: int
    extra_stages: int

    def stages(self, bytes_each: int) -> int:
        """Return how many steps of a loop over operands of so many bytes can be under way."""
        return max(1, min(4, self.shared // bytes_each)) + self.extra_stages


KIB = 1024


@cache
def target_of(device: torch.device) -> Target:
    """Return the facts of a device; on the CPU, those of Triton's interpreter."""
    if INTERPRETED or device.type == "cpu":
        return Target(1, False, "ieee", 64 * KIB, 0)
    facts = triton.runtime.driver.active.utils.get_device_properties(device.index or 0)
    count, shared = facts["multiprocessor_count"], facts["max_shared_mem"]
    if device.type == "cuda" and not torch.version.hip:
        return Target(count, True, "tf32x3", shared, 0)
    return Target(count, False, "ieee", shared, 1)


@triton.jit
def exp2(x, APPROXIMATE: tl.constexpr):
    """2^x; APPROXIMATE: by one PTX instruction."""
    if APPROXIMATE:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.exp2(x)


@triton.jit
def log2(x, APPROXIMATE: tl.constexpr):
    """log2(x); APPROXIMATE: by one PTX instruction."""
    if APPROXIMATE:
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.log2(x)
