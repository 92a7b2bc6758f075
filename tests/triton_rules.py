"""Kernels that do nothing but follow the solver's rules of shear_ops.triton.solve, for test_triton."""

from __future__ import annotations

import triton
import triton.language as tl

from shear_ops.triton import solve


@triton.jit
def next_level_kernel(levels, ratios, out, N: tl.constexpr):
    """next_level of N levels and ratios."""
    i = tl.arange(0, N)
    tl.store(out + i, solve.next_level(tl.load(levels + i), tl.load(ratios + i)))


@triton.jit
def omega_kernel(levels, out, N: tl.constexpr):
    """omega_of N levels."""
    i = tl.arange(0, N)
    tl.store(out + i, solve.omega_of(tl.load(levels + i)))


@triton.jit
def tolerance_kernel(tol, entropies, eps, distances, out, N: tl.constexpr):
    """The tolerance for N entropies and distances."""
    i = tl.arange(0, N)
    allowed = solve.tolerance(tol, tl.load(entropies + i), eps, tl.load(distances + i))
    tl.store(out + i, allowed)


@triton.jit
def travel_kernel(n, m, tol, entropy, eps, costs_range, out):
    heat = solve.first_heat(costs_range)
    at = n + tl.program_id(0), m + tl.program_id(0)
    tl.store(out, solve.travel(at[0], at[1], tol, entropy, eps, heat, costs_range))


@triton.jit
def may_hide_kernel(n, m, tol, out):
    """Whether missing mass can hide, as 0 or 1."""
    tl.store(out, solve.may_hide(n + tl.program_id(0), m + tl.program_id(0), tol).to(tl.int32))


@triton.jit
def first_heat_kernel(costs_range, out):
    """The heat at which a pair is begun."""
    tl.store(out, solve.first_heat(costs_range + 0.0))


@triton.jit
def entropy_kernel(eps, rows, cols, out):
    """The entropy term of a pair of rows x cols costs."""
    tl.store(out, solve.entropy_term(eps, rows + 0.0, cols + 0.0))


@triton.jit
def schedule_kernel(residual, tol, n_iters, out, N: tl.constexpr):
    """Pauses of a pair whose residual stays the same: (N, 3) iteration, dual value due, settled."""
    it = n_iters * 0
    schedule = solve.begin(it, it * 0.0 + 1.0)
    for k in tl.static_range(N):
        it = solve.pause_at(schedule, it, n_iters)
        schedule = solve.after_updates(schedule, residual, it, False)
        settled = solve.settled(schedule, residual, it, tol)
        tl.store(out + 3 * k, it)
        tl.store(out + 3 * k + 1, (it >= schedule.dual_at).to(tl.int32))
        tl.store(out + 3 * k + 2, settled.to(tl.int32))
        schedule = solve.after_dual(schedule, it, settled)
