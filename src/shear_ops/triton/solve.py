"""How a span pair is solved: which omega, where to pause for what, when the pair is done.

The rule and the constants of csrc/solve.h, for both engines: sinkhorn.py follows it with a pair in
registers (sinkhorn_tile.py) or in memory (sinkhorn_large.py). docs/method.md derives it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .. import _C


def _constant(name: str) -> Any:
    return tl.constexpr(_C.SOLVER[name])


FAR = _constant("far")  # cost of padding
LOG2E = _constant("log2e")
LN2 = tl.constexpr(1 / _C.SOLVER["log2e"])
TOP_LEVEL = _constant("top_level")
TEST_EVERY = _constant("test_every")  # iterations from one choice of the level to the next
RETREAT_RATIO = _constant("retreat_ratio")  # growth of the residual that asks for a lower level
FIRST_CHECK = _constant("first_check")  # iterations before the first dual value; then twice as many
FINISH_AGAIN = _constant("finish_again")  # iterations after a value that was not accurate enough
TOLERANCE_SHARE = _constant("tolerance_share")
ENTROPY_OFFSET = _constant("entropy_offset")
HOT_RANGE = _constant("hot_range")  # of costs, in units of eps ln 2, beyond which a pair is heated
COOLING = _constant("cooling")  # from one heat to the next
FEW_TOKENS = _constant("few_tokens")
FEW_TRAVEL = _constant("few_travel")  # of potentials between so few tokens, in entropy terms
LEAST_RESIDUAL = _constant("least_residual")  # that is asked for at a heat
FRESH = _constant("fresh")  # level before the first iteration at a heat
DRIFT = tl.constexpr(float(_C.SOLVER["drift_bits"]))  # log2 of a scaling that is absorbed
# Logarithms of float32 stay below 150, and an update moves that of a scaling by less than twice as
# much, from below DRIFT: what is beyond this is Inf or NaN, and nothing is left to absorb.
LOST = tl.constexpr(2000.0)


class Costs(NamedTuple):
    """The n x m costs of a pair: C_ij = at[i ld + j] scale, in units of eps * ln 2."""

    at: Any
    ld: Any
    n: Any
    m: Any
    scale: Any


class Schedule(NamedTuple):
    """What happens at which iteration.

    Attributes:
        level: of omega.
        before: residual when the level was last chosen.
        test_at: when it is chosen next.
        dual_at: when the next dual value is due.
        finish_from: when the pair can be done at the earliest.
        heat: the plan is at eps times this.
    """

    level: Any
    before: Any
    test_at: Any
    dual_at: Any
    finish_from: Any
    heat: Any


@triton.jit
def begin(it, heat):
    """The schedule of a pair before its first iteration, it = 0."""
    never = it.to(tl.float32) + float("inf")
    return Schedule(it + FRESH, never, it + TEST_EVERY, it + FIRST_CHECK, it + 1, heat)


@triton.jit
def first_heat(costs_range):
    """The heat at which a pair is begun: 1, or a power of COOLING where costs range far."""
    heat = costs_range * 0.0 + 1.0
    while heat * HOT_RANGE < costs_range:
        heat *= COOLING
    return heat


@triton.jit
def pause_at(schedule, it, n_iters):
    """The iteration at which something is due; after the first one, omega is no longer 1."""
    due = tl.minimum(n_iters, tl.minimum(schedule.dual_at, schedule.test_at))
    return tl.where(schedule.level == FRESH, it + 1, due)


@triton.jit
def residual_at_heat(schedule, tol, entropy, eps, bound):
    """The residual that ends the iterations at this heat: above 1, good enough for the next one."""
    hot = tolerance(tol, schedule.heat / COOLING * entropy, eps, bound)
    return tl.where(schedule.heat > 1.0, tl.maximum(hot, LEAST_RESIDUAL), tol)


@triton.jit
def settled(schedule, residual, it, wanted):
    """Whether a plan is worth a look: its residual is small, and it was not just looked at."""
    return (residual <= wanted) & ((it >= schedule.finish_from) | (schedule.heat > 1.0))


@triton.jit
def diverged(residual, drift):
    """Whether nothing is left of the scalings; drift: the largest |log2| of one."""
    return ~((residual < float("inf")) & (drift < LOST))


@triton.jit
def after_updates(schedule, residual, it, lost):
    """Choose the level where that is due; over-relaxed from the start can diverge."""
    level = tl.where(schedule.level == FRESH, 1, schedule.level)
    before = schedule.before
    test_at = schedule.test_at
    if it == test_at:
        test_at += TEST_EVERY
        level = next_level(level, residual / before)
        before = residual
    level = tl.where(lost, 0, level)
    return Schedule(level, before, test_at, schedule.dual_at, schedule.finish_from, schedule.heat)


@triton.jit
def cooled(schedule, last):
    """The schedule at the next heat, or at 1 if there are no iterations left."""
    never = schedule.before * 0.0 + float("inf")
    heat = tl.where(last, 1.0, schedule.heat / COOLING)
    return Schedule(
        schedule.level * 0 + FRESH, never, schedule.test_at, schedule.dual_at,
        schedule.finish_from, heat,
    )  # fmt: skip


@triton.jit
def after_dual(schedule, it, finish):
    """The next dual value after twice as many iterations; a value again after FINISH_AGAIN."""
    dual_at = tl.where(it >= schedule.dual_at, 2 * schedule.dual_at, schedule.dual_at)
    finish_from = tl.where(finish, it + FINISH_AGAIN, schedule.finish_from)
    return Schedule(
        schedule.level, schedule.before, schedule.test_at, dual_at, finish_from, schedule.heat
    )


@triton.jit
def omega_of(level):
    """A scaling is updated by y^-omega, y its marginal over the wanted one; level 0 is plain."""
    return 2.0 - tl.exp2(-tl.maximum(level, 0).to(tl.float32))


@triton.jit
def next_level(level, ratio):
    """The level of omega, by Young's theory of over-relaxation.

    From the ratio by which the residual fell over TEST_EVERY iterations follow the rate of plain
    updates and the best omega. A residual that grew much asks for a smaller one; a little is the
    oscillation of over-relaxed updates.
    """
    tl.static_assert(TEST_EVERY == 4, "the fourth root below")
    over = omega_of(level) - 1.0
    fall = tl.sqrt(tl.sqrt(ratio))  # per iteration
    rate = tl.maximum(fall, over)
    plain = (rate + over) * (rate + over) / (rate * (1.0 + over) * (1.0 + over))
    best = 2.0 / (1.0 + tl.sqrt(tl.where(plain < 1.0, 1.0 - plain, 0.0)))
    reached = level * 0
    for _ in tl.static_range(TOP_LEVEL):
        fits = (reached <= level) & (omega_of(reached + 1) <= best)
        reached += fits.to(tl.int32)
    kept = tl.where(ratio < 1.0, reached, level)
    return tl.where(ratio < RETREAT_RATIO, kept, tl.maximum(level - 1, 0))


@triton.jit
def entropy_term(eps, rows, cols):
    """How far potentials may be off: times the residual, the error of a value."""
    return eps * (ENTROPY_OFFSET + LN2 * tl.log2(tl.maximum(rows, cols)))


@triton.jit
def tolerance(tol, entropy, eps, distance):
    """The residual that a value may have: tol, or less.

    Less where the entropy term is large against the distance.
    """
    scale = TOLERANCE_SHARE * tl.maximum(distance, eps)
    return tl.where(scale < entropy, tol * (scale / entropy), tol)


@triton.jit
def may_hide(n, m, tol):
    """Whether mass that a plan still has to move can be less than a residual of tol shows.

    Groups of whole tokens differ in mass by a multiple of 1 / lcm(n, m), half of the L1 error.
    """
    a = n
    b = m
    while b > 0:
        rest = a % b
        a = b
        b = rest
    return tol * n.to(tl.float32) * (m.to(tl.float32) / a.to(tl.float32)) > 2.0


@triton.jit
def travel(n, m, tol, entropy, eps, heat, costs_range):
    """How far the potentials of a plan at heat 1 may be from their limit; heat: the first one."""
    far = tl.where(heat > 1.0, COOLING * entropy, costs_range * LN2 * eps)
    few = tl.maximum(n, m) <= FEW_TOKENS
    near = tl.where(few, FEW_TRAVEL * entropy, entropy)
    return tl.where(may_hide(n, m, tol), tl.maximum(entropy, far), near)
