"""The queue of span pairs: best bound first, each solved unless its bound says it cannot win."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .columns import (
    BLOCK,
    COL_SPAN,
    COL_SPANS,
    COL_TOKEN,
    COST_OFFSET,
    GROUP,
    LD,
    PAIR_OFFSET,
    ROW_SPAN,
    ROW_TOKEN,
    SPAN,
    SPAN_BEGIN,
    SPAN_END,
)
from .nearest import Pairs
from .sinkhorn import Rivals, beaten, cannot_win, solve_pair
from .solve import LOG2E, Costs
from .tables import Chunk, Tables
from .target import target_of
from .tasks import find, has_scale

BATCH = tl.constexpr(32)  # pairs of the queue that are looked at together where most are skipped


class Tile(NamedTuple):
    """Shape of a program: a tile of size x size, `lanes` columns of it on the lanes of a warp."""

    size: int
    lanes: int
    warps: int
    resident: int  # programs that a processor holds


TILES = (Tile(32, 8, 1, 16), Tile(64, 16, 2, 6), Tile(128, 16, 4, 2))
LARGE = Tile(0, 0, 8, 3)  # no tile: costs are read again in every iteration


class Queue(NamedTuple):
    """Pairs of a chunk, and what the programs that solve them share.

    Attributes:
        order: (total,) int64, the pairs, best bound first.
        next: (1,) int32, how far the queue is.
        best: (spans,) int32, float bits of the smallest distances so far.
        counts: (4,) int64, pairs bounded away, abandoned, solved, stopped at n_iters.
        words: (programs,) int32, see can_win.
        scratch: (programs, 3, longest span) float32, see solve_pair; empty with a tile.
    """

    order: Any
    next: Any
    best: Any
    counts: Any
    words: Any
    scratch: Any


class Problem(NamedTuple):
    """What the pairs are made of: token costs, and the tables of a chunk."""

    costs: Any
    group_norm: Any
    spans: Any
    blocks: Any
    pair_first: Any


class Pair(NamedTuple):
    """Pairs: their block, spans, and index in the results. Scalars, or vectors of as many."""

    block: Any
    row: Any
    col: Any
    place: Any


@triton.jit
def find_pair(problem, count, number):
    """The Pair of a number below the chunk's pairs; count: of blocks."""
    b = find(problem.pair_first, count, number)
    block = problem.blocks + b * BLOCK
    local = number - tl.load(problem.pair_first + b)
    col_spans = tl.load(block + COL_SPANS)
    row = tl.load(block + ROW_SPAN) + local // col_spans
    col = tl.load(block + COL_SPAN) + local % col_spans
    return Pair(block, row, col, tl.load(block + PAIR_OFFSET) + local)


@triton.jit
def can_win(bound, best, row, col, some, prune, word):
    """The test of beaten for a vector of at most 32 pairs.

    Every warp loads for itself: what one thread found is passed to all through memory.
    """
    of_row = tl.load(best + row, mask=some, other=0, volatile=True).to(tl.float32, bitcast=True)
    of_col = tl.load(best + col, mask=some, other=0, volatile=True).to(tl.float32, bitcast=True)
    alive = some & ~cannot_win(bound, of_row, of_col, prune)
    lane = tl.arange(0, BATCH)
    tl.atomic_xchg(word, tl.sum(alive.to(tl.int32) << lane, 0))
    return (tl.atomic_add(word, 0) >> lane) & 1 != 0


@triton.jit
def costs_of(problem, pair, eps):
    """The Costs of a pair."""
    row = problem.spans + pair.row * SPAN
    col = problem.spans + pair.col * SPAN
    i = tl.load(row + SPAN_BEGIN)
    j = tl.load(col + SPAN_BEGIN)
    n = (tl.load(row + SPAN_END) - i).to(tl.int32)
    m = (tl.load(col + SPAN_END) - j).to(tl.int32)
    i -= tl.load(pair.block + ROW_TOKEN)
    j -= tl.load(pair.block + COL_TOKEN)
    ld = tl.load(pair.block + LD)
    at = problem.costs + tl.load(pair.block + COST_OFFSET) + i * ld + j
    return Costs(at, ld, n, m, LOG2E / eps)


@triton.jit
def record(outcome, pair, queue, results, stopped):
    """Write down what became of a pair; an abandoned one keeps its bound.

    A stopped one is no upper bound: it prunes nothing.
    """
    tl.store(results.value + pair.place, outcome.distance)
    if not outcome.abandoned:
        tl.store(results.residual + pair.place, outcome.residual)
        tl.store(results.iterations + pair.place, outcome.iterations)
        if not stopped:
            bits = outcome.distance.to(tl.int32, bitcast=True)  # in the order of floats >= 0
            tl.atomic_min(queue.best + pair.row, bits)
            tl.atomic_min(queue.best + pair.col, bits)


@triton.jit(do_not_specialize=["count", "total", "n_iters", "longest", "prune"])
def solve_kernel(
    problem, count, queue, total, results, longest, reg, tol, n_iters, prune,
    UNIT_IS_NORM: tl.constexpr, SIZE: tl.constexpr, LANES: tl.constexpr,
    APPROXIMATE: tl.constexpr,
):  # fmt: skip
    """Take pairs from the queue until it is empty.

    problem: a Problem of `count` blocks; queue: a Queue of `total` pairs; results: Pairs, values
    the bounds. SIZE: of the tile, 0 for spans that fit none.
    """
    lane = tl.arange(0, BATCH)
    word = queue.words + tl.program_id(0)
    scratch = queue.scratch + tl.program_id(0).to(tl.int64) * 3 * longest
    bounded = total * 0
    abandoned = total * 0
    solved = total * 0
    stopped = total * 0
    step = total * 0 + 1
    at = tl.atomic_add(queue.next, step)
    while at < total:
        there = (lane < step) & (at + lane < total)
        some = find_pair(problem, count, tl.load(queue.order + at + lane, mask=there, other=0))
        bound = tl.load(results.value + some.place, mask=there, other=0.0)
        alive = there & has_scale(problem.group_norm, tl.load(some.block + GROUP))
        alive = can_win(bound, queue.best, some.row, some.col, alive, prune, word)
        bounded += tl.sum((there & ~alive).to(tl.int32), 0)
        # one pair at a time while pairs are solved, many where most are skipped
        step = tl.where(tl.max(alive.to(tl.int32), 0) > 0, 1, BATCH)
        while tl.max(alive.to(tl.int32), 0) > 0:
            chosen = tl.min(tl.where(alive, lane, BATCH), 0)
            alive &= lane != chosen
            pair = find_pair(problem, count, tl.load(queue.order + at + chosen))
            known = tl.load(results.value + pair.place)
            rivals = Rivals(queue.best + pair.row, queue.best + pair.col, prune)
            if beaten(known, rivals):
                bounded += 1
            else:
                eps = reg + 0.0
                if UNIT_IS_NORM:
                    eps *= tl.load(problem.group_norm + tl.load(pair.block + GROUP))
                outcome = solve_pair(
                    costs_of(problem, pair, eps), eps, n_iters, tol, known, rivals, scratch,
                    longest, SIZE, LANES, APPROXIMATE,
                )  # fmt: skip
                record(outcome, pair, queue, results, outcome.iterations >= n_iters)
                abandoned += outcome.abandoned.to(tl.int32)
                solved += (~outcome.abandoned).to(tl.int32)
                stopped += (~outcome.abandoned & (outcome.iterations >= n_iters)).to(tl.int32)
        at = tl.atomic_add(queue.next, step)
    tl.atomic_add(queue.counts, bounded.to(tl.int64))
    tl.atomic_add(queue.counts + 1, abandoned.to(tl.int64))
    tl.atomic_add(queue.counts + 2, solved.to(tl.int64))
    tl.atomic_add(queue.counts + 3, stopped.to(tl.int64))


def tile_for(longest: int) -> Tile:
    """The smallest tile that holds the longest span."""
    return next((tile for tile in TILES if longest <= tile.size), LARGE)


def solve(
    tables: Tables, chunk: Chunk, group_norm: Tensor, costs: Tensor, pairs: Pairs, best: Tensor,
    counts: Tensor, *, reg: float, unit_is_norm: bool, n_iters: int, tol: float, prune: bool,
) -> None:  # fmt: skip
    """Solve the pairs of a chunk whose bounds can still be below the best distance of a span.

    best, counts: see Queue. prune is no compile-time value: the same code with and without, so
    that the results are the same bits.
    """
    total, longest = chunk.pairs.total, tables.longest
    target, tile = target_of(costs.device), tile_for(longest)
    programs = min(total, target.processors * tile.resident)
    queue = Queue(
        order=torch.argsort(pairs.value, stable=True),  # what is solved early prunes the most
        next=torch.zeros(1, dtype=torch.int32, device=costs.device),
        best=best,
        counts=counts,
        words=torch.empty(programs, dtype=torch.int32, device=costs.device),
        scratch=costs.new_empty(3 * longest * programs if tile is LARGE else 0),
    )
    problem = Problem(costs, group_norm, tables.spans, chunk.blocks, chunk.pairs.first)
    solve_kernel[programs,](
        problem, len(chunk.blocks), queue, total, pairs, longest, reg, tol, n_iters, int(prune),
        UNIT_IS_NORM=unit_is_norm, SIZE=tile.size, LANES=tile.lanes,
        APPROXIMATE=target.approximate, num_warps=tile.warps, num_stages=1,
    )  # fmt: skip
