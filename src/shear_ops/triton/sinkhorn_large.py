"""A span pair of any size: an engine of sinkhorn.py, for what does not fit into registers.

Costs are read again in every pass and the potentials absorb every update, so that an iteration
takes two exponentials per entry. Potentials are in memory, of one program each.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .solve import FAR
from .target import exp2, log2

ROWS = tl.constexpr(32)  # of a part, reduced over the columns or the other way round
COLS = tl.constexpr(128)


class Plan(NamedTuple):
    """Where the potentials are: f, g, and g of the plan with exact columns."""

    f: Any
    g: Any
    exact_g: Any


@triton.jit
def part(costs, i, j):
    """Costs [rows, columns] of a part, in units of eps * ln 2; far outside."""
    inside = (i < costs.n)[:, None] & (j < costs.m)[None, :]
    at = costs.at + i[:, None] * costs.ld + j[None, :]
    return tl.where(inside, tl.load(at, mask=inside, other=0.0) * costs.scale, FAR)


@triton.jit
def hard_rows(costs, plan):
    """F_i = min_j C_ij; returns their sum."""
    total = costs.scale * 0.0
    i0 = costs.n * 0
    while i0 < costs.n:
        i = i0 + tl.arange(0, ROWS)
        lowest = tl.full((ROWS,), FAR, tl.float32)
        j0 = costs.m * 0
        while j0 < costs.m:
            c = part(costs, i, j0 + tl.arange(0, COLS))
            lowest = tl.minimum(lowest, tl.min(c, 1))
            j0 += COLS
        tl.store(plan.f + i, lowest, mask=i < costs.n)
        total += tl.sum(tl.where(i < costs.n, lowest, 0.0), 0)
        i0 += ROWS
    tl.debug_barrier()
    return total


@triton.jit
def hard_columns(costs, plan, STORE: tl.constexpr):
    """g_j = min_i (C_ij - f_i), feasible with any f; returns their sum."""
    total = costs.scale * 0.0
    j0 = costs.m * 0
    while j0 < costs.m:
        j = j0 + tl.arange(0, COLS)
        lowest = tl.full((COLS,), FAR, tl.float32)
        i0 = costs.n * 0
        while i0 < costs.n:
            i = i0 + tl.arange(0, ROWS)
            c = part(costs, i, j)
            f = tl.load(plan.f + i, mask=i < costs.n, other=0.0)
            lowest = tl.minimum(lowest, tl.min(c - f[:, None], 0))
            i0 += ROWS
        if STORE:
            tl.store(plan.g + j, lowest, mask=j < costs.m)
        total += tl.sum(tl.where(j < costs.m, lowest, 0.0), 0)
        j0 += COLS
    tl.debug_barrier()
    return total


@triton.jit
def update_rows(costs, plan, omega, heat, APPROXIMATE: tl.constexpr):
    """f -= omega heat log2(row marginal); returns the L1 error of the marginal before."""
    total = costs.scale * 0.0
    i0 = costs.n * 0
    while i0 < costs.n:
        i = i0 + tl.arange(0, ROWS)
        f = tl.load(plan.f + i, mask=i < costs.n, other=0.0)
        y = tl.zeros((ROWS,), tl.float32)
        j0 = costs.m * 0
        while j0 < costs.m:
            j = j0 + tl.arange(0, COLS)
            c = part(costs, i, j)
            g = tl.load(plan.g + j, mask=j < costs.m, other=0.0)
            y += tl.sum(exp2(((f[:, None] - c) + g[None, :]) * (1.0 / heat), APPROXIMATE), 1)
            j0 += COLS
        y = tl.where(i < costs.n, y, 1.0)
        tl.store(plan.f + i, f - omega * heat * log2(y, APPROXIMATE), mask=i < costs.n)
        total += tl.sum(tl.abs(y - 1.0), 0)
        i0 += ROWS
    tl.debug_barrier()
    return total


@triton.jit
def update_columns(costs, plan, to, omega, heat, APPROXIMATE: tl.constexpr):
    """to = g - omega heat log2(column marginal over the wanted one)."""
    j0 = costs.m * 0
    while j0 < costs.m:
        j = j0 + tl.arange(0, COLS)
        g = tl.load(plan.g + j, mask=j < costs.m, other=0.0)
        z = tl.zeros((COLS,), tl.float32)
        i0 = costs.n * 0
        while i0 < costs.n:
            i = i0 + tl.arange(0, ROWS)
            c = part(costs, i, j)
            f = tl.load(plan.f + i, mask=i < costs.n, other=0.0)
            z += tl.sum(exp2(((f[:, None] - c) + g[None, :]) * (1.0 / heat), APPROXIMATE), 0)
            i0 += ROWS
        z = tl.where(j < costs.m, z * (costs.m.to(tl.float32) / costs.n.to(tl.float32)), 1.0)
        tl.store(to + j, g - omega * heat * log2(z, APPROXIMATE), mask=j < costs.m)
        j0 += COLS
    tl.debug_barrier()


@triton.jit
def hard_potentials(costs, plan):
    """f_i = min_j C_ij, g_j = min_i (C_ij - f_i); returns their sums."""
    sum_f = hard_rows(costs, plan)
    return sum_f, hard_columns(costs, plan, True)


@triton.jit
def range_of(costs, plan):
    """The largest cost less the smallest F."""
    highest = costs.scale * 0.0 - FAR
    least = costs.scale * 0.0 + FAR
    i0 = costs.n * 0
    while i0 < costs.n:
        i = i0 + tl.arange(0, ROWS)
        f = tl.load(plan.f + i, mask=i < costs.n, other=FAR)
        least = tl.minimum(least, tl.min(f, 0))
        j0 = costs.m * 0
        while j0 < costs.m:
            j = j0 + tl.arange(0, COLS)
            inside = (i < costs.n)[:, None] & (j < costs.m)[None, :]
            c = tl.where(inside, part(costs, i, j), -FAR)
            highest = tl.maximum(highest, tl.max(tl.max(c, 1), 0))
            j0 += COLS
        i0 += ROWS
    return highest - least


@triton.jit
def iterate(costs, plan, omega, heat, it, APPROXIMATE: tl.constexpr):
    """Update rows and columns once; see sinkhorn_tile.py. Nothing drifts."""
    error = update_rows(costs, plan, omega, heat, APPROXIMATE)
    update_columns(costs, plan, plan.g, omega, heat, APPROXIMATE)
    return it + 1, error / costs.n.to(tl.float32), omega * 0.0


@triton.jit
def dual_sums(costs, plan):
    """Sums of the feasible potentials f and min_i (C_ij - f_i)."""
    sum_f = costs.scale * 0.0
    i0 = costs.n * 0
    while i0 < costs.n:
        i = i0 + tl.arange(0, COLS)
        sum_f += tl.sum(tl.load(plan.f + i, mask=i < costs.n, other=0.0), 0)
        i0 += COLS
    return sum_f, hard_columns(costs, plan, False)


@triton.jit
def corrected(costs, plan, APPROXIMATE: tl.constexpr):
    """<P, C> + <f, a - P 1> and |a - P 1|_1, both times n, of the plan with exact columns."""
    update_columns(costs, plan, plan.exact_g, 1.0, 1.0, APPROXIMATE)
    value = costs.scale * 0.0
    error = costs.scale * 0.0
    shift = tl.load(plan.f)  # the mass is right, so any constant may be taken off f
    i0 = costs.n * 0
    while i0 < costs.n:
        i = i0 + tl.arange(0, ROWS)
        f = tl.load(plan.f + i, mask=i < costs.n, other=0.0)
        mass = tl.zeros((ROWS,), tl.float32)
        spent = tl.zeros((ROWS,), tl.float32)
        j0 = costs.m * 0
        while j0 < costs.m:
            j = j0 + tl.arange(0, COLS)
            c = part(costs, i, j)
            g = tl.load(plan.exact_g + j, mask=j < costs.m, other=0.0)
            p = exp2((f[:, None] - c) + g[None, :], APPROXIMATE)
            mass += tl.sum(p, 1)
            spent += tl.sum(p * c, 1)
            j0 += COLS
        missing = tl.where(i < costs.n, 1.0 - mass, 0.0)
        value += tl.sum(tl.where(i < costs.n, spent + missing * (f - shift), 0.0), 0)
        error += tl.sum(tl.abs(missing), 0)
        i0 += ROWS
    tl.debug_barrier()
    return value, error
