"""The queue of span pairs: best bound first, each solved unless its bound says it cannot win."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .nearest import Pairs
from .sinkhorn_large import solve_large
from .sinkhorn_steps import beaten
from .sinkhorn_tile import solve_tile
from .tables import Chunk, Tables
from .target import target_of
from .tasks import (
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
    find,
    has_scale,
)

BATCH = tl.constexpr(32)  # pairs of the queue that are looked at together where most are skipped


class Tile(NamedTuple):
    """Shape of a program: a tile of size x size, `lanes` columns of it on the lanes of a warp."""

    size: int
    lanes: int
    warps: int
    resident: int  # programs that a processor holds


TILES = (Tile(32, 8, 1, 16), Tile(64, 16, 2, 6), Tile(128, 16, 4, 2))
LARGE = Tile(0, 0, 8, 3)  # no tile: costs are read again in every iteration


@triton.jit
def can_win(bound, best, row, col, some, prune, word):
    """The test of beaten for a vector of at most 32 pairs.

    Every warp loads for itself: what one thread found is passed to all through memory.
    """
    of_row = tl.load(best + row, mask=some, other=0, volatile=True).to(tl.float32, bitcast=True)
    of_col = tl.load(best + col, mask=some, other=0, volatile=True).to(tl.float32, bitcast=True)
    alive = some & ~((prune != 0) & (bound > of_row) & (bound > of_col))
    lane = tl.arange(0, BATCH)
    tl.atomic_xchg(word, tl.sum(alive.to(tl.int32) << lane, 0))
    return (tl.atomic_add(word, 0) >> lane) & 1 != 0


@triton.jit(do_not_specialize=["count", "total", "n_iters", "longest", "prune"])
def solve_kernel(
    costs, spans, group_norm, blocks, pair_first, count, order, total, queue, counts, best,
    values, residuals, iterations, words, scratch, longest, reg, tol, n_iters, prune,
    UNIT_IS_NORM: tl.constexpr, SIZE: tl.constexpr, LANES: tl.constexpr,
    APPROXIMATE: tl.constexpr,
):  # fmt: skip
    """Take pairs from the queue until it is empty. SIZE: of the tile, 0 for spans that fit none.

    counts: bounded away, abandoned, solved, stopped at n_iters.
    """
    lane = tl.arange(0, BATCH)
    bounded = total * 0
    left = total * 0
    solved = total * 0
    stopped = total * 0
    step = total * 0 + 1
    at = tl.atomic_add(queue, step)
    while at < total:
        slot = at + lane
        there = (lane < step) & (slot < total)
        pair = tl.load(order + slot, mask=there, other=0)
        b = find(pair_first, count, pair)
        local = pair - tl.load(pair_first + b)
        col_spans = tl.load(blocks + b * BLOCK + COL_SPANS)
        row = tl.load(blocks + b * BLOCK + ROW_SPAN) + local // col_spans
        col = tl.load(blocks + b * BLOCK + COL_SPAN) + local % col_spans
        place = tl.load(blocks + b * BLOCK + PAIR_OFFSET) + local
        bound = tl.load(values + place, mask=there, other=0.0)
        alive = there & has_scale(group_norm, tl.load(blocks + b * BLOCK + GROUP))
        alive = can_win(bound, best, row, col, alive, prune, words + tl.program_id(0))
        bounded += tl.sum((there & ~alive).to(tl.int32), 0)
        # one pair at a time while pairs are solved, many where most are skipped
        step = tl.where(tl.max(alive.to(tl.int32), 0) > 0, 1, BATCH)
        while tl.max(alive.to(tl.int32), 0) > 0:
            next_one = tl.min(tl.where(alive, lane, BATCH), 0)
            chosen = lane == next_one
            alive &= ~chosen
            own = blocks + tl.sum(tl.where(chosen, b, 0), 0) * BLOCK
            p = tl.sum(tl.where(chosen, place, 0), 0)
            r = tl.sum(tl.where(chosen, row, 0), 0)
            s = tl.sum(tl.where(chosen, col, 0), 0)
            known = tl.load(values + p)
            if beaten(known, best + r, best + s, prune):
                bounded += 1
            else:
                i = tl.load(spans + r * SPAN + SPAN_BEGIN)
                j = tl.load(spans + s * SPAN + SPAN_BEGIN)
                n = (tl.load(spans + r * SPAN + SPAN_END) - i).to(tl.int32)
                m = (tl.load(spans + s * SPAN + SPAN_END) - j).to(tl.int32)
                i -= tl.load(own + ROW_TOKEN)
                j -= tl.load(own + COL_TOKEN)
                ld = tl.load(own + LD)
                eps = (
                    reg * tl.load(group_norm + tl.load(own + GROUP)) if UNIT_IS_NORM else reg + 0.0
                )
                cost = costs + tl.load(own + COST_OFFSET) + i * ld + j
                if SIZE > 0:
                    distance, error, it, abandoned = solve_tile(
                        cost, ld, n, m, eps, n_iters, tol, known, best + r, best + s, prune,
                        SIZE, LANES, APPROXIMATE,
                    )  # fmt: skip
                else:
                    distance, error, it, abandoned = solve_large(
                        cost, ld, n, m, eps, n_iters, tol, known, best + r, best + s, prune,
                        scratch + tl.program_id(0).to(tl.int64) * 3 * longest, longest,
                        APPROXIMATE,
                    )  # fmt: skip
                tl.store(values + p, distance)
                if abandoned:
                    left += 1
                else:
                    solved += 1
                    stopped += (it >= n_iters).to(tl.int32)
                    tl.store(residuals + p, error)
                    tl.store(iterations + p, it)
                    bits = distance.to(tl.int32, bitcast=True)  # in the order of floats >= 0
                    tl.atomic_min(best + r, bits)
                    tl.atomic_min(best + s, bits)
        at = tl.atomic_add(queue, step)
    tl.atomic_add(counts, bounded.to(tl.int64))
    tl.atomic_add(counts + 1, left.to(tl.int64))
    tl.atomic_add(counts + 2, solved.to(tl.int64))
    tl.atomic_add(counts + 3, stopped.to(tl.int64))


def tile_for(longest: int) -> Tile:
    """The smallest tile that holds the longest span."""
    return next((tile for tile in TILES if longest <= tile.size), LARGE)


def solve(
    tables: Tables, chunk: Chunk, group_norm: Tensor, costs: Tensor, pairs: Pairs, best: Tensor,
    counts: Tensor, *, reg: float, unit_is_norm: bool, n_iters: int, tol: float, prune: bool,
) -> None:  # fmt: skip
    """Solve the pairs of a chunk whose bounds can still be below the best distance of a span.

    best: (spans,) int32, float bits of the smallest distances so far. counts: (4,), see
    solve_kernel. prune is no compile-time value: the same code with and without, so that the
    results are the same bits.
    """
    total, longest = chunk.pairs.total, tables.longest
    target, tile = target_of(costs.device), tile_for(longest)
    queue = torch.zeros(1, dtype=torch.int32, device=costs.device)
    # best first: what is solved early prunes the most
    order = torch.argsort(pairs.value, stable=True)
    programs = min(total, target.processors * tile.resident)
    words = torch.empty(programs, dtype=torch.int32, device=costs.device)
    scratch = costs.new_empty(3 * longest * programs if tile is LARGE else 0)
    solve_kernel[programs,](
        costs, tables.spans, group_norm, chunk.blocks, chunk.pairs.first, len(chunk.blocks), order,
        total, queue, counts, best, *pairs, words, scratch, longest, reg, tol, n_iters, int(prune),
        UNIT_IS_NORM=unit_is_norm, SIZE=tile.size, LANES=tile.lanes,
        APPROXIMATE=target.approximate, num_warps=tile.warps, num_stages=1,
    )  # fmt: skip
