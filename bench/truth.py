"""Float64 truths: the converged sharp transport cost, and the nearest spans by it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from shear_ops import reference


def sharp_cost(cost: Tensor, eps: float, *, tol: float = 1e-7) -> Tensor:
    """<P, C> (B,) of the converged entropic plans between uniform measures, costs (B, n, m).

    Newton's method on the semi-dual, in float64 and the log domain: some 20 steps where Sinkhorn
    takes thousands of iterations, and no code in common with what is judged by it.
    """
    return torch.cat([_newton(part.double(), eps, tol) for part in cost.split(16)])


def _newton(cost: Tensor, eps: float, tol: float) -> Tensor:
    n, m = cost.shape[1:]
    f = cost.new_zeros(cost.shape[:2])
    plan, dual = _plan(cost, f, eps)
    for _ in range(20):  # plain iterations: Newton wants a start that is not far off
        f = f - eps * (n * plan.sum(2)).log()
        plan, dual = _plan(cost, f, eps)
    for _ in range(200):
        missing = 1 / n - plan.sum(2)  # the gradient of the dual
        if bool((missing.abs().sum(1) < tol).all()):
            return (plan * cost).sum((1, 2)) + (f * missing).sum(1)
        curvature = (torch.diag_embed(plan.sum(2)) - m * plan @ plan.mT) / eps
        size = curvature.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
        # f is free up to a constant, and nearly so on groups of tokens that exchange no mass
        curvature += size / n + 1e-12 * size * torch.eye(n, dtype=cost.dtype)
        step, length = torch.linalg.solve(curvature, missing), cost.new_ones(len(cost))
        for _ in range(60):
            plan, risen = _plan(cost, f + length[:, None] * step, eps)
            too_long = risen < dual - 1e-13 * dual.abs()
            if not bool(too_long.any()):
                break
            length = torch.where(too_long, length / 2, length)
        f, dual = f + length[:, None] * step, risen
    raise ArithmeticError(f"Newton's method stopped at {float(missing.abs().sum(1).max()):.1e}")


def _plan(cost: Tensor, f: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The plans with exact columns that potentials f (B, n) give, and the dual values (B,)."""
    n, m = cost.shape[1:]
    scaled = (f[:, :, None] - cost) / eps
    log_sum = scaled.logsumexp(1)
    plan = (scaled - log_sum[:, None]).exp() / m
    return plan, f.mean(1) - eps * (log_sum.mean(1) - math.log(n))


def nearest_distances(
    costs: Tensor, rows: Tensor, columns: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The smallest sharp cost of every row span (R,) and every column span (K,).

    Args:
        costs: (T1, T2) token costs, float64. eps: regularisation in their units.
        rows, columns: (R, n) and (K, m) tokens of the spans.

    A pair is left out only if its lower bound max(R, Q) on W1 exceeds what its row span and its
    column span have found already.
    """
    first = torch.cartesian_prod(torch.arange(len(rows)), torch.arange(len(columns)))
    bound = torch.cat(
        [
            torch.maximum(*reference.bounds(span_costs(costs, rows[p[:, 0]], columns[p[:, 1]])))
            for p in first.split(256)
        ]
    ).view(len(rows), len(columns))
    value = torch.full_like(bound, math.inf)
    lowest = torch.zeros_like(bound, dtype=torch.bool)
    lowest.scatter_(1, bound.argmin(1, keepdim=True), True)
    lowest.scatter_(0, bound.argmin(0, keepdim=True), True)
    _solve(value, lowest, costs, rows, columns, eps)
    of_row, of_column = value.amin(1)[:, None], value.amin(0)[None]
    can_win = ((bound <= of_row) | (bound <= of_column)) & ~lowest
    _solve(value, can_win, costs, rows, columns, eps)
    return value.amin(1), value.amin(0)


def _solve(
    value: Tensor, wanted: Tensor, costs: Tensor, rows: Tensor, columns: Tensor, eps: float
) -> None:
    for p in wanted.nonzero().split(256):
        i, j = p.unbind(1)
        value[i, j] = sharp_cost(span_costs(costs, rows[i], columns[j]), eps)


def span_costs(costs: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Costs (B, n, m) of span pairs from token costs (T1, T2), given tokens (B, n) and (B, m)."""
    return costs[rows[:, :, None], columns[:, None, :]]
