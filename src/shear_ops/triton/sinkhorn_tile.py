"""A span pair in registers: an engine of sinkhorn.py.

The plan is u_i K_ij v_j with K = 2^((F_i + G_j - C_ij) / heat), C, F, G in units of eps * ln 2.
An iteration is multiply-adds over K; F and G absorb log2(u) and log2(v) when those drift, and only
then are exponentials taken again. The plan is scaled so that every row has mass 1 and every column
n / m.

The tile has three axes, [rows, parts of columns, columns]: Triton puts the last one on the lanes of
a warp and the middle one into registers, so that a sum over a row takes few shuffles.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .solve import DRIFT, FAR, settled
from .target import exp2, log2

# One sum over the rows tells whether to go on: that of the residual, to which a drifted scaling
# adds HUGE. Divided by at most 128 rows that is still above LIMIT; no residual is, unless a scaling
# drifts as well.
HUGE = tl.constexpr(1e30)
LIMIT = tl.constexpr(1e20)


class Plan(NamedTuple):
    """The plan of a pair: K, F, G, log2(u) and log2(v)."""

    k: Any
    f: Any
    g: Any
    log_u: Any
    log_v: Any


@triton.jit
def sum_row(x):
    """[rows, parts, columns] -> [rows]."""
    return tl.sum(tl.sum(x, 1), 1)


@triton.jit
def sum_all(x):
    """[parts, columns] -> scalar."""
    return tl.sum(tl.sum(x, 1), 0)


@triton.jit
def rows_and_columns(SIZE: tl.constexpr, LANES: tl.constexpr):
    """Indices [rows] and [parts, columns] of a tile."""
    j = tl.arange(0, SIZE // LANES)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    return tl.arange(0, SIZE), j


@triton.jit
def load(costs, SIZE: tl.constexpr, LANES: tl.constexpr):
    """All costs of the pair, far outside."""
    i, j = rows_and_columns(SIZE, LANES)
    inside = (i < costs.n)[:, None, None] & (j < costs.m)[None, :, :]
    at = costs.at + i[:, None, None] * costs.ld + j[None, :, :]
    return tl.where(inside, tl.load(at, mask=inside, other=0.0) * costs.scale, FAR)


@triton.jit
def hard_potentials(costs, c, SIZE: tl.constexpr, LANES: tl.constexpr):
    """F_i = min_j C_ij, G_j = min_i (C_ij - F_i): all K_ij <= 1, a 1 in every row and column."""
    i, j = rows_and_columns(SIZE, LANES)
    f = tl.where(i < costs.n, tl.min(tl.min(c, 1), 1), 0.0)
    g = tl.where(j < costs.m, tl.min(c - f[:, None, None], 0), 0.0)
    return f, g


@triton.jit
def range_of(costs, c, f, SIZE: tl.constexpr, LANES: tl.constexpr):
    """The largest cost less the smallest F."""
    i, j = rows_and_columns(SIZE, LANES)
    inside = (i < costs.n)[:, None, None] & (j < costs.m)[None, :, :]
    highest = tl.max(tl.max(tl.max(tl.where(inside, c, -FAR), 2), 1), 0)
    return highest - tl.min(tl.where(i < costs.n, f, FAR), 0)


@triton.jit
def exponentiate(
    c, f, g, heat, SIZE: tl.constexpr, LANES: tl.constexpr, APPROXIMATE: tl.constexpr
):  # fmt: skip
    """The plan of potentials, u = v = 1."""
    k = exp2(((f[:, None, None] - c) + g[None, :, :]) * (1.0 / heat), APPROXIMATE)
    log_u = tl.zeros((SIZE,), tl.float32)
    log_v = tl.zeros((SIZE // LANES, LANES), tl.float32)
    return Plan(k, f, g, log_u, log_v)


@triton.jit
def absorb(
    costs, plan, lost, heat, next_heat,
    SIZE: tl.constexpr, LANES: tl.constexpr, APPROXIMATE: tl.constexpr,
):  # fmt: skip
    """The plan at the next heat with u = v = 1; if they are lost, of the last potentials."""
    f = plan.f + tl.where(lost, 0.0, heat * plan.log_u)
    g = plan.g + tl.where(lost, 0.0, heat * plan.log_v)
    return exponentiate(load(costs, SIZE, LANES), f, g, next_heat, SIZE, LANES, APPROXIMATE)


@triton.jit
def iterate(
    costs, plan, schedule, omega, it, stop_at, wanted,
    SIZE: tl.constexpr, LANES: tl.constexpr, APPROXIMATE: tl.constexpr,
):  # fmt: skip
    """Update rows and columns up to stop_at, a drifted scaling or a small residual.

    Returns the plan, it, the L1 error of the row marginal before the last update, and the drift.
    """
    i, j = rows_and_columns(SIZE, LANES)
    is_row = i < costs.n
    is_col = j < costs.m
    rows = costs.n.to(tl.float32)
    column = costs.m.to(tl.float32) / rows
    k = plan.k
    log_u = plan.log_u
    log_v = plan.log_v
    u = exp2(log_u, APPROXIMATE)
    v = exp2(log_v, APPROXIMATE)
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
        # huge if a scaling drifted; NaN stays NaN
        signal = tl.abs(y - 1.0) + tl.where(tl.abs(log_u) < DRIFT, 0.0, HUGE)
        signal = tl.sum(signal, 0) / rows
        steady = tl.max(tl.max(tl.abs(log_v), 1), 0) < DRIFT
        wanting = ~settled(schedule, signal, it, wanted)
        go = (it < stop_at) & steady & wanting & (signal < LIMIT)
    residual = tl.sum(tl.abs(y - 1.0), 0) / rows
    drift = tl.max(tl.max(tl.abs(log_v), 1), 0)
    drift = tl.maximum(drift, tl.max(tl.abs(log_u), 0))
    return Plan(k, plan.f, plan.g, log_u, log_v), it, residual, drift


@triton.jit
def dual_sums(
    costs, plan, heat, SIZE: tl.constexpr, LANES: tl.constexpr, APPROXIMATE: tl.constexpr
):  # fmt: skip
    """Sums of feasible potentials.

    f_i = F_i + heat log2 u_i and g_j = min_i (C_ij - f_i) = G_j - heat log2 max_i (K_ij u_i) are
    feasible at any iteration.
    """
    _, j = rows_and_columns(SIZE, LANES)
    is_col = j < costs.m
    u = exp2(plan.log_u, APPROXIMATE)
    highest = tl.max(plan.k * u[:, None, None], 0)
    reached = plan.g - heat * log2(tl.where(is_col, highest, 1.0), APPROXIMATE)
    return tl.sum(plan.f + heat * plan.log_u, 0), sum_all(tl.where(is_col, reached, 0.0))


@triton.jit
def corrected(costs, plan, SIZE: tl.constexpr, LANES: tl.constexpr, APPROXIMATE: tl.constexpr):
    """<P, C> + <f, a - P 1> and |a - P 1|_1, both times n, of the plan with exact columns.

    One plain update of the columns makes them exact. The mass is right, so any constant may be
    taken off f, against cancellation.
    """
    i, j = rows_and_columns(SIZE, LANES)
    is_row = i < costs.n
    is_col = j < costs.m
    row_mass = costs.n.to(tl.float32) / costs.m.to(tl.float32)
    u = exp2(plan.log_u, APPROXIMATE)
    w = tl.sum(plan.k * u[:, None, None], 0)
    w = tl.where(is_col, row_mass / tl.where(is_col, w, 1.0), 0.0)
    c = load(costs, SIZE, LANES)
    spent = tl.where(is_row, u * sum_row((plan.k * w[None, :, :]) * c), 0.0)
    missing = tl.where(is_row, 1.0 - u * sum_row(plan.k * w[None, :, :]), 0.0)
    potential = plan.f + plan.log_u
    shift = tl.sum(tl.where(i == 0, potential, 0.0), 0)
    return tl.sum(spent + missing * (potential - shift), 0), tl.sum(tl.abs(missing), 0)
