"""The distance "cosine": mean norm * (1 - cos of the span means), as half the squared token cost
between unit means.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .columns import (
    BLOCK,
    COL_SPAN,
    COL_SPANS,
    GROUP,
    PAIR_OFFSET,
    ROW_SPAN,
    SPAN,
    SPAN_BEGIN,
    SPAN_END,
)
from .states import DIMS, TOKENS_AT_ONCE, States
from .tables import Chunk, Tables
from .tasks import find, has_scale

PAIRS = 256  # of a program


@triton.jit
def sum_kernel(hidden, spans, sums, DIM: tl.constexpr, T: tl.constexpr, D: tl.constexpr):
    """Sum of the states of every span, (spans, d)."""
    s = tl.program_id(0).to(tl.int64)
    dim = tl.program_id(1) * D + tl.arange(0, D)
    token = tl.load(spans + s * SPAN + SPAN_BEGIN)
    end = tl.load(spans + s * SPAN + SPAN_END)
    lane = tl.arange(0, T)
    parts = tl.zeros((T, D), tl.float32)
    while token < end:
        inside = (token + lane < end)[:, None] & (dim < DIM)[None, :]
        x = tl.load(hidden + (token + lane)[:, None] * DIM + dim[None, :], mask=inside, other=0.0)
        parts += x.to(tl.float32)
        token += T
    tl.store(sums + s * DIM + dim, tl.sum(parts, 0), mask=dim < DIM)


@triton.jit
def unit_kernel(sums, sq_norm, DIM: tl.constexpr, D: tl.constexpr):
    """Scale a sum of states to norm 1, or leave it at 0; its squared norm."""
    s = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, D)
    squares = tl.zeros((D,), tl.float32)
    for k in range(0, DIM, D):
        x = tl.load(sums + s * DIM + k + lane, mask=k + lane < DIM, other=0.0)
        squares += x * x
    norm = tl.sqrt(tl.sum(squares, 0))
    scale = tl.where(norm > 0, 1.0 / tl.where(norm > 0, norm, 1.0), 0.0)
    squares = tl.zeros((D,), tl.float32)
    for k in range(0, DIM, D):
        x = tl.load(sums + s * DIM + k + lane, mask=k + lane < DIM, other=0.0) * scale
        tl.store(sums + s * DIM + k + lane, x, mask=k + lane < DIM)
        squares += x * x
    tl.store(sq_norm + s, tl.sum(squares, 0))


@triton.jit(do_not_specialize=["count", "total"])
def cosine_kernel(
    group_norm, sq_norm, blocks, pair_first, count, total, values, P: tl.constexpr
):  # fmt: skip
    """Costs between unit means to distances; a mean of 0 has no direction: cos = 0."""
    pair = tl.program_id(0).to(tl.int64) * P + tl.arange(0, P)
    there = pair < total
    b = find(pair_first, count, tl.where(there, pair, 0))
    local = pair - tl.load(pair_first + b)
    block = blocks + b * BLOCK
    col_spans = tl.load(block + COL_SPANS)
    row = tl.load(block + ROW_SPAN) + local // col_spans
    col = tl.load(block + COL_SPAN) + local % col_spans
    x = tl.load(sq_norm + row, mask=there, other=0.0)
    y = tl.load(sq_norm + col, mask=there, other=0.0)
    g = tl.load(block + GROUP)
    norm = tl.load(group_norm + g)
    place = values + tl.load(block + PAIR_OFFSET) + local
    cost = tl.load(place, mask=there, other=0.0)
    value = norm * tl.where((x > 0) & (y > 0), 0.5 * cost * cost, 1.0)
    empty = tl.where(norm == 0, 0.0, float("nan"))
    tl.store(place, tl.where(has_scale(group_norm, g), value, empty), mask=there)


def span_means(states: States, tables: Tables) -> States:
    """Unit means of all spans, in place of the states of tokens."""
    spans, dim = len(tables.spans), states.hidden.shape[1]
    device = states.hidden.device
    means = torch.empty((spans, dim), dtype=torch.float32, device=device)
    sq_norm = torch.empty(spans, dtype=torch.float32, device=device)
    if spans:
        grid = spans, triton.cdiv(dim, DIMS)
        sum_kernel[grid](states.hidden, tables.spans, means, DIM=dim, T=TOKENS_AT_ONCE, D=DIMS)
        unit_kernel[spans,](means, sq_norm, DIM=dim, D=min(1024, triton.next_power_of_2(dim)))
    at_zero = torch.zeros((tables.groups, dim), dtype=torch.float32, device=device)
    return states._replace(hidden=means, sq_norm=sq_norm, center=at_zero)


def cosine_distances(states: States, chunk: Chunk, values: Tensor) -> None:
    """Costs between unit means to the distances of the pairs of a chunk, in place."""
    total = chunk.pairs.total
    cosine_kernel[triton.cdiv(total, PAIRS),](
        states.group_norm, states.sq_norm, chunk.blocks, chunk.pairs.first, len(chunk.blocks),
        total, values, P=PAIRS,
    )  # fmt: skip
