"""What the kernels run on: facts that choose between variants of a kernel."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton

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
        upcast: the interpreter multiplies the bit patterns of bfloat16.
    """

    processors: int
    approximate: bool
    precision: str
    upcast: bool


@cache
def target_of(device: torch.device) -> Target:
    """Return the facts of a device; on the CPU, those of Triton's interpreter."""
    if INTERPRETED or device.type == "cpu":
        return Target(1, False, "ieee", True)
    if device.type == "xpu":
        return Target(torch.xpu.get_device_properties(device).max_compute_units, False, "ieee", False)
    count = torch.cuda.get_device_properties(device).multi_processor_count
    if torch.version.hip:
        return Target(count, False, "ieee", False)
    return Target(count, True, "tf32x3", False)
