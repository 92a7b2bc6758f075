"""Reductions of token costs over spans, from which the bounds R and Q, chamfer and mmd are made.

R = mean over rows i of min_j C_ij, Q = mean over columns j of min_i C_ij. Both directions are one
code: a line is a row or a column token, and its windows are the spans of the other side.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from .columns import (
    BLOCK,
    COL_OFFSET,
    COL_SPAN,
    COL_SPANS,
    COL_TOKEN,
    COL_TOKENS,
    COST_OFFSET,
    GROUP,
    LD,
    PAIR_OFFSET,
    ROW_OFFSET,
    ROW_SPAN,
    ROW_SPANS,
    ROW_TOKEN,
    ROW_TOKENS,
    SPAN,
    SPAN_BEGIN,
    SPAN_END,
)
from .solve import LOG2E
from .tables import Chunk
from .tasks import LINES, SPANS, find, has_scale

LN2 = tl.constexpr(0.6931471805599453)
MOST = 128  # tokens of a span taken at a time

MINIMUM, SIMILARITY = 0, 1  # of a line over a window: min C, or sum exp(-C^2 / (2 sigma^2)) - 1
BOUND, CHAMFER, MMD = 0, 1, 2  # what the means over lines become


@triton.jit
def exp2_less_one(x):
    """2^x - 1 for x <= 0, with the digits of x near 0."""
    z = x * LN2
    near = z * (1.0 / 720.0) + 1.0 / 120.0
    near = z * near + 1.0 / 24.0
    near = z * near + 1.0 / 6.0
    near = z * (z * near + 0.5) * z + z
    return tl.where(z > -0.25, near, tl.exp2(x) - 1.0)


@triton.jit(do_not_specialize=["count"])
def windows_kernel(
    costs, spans, group_norm, blocks, first, count, windows, flag, most,
    COLUMNS: tl.constexpr, WHAT: tl.constexpr, CHECK: tl.constexpr,
    L: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """windows (lines, spans of the other side) of a block: one reduction per line and span.

    CHECK: raise the flag on costs that are not between -most and most.
    """
    task = tl.program_id(0).to(tl.int64)
    b = find(first, count, task)
    g = tl.load(blocks + b * BLOCK + GROUP)
    if not has_scale(group_norm, g):
        return
    block = blocks + b * BLOCK
    ld = tl.load(block + LD)
    if COLUMNS:
        lines = tl.load(block + COL_TOKENS)
        span = tl.load(block + ROW_SPAN)
        count_spans = tl.load(block + ROW_SPANS)
        token = tl.load(block + ROW_TOKEN)
        out = windows + tl.load(block + COL_OFFSET)
    else:
        lines = tl.load(block + ROW_TOKENS)
        span = tl.load(block + COL_SPAN)
        count_spans = tl.load(block + COL_SPANS)
        token = tl.load(block + COL_TOKEN)
        out = windows + tl.load(block + ROW_OFFSET)
    line = (task - tl.load(first + b)) * L + tl.arange(0, L)
    there = line < lines
    along = tl.arange(0, W)
    origin = costs + tl.load(block + COST_OFFSET)
    norm = tl.load(group_norm + g)
    to_exponent = -0.5 * LOG2E / (norm * norm)
    bad = 0
    s = span * 0
    while s < count_spans:
        at = tl.load(spans + (span + s) * SPAN + SPAN_BEGIN) - token
        end = tl.load(spans + (span + s) * SPAN + SPAN_END) - token
        if WHAT == 0:
            found = tl.full((L,), float("inf"), tl.float32)
        else:
            found = tl.zeros((L,), tl.float32)
        while at < end:
            k = at + along
            inside = there[:, None] & (k < end)[None, :]
            if COLUMNS:
                place = origin + k[None, :] * ld + line[:, None]
            else:
                place = origin + line[:, None] * ld + k[None, :]
            c = tl.load(place, mask=inside, other=0.0)
            if CHECK:
                broken = (inside & ~(tl.abs(c) < most)).to(tl.int32)
                bad = tl.maximum(bad, tl.max(tl.max(broken, 1), 0))
            if WHAT == 0:
                found = tl.minimum(found, tl.min(tl.where(inside, c, float("inf")), 1))
            else:
                found += tl.sum(tl.where(inside, exp2_less_one(c * c * to_exponent), 0.0), 1)
            at += W
        tl.store(out + line * count_spans + s, found, mask=there)
        s += 1
    if CHECK:
        if bad > 0:
            tl.atomic_max(flag, 1)


@triton.jit(do_not_specialize=["count"])
def means_kernel(
    windows, spans, group_norm, self_similarity, blocks, first, count, values,
    COLUMNS: tl.constexpr, WHAT: tl.constexpr, S: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Means of the windows over the lines of a span, into the pairs of a block.

    Rows first: R. Then COLUMNS: Q, and what becomes of both.
    """
    task = tl.program_id(0).to(tl.int64)
    b = find(first, count, task)
    block = blocks + b * BLOCK
    row_spans = tl.load(block + ROW_SPANS)
    col_spans = tl.load(block + COL_SPANS)
    if COLUMNS:
        span = tl.load(block + COL_SPAN)
        others = row_spans
        other_span = tl.load(block + ROW_SPAN)
        token = tl.load(block + COL_TOKEN)
        data = windows + tl.load(block + COL_OFFSET)
    else:
        span = tl.load(block + ROW_SPAN)
        others = col_spans
        other_span = tl.load(block + COL_SPAN)
        token = tl.load(block + ROW_TOKEN)
        data = windows + tl.load(block + ROW_OFFSET)
    tiles = tl.cdiv(others, S)
    local = task - tl.load(first + b)
    own = local // tiles
    other = local % tiles * S + tl.arange(0, S)
    there = other < others
    if COLUMNS:
        place = values + tl.load(block + PAIR_OFFSET) + other * col_spans + own
    else:
        place = values + tl.load(block + PAIR_OFFSET) + own * col_spans + other
    g = tl.load(block + GROUP)
    norm = tl.load(group_norm + g)
    if not has_scale(group_norm, g):
        empty = tl.where(norm == 0, 0.0, float("nan"))
        tl.store(place, tl.zeros((S,), tl.float32) + empty, mask=there)
        return
    begin = tl.load(spans + (span + own) * SPAN + SPAN_BEGIN) - token
    end = tl.load(spans + (span + own) * SPAN + SPAN_END) - token
    at = begin
    total = tl.zeros((S,), tl.float32)
    while at < end:
        line = at + tl.arange(0, W)
        inside = (line < end)[:, None] & there[None, :]
        total += tl.sum(
            tl.load(data + line[:, None] * others + other[None, :], mask=inside, other=0.0), 0
        )
        at += W
    mean = total / (end - begin).to(tl.float32)
    if COLUMNS:
        before = tl.load(place, mask=there, other=0.0)
        mean = (before + mean) * 0.5 if WHAT == 1 else tl.maximum(before, mean)
    if WHAT == 2:
        size = tl.load(spans + (other_span + other) * SPAN + SPAN_END, mask=there, other=1)
        size -= tl.load(spans + (other_span + other) * SPAN + SPAN_BEGIN, mask=there, other=0)
        mean = mean / size.to(tl.float32)
        if self_similarity is not None:
            same = tl.load(self_similarity + span + own)
            same += tl.load(self_similarity + other_span + other, mask=there, other=0.0)
            mean = norm * tl.sqrt(tl.maximum(same - 2.0 * mean, 0.0))
    tl.store(place, mean, mask=there)


def windows(
    group_norm: Tensor, spans: Tensor, chunk: Chunk, costs: Tensor, out: Tensor,
    flag: Tensor | None, *, columns: bool, what: int, longest: int, most: float = math.inf,
) -> None:  # fmt: skip
    """Reductions of a chunk's token costs over the spans of the other side."""
    tasks = chunk.col_lines if columns else chunk.row_lines
    windows_kernel[tasks.total,](
        costs, spans, group_norm, chunk.blocks, tasks.first, len(chunk.blocks), out,
        out if flag is None else flag, most, COLUMNS=columns, WHAT=what, CHECK=flag is not None,
        L=LINES, W=min(MOST, triton.next_power_of_2(longest)),
    )  # fmt: skip


def means(
    group_norm: Tensor, spans: Tensor, chunk: Chunk, reductions: Tensor, values: Tensor,
    self_similarity: Tensor | None, *, columns: bool, what: int, longest: int,
) -> None:  # fmt: skip
    """Means of the reductions over the lines of a span, into the values of the pairs."""
    tasks = chunk.col_means if columns else chunk.row_means
    means_kernel[tasks.total,](
        reductions, spans, group_norm, self_similarity, chunk.blocks, tasks.first,
        len(chunk.blocks), values, COLUMNS=columns, WHAT=what, S=SPANS,
        W=min(MOST, triton.next_power_of_2(longest)),
    )  # fmt: skip
