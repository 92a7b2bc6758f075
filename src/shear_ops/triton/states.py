"""What is measured once per call from the hidden states alone: norms, the groups' mean states."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _C
from .columns import ROLLOUT, ROLLOUT_BEGIN, ROLLOUT_END, ROLLOUT_GROUP, SPAN, SPAN_BEGIN, SPAN_END
from .tables import Tables
from .tasks import TOKENS, find

TOKENS_AT_ONCE = 16
DIMS = 64
NO_GROUP = 2**63 - 1
MOST = tl.constexpr(_C.MOST_NORM**2)
FAINT = tl.constexpr(_C.FAINT_NORM**2)  # the smallest normal number


class States(NamedTuple):
    """Hidden states (N, d) and what is known of them.

    Attributes:
        hidden: (N, d), contiguous.
        sq_norm: (N,) float32, squared norms; of the centred states where the group is centred.
        center: (G, d) float32, the groups' mean states.
        centered: (G,) int32, 1 if token costs are made of centred states.
        group_norm, rollout_norm: (G,) and (B,) float32, mean norms.
        bad_token: (1,) int64, first token that is not finite or too large, or N.
        unfit_group: (1,) int64, index of the first group that is refused for its mean norm, whose
            float bits are the low half; or NO_GROUP.
    """

    hidden: Tensor
    sq_norm: Tensor
    center: Tensor
    centered: Tensor
    group_norm: Tensor
    rollout_norm: Tensor
    bad_token: Tensor
    unfit_group: Tensor


@triton.jit(do_not_specialize=["tokens"])
def sq_norm_kernel(
    hidden, sq_norm, bad_token, tokens, DIM: tl.constexpr, T: tl.constexpr, D: tl.constexpr
):
    """||x||^2 of every token, NaN where it is out of range, and the first token where it is.

    A state that is not zero although its squares are has FAINT.
    """
    token = tl.program_id(0).to(tl.int64) * T + tl.arange(0, T)
    there = token < tokens
    lane = tl.arange(0, D)
    squares = tl.zeros((T, D), tl.float32)
    for k in range(0, DIM, D):
        inside = there[:, None] & (k + lane < DIM)[None, :]
        x = tl.load(hidden + token[:, None] * DIM + k + lane[None, :], mask=inside, other=0.0)
        x = x.to(tl.float32)
        squares += x * x
    total = tl.sum(squares, 1)
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


@triton.jit
def sum_kernel(
    hidden, table, sums,
    OF_SPANS: tl.constexpr, DIM: tl.constexpr, T: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Sum of the states of every rollout or, OF_SPANS, every span of a table, (rows, d)."""
    i = tl.program_id(0).to(tl.int64)
    dim = tl.program_id(1) * D + tl.arange(0, D)
    if OF_SPANS:
        token = tl.load(table + i * SPAN + SPAN_BEGIN)
        end = tl.load(table + i * SPAN + SPAN_END)
    else:
        token = tl.load(table + i * ROLLOUT + ROLLOUT_BEGIN)
        end = tl.load(table + i * ROLLOUT + ROLLOUT_END)
    lane = tl.arange(0, T)
    parts = tl.zeros((T, D), tl.float32)
    while token < end:
        inside = (token + lane < end)[:, None] & (dim < DIM)[None, :]
        x = tl.load(hidden + (token + lane)[:, None] * DIM + dim[None, :], mask=inside, other=0.0)
        parts += x.to(tl.float32)
        token += T
    tl.store(sums + i * DIM + dim, tl.sum(parts, 0), mask=dim < DIM)


@triton.jit
def center_kernel(
    sums, rollouts, first_member, members, center, DIM: tl.constexpr, D: tl.constexpr
):
    """Mean state of every group, (G, d)."""
    g = tl.program_id(0).to(tl.int64)
    dim = tl.program_id(1) * D + tl.arange(0, D)
    at = tl.load(first_member + g)
    end = tl.load(first_member + g + 1)
    total = tl.zeros((D,), tl.float32)
    tokens = 0.0
    while at < end:
        i = tl.load(members + at)
        total += tl.load(sums + i * DIM + dim, mask=dim < DIM, other=0.0)
        begin = tl.load(rollouts + i * ROLLOUT + ROLLOUT_BEGIN)
        tokens += (tl.load(rollouts + i * ROLLOUT + ROLLOUT_END) - begin).to(tl.float32)
        at += 1
    tl.store(center + g * DIM + dim, total / tokens, mask=dim < DIM)


@triton.jit
def centered_kernel(center, group_norm, centered, share, DIM: tl.constexpr, D: tl.constexpr):
    """Whether more than `share` of the states of a group is their mean."""
    g = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, D)
    squares = tl.zeros((D,), tl.float32)
    for k in range(0, DIM, D):
        x = tl.load(center + g * DIM + k + lane, mask=k + lane < DIM, other=0.0)
        squares += x * x
    norm = tl.load(group_norm + g)
    tl.store(centered + g, (tl.sum(squares, 0) > share * norm * norm).to(tl.int32))


@triton.jit(do_not_specialize=["count"])
def centered_sq_norm_kernel(
    hidden, rollouts, first, count, center, centered, sq_norm,
    DIM: tl.constexpr, T: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """||x - center||^2 of the tokens of centred groups; the others keep ||x||^2."""
    task = tl.program_id(0).to(tl.int64)
    i = find(first, count, task)
    g = tl.load(rollouts + i * ROLLOUT + ROLLOUT_GROUP)
    if g < 0:
        return
    if tl.load(centered + g) == 0:
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
    """Norms of the states, and if they are to be multiplied, the groups' mean states.

    Groups whose mean norm is not in norm_range are refused.
    """
    tokens, dim = hidden.shape
    groups, rollouts = tables.groups, len(tables.rollouts)

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=hidden.device)

    sq_norm, rollout_norm, group_norm = new(tokens), new(rollouts), new(groups)
    bad_token = torch.full((1,), tokens, dtype=torch.int64, device=hidden.device)
    unfit_group = torch.full((1,), NO_GROUP, dtype=torch.int64, device=hidden.device)
    wide = min(1024, triton.next_power_of_2(dim))
    if tokens:
        grid = (triton.cdiv(tokens, TOKENS_AT_ONCE),)
        sq_norm_kernel[grid](
            hidden, sq_norm, bad_token, tokens, DIM=dim, T=TOKENS_AT_ONCE, D=min(wide, 128)
        )
    if rollouts:
        rollout_norm_kernel[rollouts,](sq_norm, tables.rollouts, rollout_norm, T=1024)
    means, centered = new(groups, dim if center else 0), new(groups, dtype=torch.int32)
    states = States(
        hidden, sq_norm, means, centered, group_norm, rollout_norm, bad_token, unfit_group
    )
    if not groups:
        return states
    members = tables.rollouts, tables.first_member, tables.members
    group_norm_kernel[groups,](rollout_norm, *members, group_norm, unfit_group, *norm_range)
    if not center:
        return states
    slices = triton.cdiv(dim, DIMS)
    sums = new(rollouts, dim)
    sum_kernel[rollouts, slices](
        hidden, tables.rollouts, sums, OF_SPANS=False, DIM=dim, T=TOKENS_AT_ONCE, D=DIMS
    )
    center_kernel[groups, slices](sums, *members, means, DIM=dim, D=DIMS)
    # centred, then rounded: worse than not centred. float32 is not rounded, so always centre
    share = -1.0 if hidden.dtype == torch.float32 else _C.MEAN_SHARE
    centered_kernel[groups,](means, group_norm, centered, share, DIM=dim, D=wide)
    centered_sq_norm_kernel[tables.tokens.total,](
        hidden, tables.rollouts, tables.tokens.first, rollouts, means, centered, sq_norm,
        DIM=dim, T=TOKENS, D=min(wide, 32),
    )  # fmt: skip
    return states
