"""One span pair in registers: entropic optimal transport between two uniform measures.

The plan is u_i K_ij v_j with K = 2^(F_i + G_j - C_ij) and all of C, F, G in units of eps * ln 2.
An iteration is multiply-adds over K; F and G absorb log2(u) and log2(v) when those drift, and only
then are exponentials taken again. The plan is scaled so that every row has mass 1 and every column
n / m. The steps are those of csrc/cpu/sinkhorn.cpp.

The tile has three axes, [rows, parts of columns, columns]: Triton puts the last one on the lanes of
a warp and the middle one into registers, so that a sum over a row takes few shuffles.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .sinkhorn_steps import (
    FAR,
    LOG2E,
    TEST_EVERY,
    beaten,
    exp2,
    larger,
    log2,
    next_level,
    tolerance,
)

DRIFT = tl.constexpr(20.0)  # log2 of a scaling beyond which it is absorbed
LOST = tl.constexpr(2000.0)  # and beyond which nothing is left to absorb
HUGE = tl.constexpr(1e30)
LIMIT = tl.constexpr(1e20)


@triton.jit
def load_scaled(at, inside, scale):
    """Costs in units of eps * ln 2, far outside."""
    return tl.where(inside, tl.load(at, mask=inside, other=0.0) * scale, FAR)


@triton.jit
def sum_row(x):
    """[rows, parts, columns] -> [rows]."""
    return tl.sum(tl.sum(x, 1), 1)


@triton.jit
def sum_all(x):
    """[parts, columns] -> scalar."""
    return tl.sum(tl.sum(x, 1), 0)


@triton.jit
def solve_tile(
    cost, ld, n, m, eps, n_iters, tol, bound, best_row, best_col, prune,
    SIZE: tl.constexpr, LANES: tl.constexpr, APPROXIMATE: tl.constexpr,
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
    abandoned = beaten(bound, best_row, best_col, prune)
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
                dual_at = tl.where(it >= dual_at, 2 * dual_at, dual_at)
                # f_i = F_i + log2 u_i and g_j = min_i (C_ij - f_i) = G_j - log2 max_i (K_ij u_i)
                # are feasible at any iteration: their mean is a certified lower bound on W1
                potential = f + log_u
                highest = tl.max(k * u[:, None, None], 0)
                reached = tl.where(
                    is_col, g - log2(tl.where(is_col, highest, 1.0), APPROXIMATE), 0.0
                )
                dual = (tl.sum(potential, 0) / rows + sum_all(reached) / cols) * unit
                bound = larger(bound, tl.where(dual < float("inf"), dual, bound))
                abandoned = beaten(bound, best_row, best_col, prune)
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
