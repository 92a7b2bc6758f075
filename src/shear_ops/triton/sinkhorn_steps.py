"""Small steps that both solvers of span pairs take, and their constants; see sinkhorn_tile.py."""

from __future__ import annotations

import triton
import triton.language as tl

FAR = tl.constexpr(1e30)  # cost of padding
TEST_EVERY = tl.constexpr(4)  # iterations from one choice of omega to the next
TOP_LEVEL = tl.constexpr(5)  # a scaling is updated by y^-omega, omega = 2 - 2^-level
LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def exp2(x, APPROXIMATE: tl.constexpr):
    """2^x; APPROXIMATE: by one PTX instruction."""
    if APPROXIMATE:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.exp2(x)


@triton.jit
def log2(x, APPROXIMATE: tl.constexpr):
    """log2(x); APPROXIMATE: by one PTX instruction."""
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
    """The level of omega, by Young's theory of over-relaxation.

    From the rate at which the residual fell over TEST_EVERY iterations follow the rate of plain
    updates and the best omega. A residual that grew much asks for a smaller one; a little is the
    oscillation of over-relaxed updates.
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
    """The residual at which a pair is done: tol, or less.

    The value's error is the plan's error times its entropy term, eps * log(n): where that is large
    against the distance, a residual of tol is not enough.
    """
    entropy = eps * LN2 * tl.log2(most)
    scale = 0.2 * tl.maximum(distance, eps)
    return tl.where(scale < entropy, tol * (scale / entropy), tol)


@triton.jit
def beaten(bound, best_row, best_col, prune):
    """Whether the bound is strictly above both minima (float bits; others lower them meanwhile).

    Ties are computed, so that the result never depends on the order of the pairs. Read by atomics:
    one thread reads for all, where each thread's own load could see another minimum, and the warps
    of a program would go different ways.
    """
    of_row = tl.atomic_add(best_row, 0).to(tl.float32, bitcast=True)
    of_col = tl.atomic_add(best_col, 0).to(tl.float32, bitcast=True)
    return (prune != 0) & (bound > of_row) & (bound > of_col)
