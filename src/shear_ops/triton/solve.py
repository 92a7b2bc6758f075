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
    """

    level: Any
    before: Any
    test_at: Any
    dual_at: Any
    finish_from: Any


@triton.jit
def begin(it):
    """The schedule of a pair before its first iteration, it = 0."""
    never = it.to(tl.float32) + float("inf")
    return Schedule(it, never, it + TEST_EVERY, it + FIRST_CHECK, it + 1)


@triton.jit
def pause_at(schedule, it, n_iters):
    """The iteration at which something is due; after the first one, omega is no longer 1."""
    due = tl.minimum(n_iters, tl.minimum(schedule.dual_at, schedule.test_at))
    return tl.where(it == 0, 1, due)


@triton.jit
def settled(schedule, residual, it, tol):
    """Whether the value is worth a look: its residual is small, and it was not just looked at."""
    return (residual <= tol) & (it >= schedule.finish_from)


@triton.jit
def diverged(residual, drift):
    """Whether nothing is left of the scalings; drift: the largest |log2| of one."""
    return ~((residual < float("inf")) & (drift < LOST))


@triton.jit
def after_updates(schedule, residual, it, lost):
    """Choose the level where that is due; over-relaxed from the start can diverge."""
    level = tl.where(it == 1, 1, schedule.level)
    before = schedule.before
    test_at = schedule.test_at
    if it == test_at:
        test_at += TEST_EVERY
        level = next_level(level, residual / before)
        before = residual
    level = tl.where(lost, 0, level)
    return Schedule(level, before, test_at, schedule.dual_at, schedule.finish_from)


@triton.jit
def after_dual(schedule, it, finish):
    """The next dual value after twice as many iterations; a value again after FINISH_AGAIN."""
    dual_at = tl.where(it >= schedule.dual_at, 2 * schedule.dual_at, schedule.dual_at)
    finish_from = tl.where(finish, it + FINISH_AGAIN, schedule.finish_from)
    return Schedule(schedule.level, schedule.before, schedule.test_at, dual_at, finish_from)


@triton.jit
def omega_of(level):
    """A scaling is updated by y^-omega, y its marginal over the wanted one; level 0 is plain."""
    return 2.0 - tl.exp2(-level.to(tl.float32))


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
def tolerance(tol, entropy, eps, distance):
    """The residual that a value may have: tol, or less.

    The value's error is the plan's error times its entropy term, eps * log(n): where that is large
    against the distance, a residual of tol is not enough.
    """
    scale = TOLERANCE_SHARE * tl.maximum(distance, eps)
    return tl.where(scale < entropy, tol * (scale / entropy), tol)
