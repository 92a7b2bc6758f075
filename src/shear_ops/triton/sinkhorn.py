"""Span pairs: entropic optimal transport between two uniform measures, best bound first.

The plan is u_i K_ij v_j with K = 2^(F_i + G_j - C_ij) and all of C, F, G in units of eps * ln 2. K
stays in registers. An iteration is multiply-adds over it; F and G absorb log2(u) and log2(v) when
those drift, and only then are exponentials taken again. The plan is scaled so that every row has
mass 1 and every column n / m. The steps are those of csrc/cpu/sinkhorn.cpp.

The tile has three axes, [rows, parts of columns, columns]: Triton puts the last one on the lanes of
a warp and the middle one into registers, so that a sum over a row takes few shuffles.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .nearest import Pairs
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

FAR = tl.constexpr(1e30)  # cost of padding
DRIFT = tl.constexpr(20.0)  # log2 of a scaling beyond which it is absorbed
LOST = tl.constexpr(2000.0)  # and beyond which nothing is left to absorb
HUGE = tl.constexpr(1e30)
LIMIT = tl.constexpr(1e20)
TEST_EVERY = tl.constexpr(4)  # iterations from one choice of omega to the next
TOP_LEVEL = tl.constexpr(5)  # a scaling is updated by y^-omega, omega = 2 - 2^-level
LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)
BATCH = 32  # pairs of the queue that are looked at together where most are skipped


class Tile(NamedTuple):
    """Shape of a program: a tile of size x size, `lanes` columns of it on the lanes of a warp."""

    size: int
    lanes: int
    warps: int
    resident: int  # programs that a processor holds


TILES = (Tile(32, 8, 1, 16), Tile(64, 16, 2, 6), Tile(128, 16, 4, 2))


@triton.jit
def exp2(x, APPROXIMATE: tl.constexpr):
    if APPROXIMATE:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.exp2(x)


@triton.jit
def log2(x, APPROXIMATE: tl.constexpr):
    if APPROXIMATE:
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.log2(x)


@triton.jit
def larger(bound, value):
    """The larger of both, the bound if the value is not a number."""
    return tl.where(bound < value, value, bound)


@triton.jit
def next_level(level, ratio):
    """Young's theory of over-relaxation: from the rate at which the residual fell over TEST_EVERY
    iterations follow the rate of plain updates and the best omega. A residual that grew much asks for
    a smaller one; a little is the oscillation of over-relaxed updates.
    """
    over = 1.0 - tl.exp2(-level.to(tl.float32))  # omega - 1
    fall = tl.sqrt(tl.sqrt(ratio))  # per iteration
    rate = tl.maximum(fall, over)
    plain = (rate + over) * (rate + over) / (rate * (1.0 + over) * (1.0 + over))
    best = 2.0 / (1.0 + tl.sqrt(tl.where(plain < 1.0, 1.0 - plain, 0.0)))
    reached = level * 0
    for k in tl.static_range(TOP_LEVEL):  # omega of level k + 1
        fits = (reached == k) & (k <= level) & (2.0 - 0.5 ** (k + 1) <= best)
        reached = tl.where(fits, k + 1, reached)
    kept = tl.where(ratio < 1.0, reached, level)
    return tl.where(ratio < 1.5, kept, tl.maximum(level - 1, 0))


@triton.jit
def tolerance(tol, distance, eps, most):
    """The value's error is the plan's error times its entropy term, eps * log(n): where that is large
    against the distance, a residual of tol is not enough.
    """
    entropy = eps * LN2 * tl.log2(most)
    scale = 0.2 * tl.maximum(distance, eps)
    return tl.where(scale < entropy, tol * (scale / entropy), tol)


@triton.jit
def beaten(bound, best_row, best_col, PRUNE: tl.constexpr):
    """Strictly above both minima: ties are computed, so that the result never depends on the order of
    the pairs.
    """
    if PRUNE:
        of_row = tl.load(best_row, volatile=True)
        of_col = tl.load(best_col, volatile=True)
        return (bound > of_row) & (bound > of_col)
    else:
        return bound < -float("inf")


@triton.jit
def load_scaled(at, inside, scale):
    return tl.where(inside, tl.load(at, mask=inside, other=0.0) * scale, FAR)


@triton.jit
def sum_row(x):
    return tl.sum(tl.sum(x, 1), 1)


@triton.jit
def sum_all(x):
    return tl.sum(tl.sum(x, 1), 0)


@triton.jit
def solve_pair(
    cost, ld, n, m, eps, n_iters, tol, bound, best_row, best_col,
    SIZE: tl.constexpr, LANES: tl.constexpr, PRUNE: tl.constexpr, APPROXIMATE: tl.constexpr,
):  # fmt: skip
    """Return span distance (or the bound that was beaten), residual, iterations, abandoned."""
    i = tl.arange(0, SIZE)
    j = tl.arange(0, SIZE // LANES)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    is_row = i < n
    is_col = j < m
    inside = is_row[:, None, None] & is_col[None, :, :]
    at = cost + i[:, None, None] * ld + j[None, :, :]
    rows = n.to(tl.float32)
    cols = m.to(tl.float32)
    scale = LOG2E / eps
    unit = eps / LOG2E
    row_mass = rows / cols
    column = cols / rows

    # hard potentials F_i = min_j C_ij, G_j = min_i (C_ij - F_i): every K_ij <= 1 with a 1 in every
    # row and column; their dual value is a bound
    c = load_scaled(at, inside, scale)
    f = tl.where(is_row, tl.min(tl.min(c, 1), 1), 0.0)
    g = tl.where(is_col, tl.min(c - f[:, None, None], 0), 0.0)
    bound = larger(bound, (tl.sum(f, 0) / rows + sum_all(g) / cols) * unit)
    abandoned = beaten(bound, best_row, best_col, PRUNE)
    done = abandoned
    distance = bound
    error = bound * 0.0
    it = n * 0
    if not done:
        k = exp2((f[:, None, None] - c) + g[None, :, :], APPROXIMATE)
        log_u = tl.zeros((SIZE,), tl.float32)
        log_v = tl.zeros((SIZE // LANES, LANES), tl.float32)
        u = log_u + 1.0
        v = log_v + 1.0
        level = n * 0
        before = error + float("inf")
        residual = error
        dual_at = it + 4
        test_at = it + TEST_EVERY
        finish_from = it + 1
        while not done:
            stop_at = tl.minimum(n_iters, tl.minimum(dual_at, test_at))
            stop_at = tl.where(it == 0, 1, stop_at)  # over-relaxed from the start can diverge
            omega = 2.0 - tl.exp2(-level.to(tl.float32))
            y = u
            go = it < stop_at
            while go:
                y = tl.where(is_row, u * sum_row(k * v[None, :, :]), 1.0)
                log_u -= omega * log2(y, APPROXIMATE)
                u = exp2(log_u, APPROXIMATE)
                z = tl.where(is_col, v * tl.sum(k * u[:, None, None], 0) * column, 1.0)
                log_v -= omega * log2(z, APPROXIMATE)
                v = exp2(log_v, APPROXIMATE)
                it += 1
                # one sum over the rows tells it all: a drifted scaling makes it huge, NaN stays NaN
                signal = tl.abs(y - 1.0) + tl.where(tl.abs(log_u) < DRIFT, 0.0, HUGE)
                signal = tl.sum(signal, 0) / rows
                steady = tl.max(tl.max(tl.abs(log_v), 1), 0) < DRIFT
                wanting = (signal > tol) | (it < finish_from)
                go = (it < stop_at) & steady & wanting & (signal < LIMIT)
            residual = tl.sum(tl.abs(y - 1.0), 0) / rows
            drift = tl.max(tl.max(tl.abs(log_v), 1), 0)
            drift = tl.maximum(drift, tl.max(tl.abs(log_u), 0))
            last = it >= n_iters
            level = tl.where(it == 1, 1, level)
            if it == test_at:
                test_at += TEST_EVERY
                level = next_level(level, residual / before)
                before = residual
            lost = ~((residual < float("inf")) & (drift < LOST))
            level = tl.where(lost, 0, level)  # diverged: back to the last absorbed potentials
            if lost | (drift >= DRIFT):
                f += tl.where(lost, 0.0, log_u)
                g += tl.where(lost, 0.0, log_v)
                log_u = tl.zeros((SIZE,), tl.float32)
                log_v = tl.zeros((SIZE // LANES, LANES), tl.float32)
                u = log_u + 1.0
                v = log_v + 1.0
                c = load_scaled(at, inside, scale)
                k = exp2((f[:, None, None] - c) + g[None, :, :], APPROXIMATE)
            finish = last | ((residual <= tol) & (it >= finish_from))
            if finish | (it >= dual_at):
                dual_at *= 2
                # f_i = F_i + log2 u_i and g_j = min_i (C_ij - f_i) = G_j - log2 max_i (K_ij u_i) are
                # feasible at any iteration: their mean is a certified lower bound on W1
                potential = f + log_u
                highest = tl.max(k * u[:, None, None], 0)
                reached = tl.where(is_col, g - log2(tl.where(is_col, highest, 1.0), APPROXIMATE), 0.0)
                dual = (tl.sum(potential, 0) / rows + sum_all(reached) / cols) * unit
                bound = larger(bound, tl.where(dual < float("inf"), dual, bound))
                abandoned = beaten(bound, best_row, best_col, PRUNE)
                done = abandoned
                distance = bound
                if finish & ~abandoned:
                    # one plain column update makes the columns exact; then <P, C> + <f, a - P 1>.
                    # The mass is right, so any constant may be taken off f, against cancellation
                    w = tl.sum(k * u[:, None, None], 0)
                    w = tl.where(is_col, row_mass / tl.where(is_col, w, 1.0), 0.0)
                    c = load_scaled(at, inside, scale)
                    missing = tl.where(is_row, 1.0 - u * sum_row(k * w[None, :, :]), 0.0)
                    spent = tl.where(is_row, u * sum_row((k * w[None, :, :]) * c), 0.0)
                    shift = tl.sum(tl.where(i == 0, potential, 0.0), 0)
                    value = tl.sum(spent + missing * (potential - shift), 0) / rows * unit
                    error = tl.sum(tl.abs(missing), 0) / rows
                    distance = larger(bound, value)
                    most = tl.maximum(rows, cols)
                    done = last | (error <= tolerance(tol, distance, eps, most))
                    finish_from = it + 4
    error = tl.where(abandoned, 0.0, error)
    return distance, error, it, abandoned


@triton.jit(do_not_specialize=["count", "total", "n_iters"])
def solve_kernel(
    costs, spans, group_norm, blocks, pair_first, count, order, total, queue, counts, best,
    values, residuals, iterations, reg, tol, n_iters,
    UNIT_IS_NORM: tl.constexpr, PRUNE: tl.constexpr, SIZE: tl.constexpr, LANES: tl.constexpr,
    B: tl.constexpr, APPROXIMATE: tl.constexpr,
):  # fmt: skip
    """Take pairs from the queue until it is empty.

    counts: bounded away, abandoned, solved, stopped at n_iters.
    """
    lane = tl.arange(0, B)
    bounded = total * 0
    left = total * 0
    solved = total * 0
    stopped = total * 0
    step = total * 0 + 1
    at = tl.atomic_add(queue, step)
    while at < total:
        slot = at + lane
        there = (lane < step) & (slot < total)
        if PRUNE:
            pair = tl.load(order + slot, mask=there, other=0)
        else:
            pair = slot.to(tl.int64)
        b = find(pair_first, count, pair)
        local = pair - tl.load(pair_first + b)
        col_spans = tl.load(blocks + b * BLOCK + COL_SPANS)
        row = tl.load(blocks + b * BLOCK + ROW_SPAN) + local // col_spans
        col = tl.load(blocks + b * BLOCK + COL_SPAN) + local % col_spans
        place = tl.load(blocks + b * BLOCK + PAIR_OFFSET) + local
        bound = tl.load(values + place, mask=there, other=0.0)
        alive = there & has_scale(group_norm, tl.load(blocks + b * BLOCK + GROUP))
        alive &= ~beaten_many(bound, best, row, col, alive, PRUNE)
        bounded += tl.sum((there & ~alive).to(tl.int32), 0)
        # one pair at a time while pairs are solved, many where most are skipped
        step = tl.where(tl.max(alive.to(tl.int32), 0) > 0, 1, B)
        while tl.max(alive.to(tl.int32), 0) > 0:
            next_one = tl.min(tl.where(alive, lane, B), 0)
            chosen = lane == next_one
            alive &= ~chosen
            own = blocks + tl.sum(tl.where(chosen, b, 0), 0) * BLOCK
            p = tl.sum(tl.where(chosen, place, 0), 0)
            r = tl.sum(tl.where(chosen, row, 0), 0)
            s = tl.sum(tl.where(chosen, col, 0), 0)
            known = tl.load(values + p)
            if beaten(known, best + r, best + s, PRUNE):
                bounded += 1
            else:
                i = tl.load(spans + r * SPAN + SPAN_BEGIN)
                j = tl.load(spans + s * SPAN + SPAN_BEGIN)
                n = (tl.load(spans + r * SPAN + SPAN_END) - i).to(tl.int32)
                m = (tl.load(spans + s * SPAN + SPAN_END) - j).to(tl.int32)
                i -= tl.load(own + ROW_TOKEN)
                j -= tl.load(own + COL_TOKEN)
                ld = tl.load(own + LD)
                eps = reg * tl.load(group_norm + tl.load(own + GROUP)) if UNIT_IS_NORM else reg + 0.0
                distance, error, it, abandoned = solve_pair(
                    costs + tl.load(own + COST_OFFSET) + i * ld + j, ld, n, m, eps, n_iters, tol,
                    known, best + r, best + s, SIZE, LANES, PRUNE, APPROXIMATE,
                )  # fmt: skip
                tl.store(values + p, distance)
                if abandoned:
                    left += 1
                else:
                    solved += 1
                    stopped += (it >= n_iters).to(tl.int32)
                    tl.store(residuals + p, error)
                    tl.store(iterations + p, it)
                    if PRUNE:
                        tl.atomic_min(best + r, distance)
                        tl.atomic_min(best + s, distance)
        at = tl.atomic_add(queue, step)
    tl.atomic_add(counts, bounded.to(tl.int64))
    tl.atomic_add(counts + 1, left.to(tl.int64))
    tl.atomic_add(counts + 2, solved.to(tl.int64))
    tl.atomic_add(counts + 3, stopped.to(tl.int64))


@triton.jit
def beaten_many(bound, best, row, col, some, PRUNE: tl.constexpr):
    """The test of beaten for a vector of pairs."""
    if PRUNE:
        of_row = tl.load(best + row, mask=some, other=0.0, volatile=True)
        of_col = tl.load(best + col, mask=some, other=0.0, volatile=True)
        return (bound > of_row) & (bound > of_col)
    else:
        return bound < -float("inf")


def tile_for(longest: int) -> Tile | None:
    """The smallest tile that holds the longest span; None if none does."""
    return next((tile for tile in TILES if longest <= tile.size), None)


def solve(
    tables: Tables, chunk: Chunk, group_norm: Tensor, costs: Tensor, pairs: Pairs, best: Tensor,
    counts: Tensor, *, reg: float, unit_is_norm: bool, n_iters: int, tol: float, prune: bool,
) -> None:  # fmt: skip
    """Solve the pairs of a chunk whose bounds can still be below the best distance of a span.

    best: (spans,) smallest distances so far. counts: (4,), see solve_kernel.
    """
    total = chunk.pairs.total
    target, tile = target_of(costs.device), tile_for(tables.longest)
    queue = torch.zeros(1, dtype=torch.int32, device=costs.device)
    # best first: what is solved early prunes the most
    order = torch.argsort(pairs.value[:total], stable=True) if prune else queue
    programs = min(total, target.processors * tile.resident)
    solve_kernel[programs,](
        costs, tables.spans, group_norm, chunk.blocks, chunk.pairs.first, len(chunk.blocks), order,
        total, queue, counts, best, *pairs, reg, tol, n_iters,
        UNIT_IS_NORM=unit_is_norm, PRUNE=prune, SIZE=tile.size, LANES=tile.lanes, B=BATCH,
        APPROXIMATE=target.approximate, num_warps=tile.warps, num_stages=1,
    )  # fmt: skip
