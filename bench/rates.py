"""Loops of nothing but one operation, for the rates that a GPU reaches at most."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from shear_ops.triton.sinkhorn_steps import exp2
from shear_ops.triton.target import target_of

UNROLL = 16
LANES = 1024  # values of a program of 4 warps: 8 independent chains per thread


def operations(programs: int, rounds: int) -> int:
    """Operations of a call."""
    return programs * rounds * LANES * UNROLL


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
