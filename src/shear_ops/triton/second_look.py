"""The second look at every span's nearest span: its token costs are taken from the exact product
and its distance is solved again, so that the values that leave a call carry no rounding to int8 and
only the choice among nearly equal spans does. It checks the first look by the way.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .. import _C
from .columns import (
    BLOCK,
    COL_SPAN,
    COL_TOKEN,
    COL_TOKENS,
    GROUP,
    ROLLOUT,
    ROLLOUT_GROUP,
    ROW_SPAN,
    ROW_TOKEN,
    ROW_TOKENS,
    SPAN,
    SPAN_BEGIN,
    SPAN_END,
    SPAN_ROLLOUT,
)
from .nearest import Nearest, Pairs
from .tables import Chunk, Tables

SPANS = 128  # of a program
MOST_ERROR = tl.constexpr(_C.ROUNDING["most_error"])


class Looked(NamedTuple):
    """What the second look knows of spans.

    Attributes:
        some: whether their blocks have a pair: not without an opposing set, and where two spans are
            each other's nearest, only the row span's block has it.
        mutual: whether they are the nearest of their nearest spans.
        other: their nearest spans.
        rollout: of the spans.
        is_row: whether they are rows of pairs.
    """

    some: Any
    mutual: Any
    other: Any
    rollout: Any
    is_row: Any


@triton.jit
def look_at(spans, correct, nearest, s, there):
    """The Looked of spans s."""
    other = tl.load(nearest + s, mask=there, other=-1)
    some = other >= 0
    mutual = some & (tl.load(nearest + other, mask=some, other=-1) == s)
    rollout = tl.load(spans + s * SPAN + SPAN_ROLLOUT, mask=some, other=0)
    is_row = tl.load(correct + rollout, mask=some, other=0) != 0
    return Looked(some & (is_row | ~mutual), mutual, other, rollout, is_row)


@triton.jit
def tokens_of(spans, s, some):
    """First token and number of tokens of spans."""
    begin = tl.load(spans + s * SPAN + SPAN_BEGIN, mask=some, other=0)
    return begin, tl.load(spans + s * SPAN + SPAN_END, mask=some, other=0) - begin


@triton.jit(do_not_specialize=["begin", "count", "total"])
def pairs_kernel(spans, rollouts, correct, nearest, blocks, begin, count, total, S: tl.constexpr):
    """Fill the blocks of the spans from `begin` on, each with its nearest span.

    count: blocks; total: spans. Blocks of no pair stay as they are.
    """
    k = tl.program_id(0).to(tl.int64) * S + tl.arange(0, S)
    s = begin + k
    looked = look_at(spans, correct, nearest, s, (k < count) & (s < total))
    some = looked.some
    row = tl.where(looked.is_row, s, looked.other)
    col = tl.where(looked.is_row, looked.other, s)
    row_token, row_tokens = tokens_of(spans, row, some)
    col_token, col_tokens = tokens_of(spans, col, some)
    group = tl.load(rollouts + looked.rollout * ROLLOUT + ROLLOUT_GROUP, mask=some, other=0)
    block = blocks + k * BLOCK
    tl.store(block + GROUP, group, mask=some)
    tl.store(block + ROW_SPAN, row, mask=some)
    tl.store(block + ROW_TOKEN, row_token, mask=some)
    tl.store(block + ROW_TOKENS, row_tokens, mask=some)
    tl.store(block + COL_SPAN, col, mask=some)
    tl.store(block + COL_TOKEN, col_token, mask=some)
    tl.store(block + COL_TOKENS, col_tokens, mask=some)


@triton.jit
def rounding_shows(first_look, second_look, eps):
    """Whether a first look is not to be trusted: rounding_shows of csrc/rounding.h."""
    return tl.abs(second_look - first_look) / tl.maximum(second_look, eps) > MOST_ERROR


@triton.jit(do_not_specialize=["begin", "count", "total", "n_iters"])
def keep_kernel(
    spans, rollouts, correct, group_norm, nearest, value, residual, iterations,
    distance, found_residual, found_iterations, shows, stopped, begin, count, total,
    reg, n_iters, UNIT_IS_NORM: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """Replace what was found of the spans from `begin` on and of those that share their pairs.

    shows: set for groups in which rounding shows. stopped: plus the pairs that only n_iters stopped
    now.
    """
    k = tl.program_id(0).to(tl.int64) * S + tl.arange(0, S)
    s = begin + k
    looked = look_at(spans, correct, nearest, s, (k < count) & (s < total))
    v = tl.load(value + k, mask=looked.some, other=0.0)
    r = tl.load(residual + k, mask=looked.some, other=0.0)
    n = tl.load(iterations + k, mask=looked.some, other=0)
    g = tl.load(rollouts + looked.rollout * ROLLOUT + ROLLOUT_GROUP, mask=looked.some, other=0)
    eps = tl.zeros((S,), tl.float32) + reg
    if UNIT_IS_NORM:
        eps *= tl.load(group_norm + g, mask=looked.some, other=1.0)
    first_look = tl.load(distance + s, mask=looked.some, other=0.0)
    tl.store(shows + g, 1, mask=looked.some & rounding_shows(first_look, v, eps))
    before = tl.load(found_iterations + s, mask=looked.some, other=0)
    newly = looked.some & (n >= n_iters) & (before < n_iters)
    tl.atomic_add(stopped, tl.sum(newly.to(tl.int64), 0))
    tl.store(distance + s, v, mask=looked.some)
    tl.store(found_residual + s, r, mask=looked.some)
    tl.store(found_iterations + s, n, mask=looked.some)
    shared = looked.some & looked.mutual
    tl.store(distance + looked.other, v, mask=shared)
    tl.store(found_residual + looked.other, r, mask=shared)
    tl.store(found_iterations + looked.other, n, mask=shared)


def nearest_pairs(tables: Tables, template: Chunk, found: Nearest, begin: int) -> Chunk:
    """The chunk of the spans from `begin` on and their nearest spans."""
    blocks = template.blocks.clone()
    pairs_kernel[triton.cdiv(len(blocks), SPANS),](
        tables.spans, tables.rollouts, tables.correct, found.span, blocks, begin, len(blocks),
        len(tables.spans), S=SPANS,
    )  # fmt: skip
    return replace(template, blocks=blocks)


def keep(
    tables: Tables, group_norm: Tensor, pairs: Pairs, found: Nearest, shows: Tensor,
    stopped: Tensor, begin: int, *, reg: float, unit_is_norm: bool, n_iters: int,
) -> None:  # fmt: skip
    """Replace what was found of the spans from `begin` on by what their pairs are now.

    shows (G + 1,) int32, stopped (1,) int64: see keep_kernel.
    """
    count = len(pairs.value)
    keep_kernel[triton.cdiv(count, SPANS),](
        tables.spans, tables.rollouts, tables.correct, group_norm, found.span, *pairs,
        found.distance, found.residual, found.iterations, shows, stopped, begin, count,
        len(tables.spans), reg, n_iters, UNIT_IS_NORM=unit_is_norm, S=SPANS,
    )  # fmt: skip
