"""What is measured once per call from the hidden states alone: norms, the groups' centers."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _C
from .columns import ROLLOUT, ROLLOUT_BEGIN, ROLLOUT_END, ROLLOUT_GROUP
from .rounding import nearest_integer
from .tables import Tables
from .tasks import TOKENS, find

TOKENS_AT_ONCE = 16
DIMS = 64
NO_GROUP = 2**63 - 1
MOST = tl.constexpr(_C.MOST_NORM**2)
FAINT = tl.constexpr(_C.FAINT_NORM**2)  # the smallest normal number
EXPONENTS = tl.constexpr(_C.ROUNDING["exponents"])
CENTER_SPREAD = tl.constexpr(_C.ROUNDING["center_spread"])
LEAST_LIMIT = tl.constexpr(_C.ROUNDING["least_limit"])
CENTER_BITS = tl.constexpr(_C.ROUNDING["center_bits"])


class States(NamedTuple):
    """Hidden states (N, d) and what is known of them.

    Attributes:
        hidden: (N, d), contiguous.
        sq_norm: (N,) float32, squared norms; of the centred states if token costs are made.
        center: (G, d) float32, what is taken off the states of a group, as in csrc/rounding.h.
        group_norm, rollout_norm: (G,) and (B,) float32, mean norms.
        bad_token: (1,) int64, first token that is not finite or too large, or N.
        unfit_group: (1,) int64, index of the first group that is refused for its mean norm, whose
            float bits are the low half; or NO_GROUP.
    """

    hidden: Tensor
    sq_norm: Tensor
    center: Tensor
    group_norm: Tensor
    rollout_norm: Tensor
    bad_token: Tensor
    unfit_group: Tensor


@triton.jit(do_not_specialize=["tokens"])
def sq_norm_kernel(
    hidden, sq_norm, exponent, bad_token, tokens,
    DIM: tl.constexpr, T: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """||x||^2 of every token, NaN where it is out of range, and the first token where it is.

    A state that is not zero although its squares are has FAINT. exponent: the biased one of the
    largest entry.
    """
    token = tl.program_id(0).to(tl.int64) * T + tl.arange(0, T)
    there = token < tokens
    lane = tl.arange(0, D)
    squares = tl.zeros((T, D), tl.float32)
    largest = tl.zeros((T, D), tl.int32)  # bits: in the order of floats >= 0
    for k in range(0, DIM, D):
        inside = there[:, None] & (k + lane < DIM)[None, :]
        x = tl.load(hidden + token[:, None] * DIM + k + lane[None, :], mask=inside, other=0.0)
        x = x.to(tl.float32)
        squares += x * x
        largest = tl.maximum(largest, x.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    total = tl.sum(squares, 1)
    tl.store(exponent + token, (tl.max(largest, 1) >> 23).to(tl.uint8), mask=there)
    vanished = there & (total < FAINT)
    if tl.max(vanished.to(tl.int32), 0) > 0:
        seen = tl.zeros((T,), tl.int32)
        for k in range(0, DIM, D):
            inside = vanished[:, None] & (k + lane < DIM)[None, :]
            x = tl.load(hidden + token[:, None] * DIM + k + lane[None, :], mask=inside, other=0.0)
            bits = x.to(tl.float32).to(tl.int32, bitcast=True)  # no comparison: it may flush
            seen |= tl.max(((bits << 1) != 0).to(tl.int32), 1)
        total = tl.where(seen > 0, FAINT, total)
    bad = there & ~(total < MOST)
    tl.store(sq_norm + token, tl.where(bad, float("nan"), total), mask=there)
    first = tl.min(tl.where(bad, token, tokens), 0)
    if first < tokens:
        tl.atomic_min(bad_token, first)


@triton.jit
def rollout_norm_kernel(sq_norm, rollouts, rollout_norm, T: tl.constexpr):
    """Mean norm of every rollout, summed in a fixed order."""
    i = tl.program_id(0)
    token = tl.load(rollouts + i * ROLLOUT + ROLLOUT_BEGIN)
    end = tl.load(rollouts + i * ROLLOUT + ROLLOUT_END)
    lane = tl.arange(0, T)
    sums = tl.zeros((T,), tl.float32)
    count = tl.maximum(end - token, 1).to(tl.float32)
    while token < end:
        sums += tl.sqrt(tl.load(sq_norm + token + lane, mask=token + lane < end, other=0.0))
        token += T
    tl.store(rollout_norm + i, tl.sum(sums, 0) / count)


@triton.jit
def group_norm_kernel(
    rollout_norm, rollouts, first_member, members, group_norm, unfit_group, least_norm, most_norm
):
    """Mean norm of every group over all of its tokens, NaN where that is too small or too large."""
    g = tl.program_id(0)
    at = tl.load(first_member + g)
    end = tl.load(first_member + g + 1)
    total = 0.0
    tokens = 0.0
    while at < end:
        i = tl.load(members + at)
        begin = tl.load(rollouts + i * ROLLOUT + ROLLOUT_BEGIN)
        length = (tl.load(rollouts + i * ROLLOUT + ROLLOUT_END) - begin).to(tl.float32)
        total += tl.load(rollout_norm + i) * length
        tokens += length
        at += 1
    norm = total / tokens
    if (norm > 0) & ((norm < least_norm) | (norm > most_norm)) & (norm < float("inf")):
        bits = norm.to(tl.int32, bitcast=True).to(tl.int64)
        tl.atomic_min(unfit_group, (g.to(tl.int64) << 32) | bits)
        norm = float("nan")
    tl.store(group_norm + g, norm)


@triton.jit(do_not_specialize=["count"])
def count_kernel(exponent, rollouts, first, count, counts, T: tl.constexpr):
    """counts (G, EXPONENTS): how many tokens of a group have which exponent."""
    task = tl.program_id(0).to(tl.int64)
    i = find(first, count, task)
    g = tl.load(rollouts + i * ROLLOUT + ROLLOUT_GROUP)
    if g < 0:
        return
    token = tl.load(rollouts + i * ROLLOUT + ROLLOUT_BEGIN)
    token += (task - tl.load(first + i)) * T + tl.arange(0, T)
    there = token < tl.load(rollouts + i * ROLLOUT + ROLLOUT_END)
    e = tl.load(exponent + token, mask=there, other=0).to(tl.int32)
    number = tl.histogram(e, EXPONENTS, mask=there)
    at = counts + g * EXPONENTS + tl.arange(0, EXPONENTS)
    tl.atomic_add(at, number, mask=number > 0)


@triton.jit
def center_limit(counts, g):
    """The exponent that tokens of a group's center stay below, and how many do."""
    e = tl.arange(0, EXPONENTS)
    number = tl.load(counts + g * EXPONENTS + e)
    tokens = tl.sum(number, 0)
    median = tl.sum((2 * tl.cumsum(number, 0) < tokens).to(tl.int32), 0)
    limit = tl.maximum(median + CENTER_SPREAD, LEAST_LIMIT)
    return limit, tl.sum(tl.where(e < limit, number, 0), 0)


@triton.jit(do_not_specialize=["count"])
def center_sum_kernel(
    hidden, exponent, rollouts, first, count, counts, sums,
    DIM: tl.constexpr, T: tl.constexpr, AT_ONCE: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Add tokens to the sums (G, d) of their group: integers, so that no order shows."""
    task = tl.program_id(0).to(tl.int64)
    i = find(first, count, task)
    g = tl.load(rollouts + i * ROLLOUT + ROLLOUT_GROUP)
    if g < 0:
        return
    limit, _ = center_limit(counts, g)
    to_units = ((-limit + CENTER_BITS + 2 * 127) << 23).to(tl.float32, bitcast=True)
    begin = tl.load(rollouts + i * ROLLOUT + ROLLOUT_BEGIN) + (task - tl.load(first + i)) * T
    end = tl.load(rollouts + i * ROLLOUT + ROLLOUT_END)
    dim = tl.program_id(1) * D + tl.arange(0, D)
    total = tl.zeros((D,), tl.int32)
    for part in range(0, T, AT_ONCE):
        token = begin + part + tl.arange(0, AT_ONCE)
        there = token < end
        there &= tl.load(exponent + token, mask=there, other=0).to(tl.int32) < limit
        inside = there[:, None] & (dim < DIM)[None, :]
        x = tl.load(hidden + token[:, None] * DIM + dim[None, :], mask=inside, other=0.0)
        total += tl.sum(nearest_integer(x.to(tl.float32) * to_units), 0)  # exact: a power of 2
    tl.atomic_add(sums + g * DIM + dim, total.to(tl.int64), mask=dim < DIM)


@triton.jit
def center_kernel(sums, counts, center, DIM: tl.constexpr, D: tl.constexpr):
    """The centers of groups, (G, d): the means of their tokens without outliers."""
    g = tl.program_id(0).to(tl.int64)
    dim = tl.program_id(1) * D + tl.arange(0, D)
    limit, tokens = center_limit(counts, g)
    unit = ((limit - CENTER_BITS + (1023 - 127)).to(tl.int64) << 52).to(tl.float64, bitcast=True)
    total = tl.load(sums + g * DIM + dim, mask=dim < DIM, other=0).to(tl.float64)
    mean = total / tokens.to(tl.float64) * unit
    tl.store(center + g * DIM + dim, mean.to(tl.float32), mask=dim < DIM)


@triton.jit(do_not_specialize=["count"])
def centered_sq_norm_kernel(
    hidden, rollouts, first, count, center, sq_norm,
    DIM: tl.constexpr, T: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """||x - center||^2 of the tokens of groups; the others keep ||x||^2."""
    task = tl.program_id(0).to(tl.int64)
    i = find(first, count, task)
    g = tl.load(rollouts + i * ROLLOUT + ROLLOUT_GROUP)
    if g < 0:
        return
    token = tl.load(rollouts + i * ROLLOUT + ROLLOUT_BEGIN)
    token += (task - tl.load(first + i)) * T + tl.arange(0, T)
    there = token < tl.load(rollouts + i * ROLLOUT + ROLLOUT_END)
    lane = tl.arange(0, D)
    squares = tl.zeros((T, D), tl.float32)
    for k in range(0, DIM, D):
        inside = there[:, None] & (k + lane < DIM)[None, :]
        x = tl.load(hidden + token[:, None] * DIM + k + lane[None, :], mask=inside, other=0.0)
        c = tl.load(center + g * DIM + k + lane, mask=k + lane < DIM, other=0.0)
        x = tl.where(inside, x.to(tl.float32) - c[None, :], 0.0)
        squares += x * x
    tl.store(sq_norm + token, tl.sum(squares, 1), mask=there)


def measure(
    hidden: Tensor, tables: Tables, *, center: bool, norm_range: tuple[float, float]
) -> States:
    """Norms of the states, and if they are to be multiplied, the groups' centers.

    Groups whose mean norm is not in norm_range are refused.
    """
    tokens, dim = hidden.shape
    groups, rollouts = tables.groups, len(tables.rollouts)

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=hidden.device)

    sq_norm, rollout_norm, group_norm = new(tokens), new(rollouts), new(groups)
    exponent = new(tokens, dtype=torch.uint8)
    bad_token = torch.full((1,), tokens, dtype=torch.int64, device=hidden.device)
    unfit_group = torch.full((1,), NO_GROUP, dtype=torch.int64, device=hidden.device)
    wide = min(1024, triton.next_power_of_2(dim))
    if tokens:
        grid = (triton.cdiv(tokens, TOKENS_AT_ONCE),)
        sq_norm_kernel[grid](
            hidden,
            sq_norm,
            exponent,
            bad_token,
            tokens,
            DIM=dim,
            T=TOKENS_AT_ONCE,
            D=min(wide, 128),
        )
    if rollouts:
        rollout_norm_kernel[rollouts,](sq_norm, tables.rollouts, rollout_norm, T=1024)
    centers = new(groups, dim if center else 0)
    states = States(hidden, sq_norm, centers, group_norm, rollout_norm, bad_token, unfit_group)
    if not groups:
        return states
    members = tables.rollouts, tables.first_member, tables.members
    group_norm_kernel[groups,](rollout_norm, *members, group_norm, unfit_group, *norm_range)
    if not center:
        return states
    task = tables.rollouts, tables.tokens.first, rollouts
    total, slices = tables.tokens.total, triton.cdiv(dim, DIMS)
    counts = torch.zeros(groups * EXPONENTS.value, dtype=torch.int32, device=hidden.device)
    count_kernel[total,](exponent, *task, counts, T=TOKENS)
    sums = torch.zeros(groups * dim, dtype=torch.int64, device=hidden.device)
    center_sum_kernel[total, slices](
        hidden, exponent, *task, counts, sums, DIM=dim, T=TOKENS, AT_ONCE=TOKENS_AT_ONCE, D=DIMS
    )
    center_kernel[groups, slices](sums, counts, centers, DIM=dim, D=DIMS)
    centered_sq_norm_kernel[total,](
        hidden, *task, centers, sq_norm, DIM=dim, T=TOKENS, D=min(wide, 32)
    )
    return states
