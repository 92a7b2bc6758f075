"""One span pair of any size: like sinkhorn_tile.py, for what does not fit into registers.

Costs are read again in every pass and the potentials absorb every update, so that an iteration
takes two exponentials per entry. Potentials are in memory, of one program each.
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

ROWS = tl.constexpr(32)  # of a part, reduced over the columns or the other way round
COLS = tl.constexpr(128)


@triton.jit
def part(cost, ld, n, m, scale, i, j):
    """Costs [rows, columns] of a part, in units of eps * ln 2; far outside."""
    inside = (i < n)[:, None] & (j < m)[None, :]
    c = tl.load(cost + i[:, None] * ld + j[None, :], mask=inside, other=0.0) * scale
    return tl.where(inside, c, FAR)


@triton.jit
def hard_rows(cost, ld, n, m, scale, f_at):
    """F_i = min_j C_ij; returns their sum."""
    total = scale * 0.0
    i0 = n * 0
    while i0 < n:
        i = i0 + tl.arange(0, ROWS)
        lowest = tl.full((ROWS,), FAR, tl.float32)
        j0 = m * 0
        while j0 < m:
            c = part(cost, ld, n, m, scale, i, j0 + tl.arange(0, COLS))
            lowest = tl.minimum(lowest, tl.min(c, 1))
            j0 += COLS
        tl.store(f_at + i, lowest, mask=i < n)
        total += tl.sum(tl.where(i < n, lowest, 0.0), 0)
        i0 += ROWS
    tl.debug_barrier()
    return total


@triton.jit
def hard_columns(cost, ld, n, m, scale, f_at, g_at, STORE: tl.constexpr):
    """g_j = min_i (C_ij - f_i), feasible with any f; returns their sum."""
    total = scale * 0.0
    j0 = m * 0
    while j0 < m:
        j = j0 + tl.arange(0, COLS)
        lowest = tl.full((COLS,), FAR, tl.float32)
        i0 = n * 0
        while i0 < n:
            i = i0 + tl.arange(0, ROWS)
            c = part(cost, ld, n, m, scale, i, j)
            f = tl.load(f_at + i, mask=i < n, other=0.0)
            lowest = tl.minimum(lowest, tl.min(c - f[:, None], 0))
            i0 += ROWS
        if STORE:
            tl.store(g_at + j, lowest, mask=j < m)
        total += tl.sum(tl.where(j < m, lowest, 0.0), 0)
        j0 += COLS
    tl.debug_barrier()
    return total


@triton.jit
def update_rows(cost, ld, n, m, scale, f_at, g_at, omega, APPROXIMATE: tl.constexpr):
    """f -= omega log2(row marginal); returns the L1 error of the marginal before."""
    total = scale * 0.0
    i0 = n * 0
    while i0 < n:
        i = i0 + tl.arange(0, ROWS)
        f = tl.load(f_at + i, mask=i < n, other=0.0)
        y = tl.zeros((ROWS,), tl.float32)
        j0 = m * 0
        while j0 < m:
            j = j0 + tl.arange(0, COLS)
            c = part(cost, ld, n, m, scale, i, j)
            g = tl.load(g_at + j, mask=j < m, other=0.0)
            y += tl.sum(exp2((f[:, None] - c) + g[None, :], APPROXIMATE), 1)
            j0 += COLS
        y = tl.where(i < n, y, 1.0)
        tl.store(f_at + i, f - omega * log2(y, APPROXIMATE), mask=i < n)
        total += tl.sum(tl.abs(y - 1.0), 0)
        i0 += ROWS
    tl.debug_barrier()
    return total


@triton.jit
def update_columns(
    cost, ld, n, m, scale, f_at, g_at, to_at, column, omega, APPROXIMATE: tl.constexpr
):
    """to = g - omega log2(column marginal over the wanted one)."""
    j0 = m * 0
    while j0 < m:
        j = j0 + tl.arange(0, COLS)
        g = tl.load(g_at + j, mask=j < m, other=0.0)
        z = tl.zeros((COLS,), tl.float32)
        i0 = n * 0
        while i0 < n:
            i = i0 + tl.arange(0, ROWS)
            c = part(cost, ld, n, m, scale, i, j)
            f = tl.load(f_at + i, mask=i < n, other=0.0)
            z += tl.sum(exp2((f[:, None] - c) + g[None, :], APPROXIMATE), 0)
            i0 += ROWS
        z = tl.where(j < m, z * column, 1.0)
        tl.store(to_at + j, g - omega * log2(z, APPROXIMATE), mask=j < m)
        j0 += COLS
    tl.debug_barrier()


@triton.jit
def corrected(cost, ld, n, m, scale, f_at, g_at, APPROXIMATE: tl.constexpr):
    """<P, C> + <f, a - P 1> and |a - P 1|_1, both times n."""
    value = scale * 0.0
    error = scale * 0.0
    shift = tl.load(f_at)  # the mass is right, so any constant may be taken off f
    i0 = n * 0
    while i0 < n:
        i = i0 + tl.arange(0, ROWS)
        f = tl.load(f_at + i, mask=i < n, other=0.0)
        mass = tl.zeros((ROWS,), tl.float32)
        spent = tl.zeros((ROWS,), tl.float32)
        j0 = m * 0
        while j0 < m:
            j = j0 + tl.arange(0, COLS)
            c = part(cost, ld, n, m, scale, i, j)
            g = tl.load(g_at + j, mask=j < m, other=0.0)
            p = exp2((f[:, None] - c) + g[None, :], APPROXIMATE)
            mass += tl.sum(p, 1)
            spent += tl.sum(p * c, 1)
            j0 += COLS
        missing = tl.where(i < n, 1.0 - mass, 0.0)
        value += tl.sum(tl.where(i < n, spent + missing * (f - shift), 0.0), 0)
        error += tl.sum(tl.abs(missing), 0)
        i0 += ROWS
    tl.debug_barrier()
    return value, error


@triton.jit
def solve_large(
    cost, ld, n, m, eps, n_iters, tol, bound, best_row, best_col, prune, scratch, longest,
    APPROXIMATE: tl.constexpr,
):  # fmt: skip
    """Return span distance (or the bound that was beaten), residual, iterations, abandoned.

    scratch (3, longest): f, g, and g of the plan with exact columns.
    """
    f_at = scratch
    g_at = scratch + longest
    exact_at = scratch + 2 * longest
    rows = n.to(tl.float32)
    cols = m.to(tl.float32)
    scale = LOG2E / eps
    unit = eps / LOG2E
    column = cols / rows
    sum_f = hard_rows(cost, ld, n, m, scale, f_at)
    sum_g = hard_columns(cost, ld, n, m, scale, f_at, g_at, True)
    bound = larger(bound, (sum_f / rows + sum_g / cols) * unit)
    abandoned = beaten(bound, best_row, best_col, prune)
    done = abandoned
    distance = bound
    error = bound * 0.0
    it = n * 0
    level = n * 0
    before = error + float("inf")
    dual_at = it + 4
    test_at = it + TEST_EVERY
    finish_from = it + 1
    while not done:
        omega = 2.0 - tl.exp2(-level.to(tl.float32))
        residual = update_rows(cost, ld, n, m, scale, f_at, g_at, omega, APPROXIMATE) / rows
        update_columns(cost, ld, n, m, scale, f_at, g_at, g_at, column, omega, APPROXIMATE)
        it += 1
        last = it >= n_iters
        level = tl.where(it == 1, 1, level)  # over-relaxed from the start can diverge
        if it == test_at:
            test_at += TEST_EVERY
            level = next_level(level, residual / before)
            before = residual
        lost = ~(residual < float("inf"))
        level = tl.where(lost, 0, level)
        if lost:  # diverged: back to the hard potentials
            sum_f = hard_rows(cost, ld, n, m, scale, f_at)
            sum_g = hard_columns(cost, ld, n, m, scale, f_at, g_at, True)
        finish = last | ((residual <= tol) & (it >= finish_from))
        if finish | (it >= dual_at):
            dual_at = tl.where(it >= dual_at, 2 * dual_at, dual_at)
            sum_f = error * 0.0
            i0 = n * 0
            while i0 < n:
                i = i0 + tl.arange(0, COLS)
                sum_f += tl.sum(tl.load(f_at + i, mask=i < n, other=0.0), 0)
                i0 += COLS
            sum_g = hard_columns(cost, ld, n, m, scale, f_at, g_at, False)
            dual = (sum_f / rows + sum_g / cols) * unit
            bound = larger(bound, tl.where(dual < float("inf"), dual, bound))
            abandoned = beaten(bound, best_row, best_col, prune)
            done = abandoned
            distance = bound
            if finish & ~abandoned:
                update_columns(
                    cost, ld, n, m, scale, f_at, g_at, exact_at, column, 1.0, APPROXIMATE
                )
                value, error = corrected(cost, ld, n, m, scale, f_at, exact_at, APPROXIMATE)
                error = error / rows
                distance = larger(bound, value / rows * unit)
                most = tl.maximum(rows, cols)
                done = last | (error <= tolerance(tol, distance, eps, most))
                finish_from = it + 4
    error = tl.where(abandoned, 0.0, error)
    return distance, error, it, abandoned
