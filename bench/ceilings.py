"""What a GPU can do at most: rates of loops of nothing but one operation, copies and products."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl

from shear_ops.triton.target import exp2, target_of

from .contest import Entry
from .sizes import Sizes
from .timing import alternate, summary

UNROLL = 16
LANES = 1024  # values of a program of 4 warps: 8 independent chains per thread


def measure(sizes: Sizes) -> Entry:
    """Return the entry of a record: the rates, and the times they are from."""
    device = torch.get_default_device()
    n = sizes.peak
    square = torch.randn(n, n).bfloat16()
    large = torch.empty(16 * n * n)
    target = torch.empty_like(large)
    product: Any = partial(torch.mm, square, square.T)
    if device.type == "cuda":
        product = partial(torch.mm, square, square.T, torch.float32)
    calls = {
        "multiply-adds": partial(multiply_adds, *sizes.rates, device),
        "exponentials": partial(exponentials, *sizes.rates, device),
        "product, bf16 to fp32": product,
        "copy": lambda: target.copy_(large),
    }
    for call in calls.values():
        call()  # compiles
    samples = alternate(calls, 15, sizes.limit_s)
    programs, rounds = sizes.rates
    looped = programs * rounds * LANES * UNROLL
    operations = {
        "multiply-adds": looped,
        "exponentials": looped,
        "product, bf16 to fp32": n**3,
        "copy": 2 * 4 * len(large),
    }
    return {
        "sizes": {"product": n, "copy_bytes": operations["copy"]},
        "times": {name: summary(seconds) for name, seconds in samples.items()},
        "per_s": {name: operations[name] / min(samples[name]) for name in calls},
    }


def multiply_adds(programs: int, rounds: int, device: torch.device) -> None:
    """float32 multiply-adds, UNROLL dependent ones per value and round."""
    out = torch.empty(programs * LANES, device=device)
    _multiply_adds[(programs,)](out, rounds, LANES, UNROLL)


def exponentials(programs: int, rounds: int, device: torch.device) -> None:
    """float32 exponentials as the solver takes them, UNROLL dependent ones per value and round."""
    out = torch.empty(programs * LANES, device=device)
    _exponentials[(programs,)](out, rounds, LANES, UNROLL, target_of(device).approximate)


@triton.jit
def _multiply_adds(out, rounds, LANES: tl.constexpr, UNROLL: tl.constexpr):
    """UNROLL dependent multiply-adds per value and round."""
    x = tl.arange(0, LANES).to(tl.float32) * 1e-3
    k = 0
    while k < rounds:
        for _ in tl.static_range(UNROLL):
            x = x * 0.999 + 0.001
        k += 1
    tl.store(out + tl.program_id(0) * LANES + tl.arange(0, LANES), x)


@triton.jit
def _exponentials(
    out, rounds, LANES: tl.constexpr, UNROLL: tl.constexpr, APPROXIMATE: tl.constexpr
):
    """UNROLL dependent exponentials per value and round."""
    x = tl.arange(0, LANES).to(tl.float32) * 1e-3
    k = 0
    while k < rounds:
        for _ in tl.static_range(UNROLL):
            x = exp2(-x, APPROXIMATE)
        k += 1
    tl.store(out + tl.program_id(0) * LANES + tl.arange(0, LANES), x)
