"""One span pair: entropic optimal transport between two uniform measures, as in csrc/solve.h.

Two engines hold its numbers and have the same functions: sinkhorn_tile.py in registers, where K is
kept, and sinkhorn_large.py in memory, for what does not fit there.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from . import sinkhorn_large as large
from . import sinkhorn_tile as tile
from . import solve
from .solve import DRIFT, LOG2E


class Rivals(NamedTuple):
    """The best distances of both spans (float bits, in memory), and whether to give up by them."""

    row: Any
    col: Any
    prune: Any


class Outcome(NamedTuple):
    """Span distance (or the bound that was beaten), residual, iterations, abandoned."""

    distance: Any
    residual: Any
    iterations: Any
    abandoned: Any


@triton.jit
def larger(bound, value):
    """The larger of both, the bound if the value is not a number."""
    return tl.where(bound < value, value, bound)


@triton.jit
def cannot_win(bound, of_row, of_col, prune):
    """Whether a bound is strictly above the best distances of both spans.

    Ties are computed, so that the result never depends on the order of the pairs.
    """
    return (prune != 0) & (bound > of_row) & (bound > of_col)


@triton.jit
def beaten(bound, rivals):
    """Whether the pair cannot win any more; other programs lower the best distances meanwhile.

    Read by atomics: one thread reads for all, where each thread's own load could see another
    minimum, and the warps of a program would go different ways.
    """
    of_row = tl.atomic_add(rivals.row, 0).to(tl.float32, bitcast=True)
    of_col = tl.atomic_add(rivals.col, 0).to(tl.float32, bitcast=True)
    return cannot_win(bound, of_row, of_col, rivals.prune)


@triton.jit
def solve_pair(
    costs, eps, n_iters, tol, bound, rivals, scratch, longest,
    SIZE: tl.constexpr, LANES: tl.constexpr, APPROXIMATE: tl.constexpr,
):  # fmt: skip
    """The Outcome of a pair; bound: what is known of its distance.

    SIZE, LANES: of a tile that holds the pair, or 0. Then scratch (3, longest) is for potentials.
    """
    rows = costs.n.to(tl.float32)
    cols = costs.m.to(tl.float32)
    unit = eps / LOG2E
    if SIZE > 0:
        c = tile.load(costs, SIZE, LANES)
        f, g = tile.hard_potentials(costs, c, SIZE, LANES)
        sum_f = tl.sum(f, 0)
        sum_g = tile.sum_all(g)
        costs_range = tile.range_of(costs, c, f, SIZE, LANES)
    else:
        plan = large.Plan(scratch, scratch + longest, scratch + 2 * longest)
        sum_f, sum_g = large.hard_potentials(costs, plan)
        costs_range = large.range_of(costs, plan)
    bound = larger(bound, (sum_f / rows + sum_g / cols) * unit)
    abandoned = beaten(bound, rivals)
    distance = bound
    error = bound * 0.0
    it = costs.n * 0
    if not abandoned:
        heat = solve.first_heat(costs_range)
        entropy = solve.entropy_term(eps, rows, cols)
        travel = solve.travel(costs.n, costs.m, tol, entropy, eps, heat, costs_range)
        if SIZE > 0:
            plan = tile.exponentiate(c, f, g, heat, SIZE, LANES, APPROXIMATE)
        schedule = solve.begin(it, heat)
        done = abandoned
        while not done:
            omega = solve.omega_of(schedule.level)
            stop_at = solve.pause_at(schedule, it, n_iters)
            wanted = solve.residual_at_heat(schedule, tol, entropy, eps, bound)
            if SIZE > 0:
                plan, it, residual, drift = tile.iterate(
                    costs, plan, schedule, omega, it, stop_at, wanted, SIZE, LANES, APPROXIMATE
                )
            else:
                it, residual, drift = large.iterate(
                    costs, plan, omega, schedule.heat, it, APPROXIMATE
                )
            lost = solve.diverged(residual, drift)
            last = it >= n_iters
            hot = schedule.heat > 1.0
            finish = last | (~hot & solve.settled(schedule, residual, it, wanted))
            cool = hot & (last | (~lost & (residual <= wanted)))
            before = schedule.heat
            schedule = solve.after_updates(schedule, residual, it, lost)
            if cool:
                schedule = solve.cooled(schedule, last)
            if lost | cool | (drift >= DRIFT):
                if SIZE > 0:
                    plan = tile.absorb(
                        costs, plan, lost, before, schedule.heat, SIZE, LANES, APPROXIMATE
                    )
                elif lost:
                    large.hard_potentials(costs, plan)
            if finish | (it >= schedule.dual_at):
                if SIZE > 0:
                    sum_f, sum_g = tile.dual_sums(
                        costs, plan, schedule.heat, SIZE, LANES, APPROXIMATE
                    )
                else:
                    sum_f, sum_g = large.dual_sums(costs, plan)
                dual = (sum_f / rows + sum_g / cols) * unit  # at most W1
                # potentials are rounded in units of eps: no bound where costs range over less
                sharp = (dual < float("inf")) & (costs_range >= 1.0)
                bound = larger(bound, tl.where(sharp, dual, bound))
                abandoned = beaten(bound, rivals)
                done = abandoned
                distance = bound
                if finish & ~abandoned:
                    if SIZE > 0:
                        value, missing = tile.corrected(costs, plan, SIZE, LANES, APPROXIMATE)
                    else:
                        value, missing = large.corrected(costs, plan, APPROXIMATE)
                    # Stopped at a heat, nothing may be left of the plan at 1: all mass is missing,
                    # and a value that is no number has not converged.
                    sound = (missing < 2.0 * rows) & (value < float("inf"))
                    error = tl.where(sound, missing / rows, 2.0)
                    distance = tl.where(sound, larger(bound, value / rows * unit), bound)
                    done = last | (error <= solve.tolerance(tol, travel, eps, distance))
                schedule = solve.after_dual(schedule, it, finish)
    return Outcome(distance, tl.where(abandoned, 0.0, error), it, abandoned)
