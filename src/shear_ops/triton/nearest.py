"""The nearest span of every span: minima over the pairs of a chunk.

In one fixed order, so that what is found does not depend on the order in which pairs were solved.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .columns import (
    BLOCK,
    COL_SPAN,
    COL_SPANS,
    PAIR_OFFSET,
    ROLLOUT,
    ROLLOUT_GROUP,
    ROW_SPAN,
    ROW_SPANS,
    SPAN,
    SPAN_ROLLOUT,
)
from .tables import Chunk, Tables

PAIRS = 128  # taken at a time


class Pairs(NamedTuple):
    """Of the pairs of a chunk: value, residual, iterations.

    The value is the bound and then the span distance; a skipped or abandoned pair keeps its bound.
    """

    value: Tensor
    residual: Tensor
    iterations: Tensor


class Nearest(NamedTuple):
    """Of all spans: distance to the nearest span, its index (-1: none), residual, iterations.

    For aggregation="mean" also the sum and the number of distances.
    """

    distance: Tensor
    span: Tensor
    residual: Tensor
    iterations: Tensor
    total: Tensor
    number: Tensor

    def mean(self) -> Nearest:
        """Replace the minima by means."""
        mean = torch.where(self.number > 0, self.total / self.number, self.distance)
        return self._replace(distance=mean)


@triton.jit
def nearest_kernel(
    spans, rollouts, shows, blocks, first_touching, touching, value, residual, iterations,
    distance, nearest, best_residual, best_iterations, total, count,
    MEAN: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Offer a span all of its pairs in the chunk. NaN (a group without a scale) goes before all.

    shows: the groups whose spans are offered any, or None.
    """
    s = tl.program_id(0).to(tl.int64)
    i = tl.load(spans + s * SPAN + SPAN_ROLLOUT)
    if shows is not None:
        g = tl.load(rollouts + i * ROLLOUT + ROLLOUT_GROUP)
        if g < 0:
            return
        if tl.load(shows + g) == 0:
            return
    entry = tl.load(first_touching + i)
    end = tl.load(first_touching + i + 1)
    best = tl.load(distance + s)
    best = tl.where(best == best, best, -1.0)
    who = tl.load(nearest + s)
    pair = who * 0 - 1
    lane = tl.arange(0, P)
    if MEAN:
        added = tl.load(total + s)
        number = tl.load(count + s)
        worst = tl.load(best_residual + s)
        longest = tl.load(best_iterations + s)
    while entry < end:
        code = tl.load(touching + entry)
        block = blocks + code // 2 * BLOCK
        is_row = code % 2 == 0
        row_spans = tl.load(block + ROW_SPANS)
        col_spans = tl.load(block + COL_SPANS)
        row_span = tl.load(block + ROW_SPAN)
        col_span = tl.load(block + COL_SPAN)
        own = s - tl.where(is_row, row_span, col_span)
        other = tl.where(is_row, col_span, row_span)
        ours = (own >= 0) & (own < tl.where(is_row, row_spans, col_spans))
        others = tl.where(ours, tl.where(is_row, col_spans, row_spans), 0)
        stride = tl.where(is_row, 1, col_spans)
        origin = tl.load(block + PAIR_OFFSET) + own * tl.where(is_row, col_spans, 1)
        k0 = others * 0
        while k0 < others:
            k = k0 + lane
            there = k < others
            v = tl.load(value + origin + k * stride, mask=there, other=0.0)
            key = tl.where(v == v, v, -1.0)
            key = tl.where(there, key, float("inf"))
            lowest = tl.min(key, 0)
            at = tl.min(tl.where(there & (key == lowest), k, others), 0)
            better = (lowest < best) | ((lowest == best) & ((who < 0) | (other + at < who)))
            best = tl.where(better, lowest, best)
            who = tl.where(better, other + at, who)
            pair = tl.where(better, origin + at * stride, pair)
            if MEAN:
                added += tl.sum(tl.where(there, v, 0.0), 0)
                number += tl.minimum(others - k0, P).to(tl.int32)
                r = tl.load(residual + origin + k * stride, mask=there, other=0.0)
                worst = tl.maximum(worst, tl.max(r, 0))
                n = tl.load(iterations + origin + k * stride, mask=there, other=0)
                longest = tl.maximum(longest, tl.max(n, 0))
            k0 += P
        entry += 1
    tl.store(distance + s, tl.where(best < 0, float("nan"), best))
    tl.store(nearest + s, who)
    if MEAN:
        tl.store(total + s, added)
        tl.store(count + s, number)
        tl.store(best_residual + s, worst)
        tl.store(best_iterations + s, longest)
    else:
        if pair >= 0:
            tl.store(best_residual + s, tl.load(residual + pair))
            tl.store(best_iterations + s, tl.load(iterations + pair))


def nothing_found(tables: Tables) -> Nearest:
    """Before the first chunk."""
    device, spans = tables.spans.device, len(tables.spans)

    def full(value: float, dtype: torch.dtype) -> Tensor:
        return torch.full((spans,), value, dtype=dtype, device=device)

    return Nearest(
        full(float("inf"), torch.float32), full(-1, torch.int64), full(0, torch.float32),
        full(0, torch.int32), full(0, torch.float32), full(0, torch.int32),
    )  # fmt: skip


def forget(tables: Tables, found: Nearest, best: Tensor, shows: Tensor) -> None:
    """Take back what was found of the spans of groups, shows (G,) bool."""
    rollout = tables.spans.unbind(1)[SPAN_ROLLOUT]
    group = tables.rollouts.unbind(1)[ROLLOUT_GROUP][rollout]
    again = shows[group] & (group >= 0)
    nothing = nothing_found(tables)
    for kept, new in zip(found, nothing, strict=True):
        torch.where(again, new, kept, out=kept)
    torch.where(again, nothing.distance.view(torch.int32), best, out=best)


def collect(
    tables: Tables, chunk: Chunk, pairs: Pairs, found: Nearest, *, mean: bool,
    shows: Tensor | None = None,
) -> None:  # fmt: skip
    """Offer all spans their pairs in a chunk, or those of groups, shows (G,) bool."""
    if len(tables.spans):
        nearest_kernel[len(tables.spans),](
            tables.spans, tables.rollouts, shows, chunk.blocks, chunk.first_touching,
            chunk.touching, *pairs, *found, MEAN=mean, P=PAIRS,
        )  # fmt: skip
