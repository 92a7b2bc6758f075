"""The specification of SHEAR (arXiv 2604.23318): its steps as written, in eager float64 PyTorch.

Every backend is judged by this file, so it is meant to be checked line by line: no pruning, no
work shared between overlapping spans, any device, packed layout only.
"""

from __future__ import annotations

import importlib
import math
from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise, product
from typing import Any, NamedTuple

import torch
from torch import Tensor

LEAST_ROLLOUT_NORM = 2.0**-24  # of the group's mean norm, below which it stands for a rollout's
CHECK_EVERY = 10  # iterations of sinkhorn from one look at the residual to the next


class Parameters(NamedTuple):
    """The fields of SpanConfig, with n_iters and tol for a converged result.

    At a residual of 1e-7 values are within 1e-6 relative of their limit. Span pairs that share most
    of their tokens converge sublinearly: 1e-9 would cost them 100 times the iterations.
    """

    span: int = 100
    stride: int = 25
    reg: float = 0.03
    reg_unit: str = "mean_norm"
    n_iters: int = 100_000
    tol: float = 1e-7
    distance: str = "sinkhorn"
    normalization: str = "group"
    pooling: str = "max"
    aggregation: str = "min"
    check_finite: bool = True


class Solution(NamedTuple):
    """Values of some problems in float64, their residuals and iterations, all of one shape."""

    value: Tensor
    residual: Tensor
    iterations: Tensor


class Distances(NamedTuple):
    """The fields of SpanDistances, (K,) each; pairs: all, bounded, abandoned, solved, stopped."""

    distance: Tensor
    nearest: Tensor
    residual: Tensor
    iterations: Tensor
    rollout: Tensor
    begin: Tensor
    end: Tensor
    pairs: tuple[int, int, int, int, int]


def spans(length: int, span: int, stride: int) -> list[tuple[int, int]]:
    """Eq. 2: [begin, end) of every span of a rollout; the last one ends at length."""
    count = 0 if length == 0 else 1 + max(0, math.ceil((length - span) / stride))
    return [(k * stride, min(k * stride + span, length)) for k in range(count)]


def token_cost(x: Tensor, y: Tensor) -> Tensor:
    """Euclidean distances (..., n, m) of states x (..., n, d) and y (..., m, d).

    By direct difference: |x|^2 + |y|^2 - 2xy cancels where tokens are nearly equal, and it is the
    small costs that a minimum picks.
    """
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")


def bounds(cost: Tensor) -> tuple[Tensor, Tensor]:
    """R = mean_i min_j C_ij and Q = mean_j min_i C_ij (B,) of costs (B, n, m): both <= W1."""
    return cost.amin(2).mean(1), cost.amin(1).mean(1)


def dual_value(cost: Tensor, f: Tensor) -> Tensor:
    """A lower bound on W1 (B,): any f (B, n) with its c-transform g_j = min_i (C_ij - f_i)."""
    return f.mean(1) + (cost - f[:, :, None]).amin(1).mean(1)


def sinkhorn(cost: Tensor, reg: float, n_iters: int = 100_000, tol: float = 1e-7) -> Solution:
    """Entropic optimal transport between uniform measures, each problem stopping by itself.

    Args:
        cost: (B, n, m) or (n, m), computed in float64. reg: eps, in units of the cost.
        n_iters: most iterations. tol: largest L1 marginal error at which a problem stops.

    Returns:
        value (B,): sharp cost <P, C> of a plan with exact columns, corrected for the error of its
            rows, <P, C> + <f, a - P 1>, and never below the bounds on W1;
        residual (B,): |a - P 1|_1 of the same plan; iterations (B,) int64. 0-d for a 2-d cost.
    """
    _check_has_data("cost", cost)
    if cost.dim() not in (2, 3) or 0 in cost.shape[-2:]:
        raise ValueError(f"cost must be (B, n, m) or (n, m), got shape {tuple(cost.shape)}")
    if not 0 < reg < math.inf:
        raise ValueError(f"reg must be positive and finite, got {reg}")
    if n_iters < 1:
        raise ValueError(f"n_iters must be at least 1, got {n_iters}")
    cost = cost.double()
    if cost.dim() == 2:
        return Solution(*(t[0] for t in sinkhorn(cost[None], reg, n_iters, tol)))
    if not bool(cost.isfinite().all()):
        raise ValueError("cost must be finite, got NaN or Inf")
    batch, n, m = cost.shape
    value, residual = cost.new_zeros(batch), cost.new_zeros(batch)
    iterations = torch.zeros_like(value, dtype=torch.int64)
    todo = torch.arange(batch, device=cost.device)  # the problems still being solved
    f, g = cost.new_zeros(batch, n), cost.new_zeros(batch, m)
    omega, before = cost.new_ones(batch), cost.new_full((batch,), math.inf)
    for it in range(1, n_iters + 1):
        f = f + _relaxed(_soft_min(cost - g[:, None, :], reg) - f, omega, reg)
        exact_g = _soft_min((cost - f[:, :, None]).mT, reg)  # makes the columns of P exact
        if it == 1 or it % CHECK_EVERY == 0 or it == n_iters:
            plan = ((f[:, :, None] + exact_g[:, None, :] - cost) / reg).exp() / (n * m)
            missing = 1 / n - plan.sum(2)
            error = missing.abs().sum(1)
            corrected = (plan * cost).sum((1, 2)) + (f * missing).sum(1)
            lower = [*bounds(cost), dual_value(cost, cost.amin(2)), dual_value(cost, f)]
            value[todo] = torch.stack([corrected, *lower]).amax(0)
            residual[todo], iterations[todo] = error, it
            left = error > tol
            if not bool(left.any()):
                break
            if it > 1:
                omega = _next_omega(omega, (error / before) ** (1 / CHECK_EVERY))
            before = error
            todo, cost, f, g, exact_g, omega, before = (
                t[left] for t in (todo, cost, f, g, exact_g, omega, before)
            )
        g = g + _relaxed(exact_g - g, omega, reg)
    return Solution(value, residual, iterations)


def _soft_min(cost: Tensor, reg: float) -> Tensor:
    """-eps log mean_j exp(-C_ij / eps), (B, n) of (B, n, m): the plain update of a potential."""
    return -reg * ((cost / -reg).logsumexp(2) - math.log(cost.shape[2]))


def _relaxed(step: Tensor, omega: Tensor, reg: float) -> Tensor:
    """Over-relax the plain step (B, n) of a potential by omega (B,), unless that overshoots.

    A step x eps changes the regularised dual by eps * mean(omega x - exp((omega - 1) x) + exp(-x)),
    never negative for omega = 1. Where it is negative for omega, take 1: the dual always rises.
    """
    x, w = step / reg, omega[:, None]
    gain = (w * x - ((w - 1) * x).expm1() + (-x).expm1()).mean(1)
    return torch.where(gain > 0, omega, 1.0)[:, None] * step  # NaN (inf - inf) counts as negative


def _next_omega(omega: Tensor, rate: Tensor) -> Tensor:
    """Over-relaxation (B,) for problems whose residual fell by rate (B,) an iteration with omega.

    Young's theory, valid near the solution: plain updates would contract by c = (rate + omega -
    1)^2 / (rate omega^2), and 2 / (1 + sqrt(1 - c)) is best. A residual that grew is not near it.
    """
    rate_at_best = torch.maximum(rate, omega - 1)
    contraction = (rate_at_best + omega - 1) ** 2 / (rate_at_best * omega**2)
    best = 2 / (1 + (1 - contraction.clamp(max=1 - 1e-7)).sqrt())
    return torch.where(rate < 1, best, 1.0)


def chamfer(cost: Tensor) -> Tensor:
    """(R + Q) / 2, (B,) of costs (B, n, m): what a token is away from its nearest one."""
    row_bound, column_bound = bounds(cost)
    return (row_bound + column_bound) / 2


def mmd(x: Tensor, y: Tensor, sigma: float) -> Tensor:
    """RBF maximum mean discrepancy (biased) in units of a cost, (B,) of (B, n, d) and (B, m, d)."""
    xx, yy, xy = (
        (-(token_cost(s, t) ** 2) / (2 * sigma**2)).exp().mean((1, 2))
        for s, t in ((x, x), (y, y), (x, y))
    )
    return sigma * (xx + yy - 2 * xy).clamp(min=0).sqrt()


def cosine(x: Tensor, y: Tensor, mean_norm: float) -> Tensor:
    """mean_norm * (1 - cos) of the span means, (B,) of (B, n, d) and (B, m, d); cos(0, .) = 0."""
    a, b = x.mean(1), y.mean(1)
    lengths = a.norm(dim=1) * b.norm(dim=1)
    cos = torch.where(lengths > 0, (a * b).sum(1) / lengths, 0.0)
    return mean_norm * (1 - cos).clamp(min=0)


def exact(cost: Tensor) -> Tensor:
    """W1 by linear programming, (B,) of costs (B, n, m)."""
    try:
        ot = importlib.import_module("ot")
    except ImportError as error:
        raise ImportError("distance='exact' needs POT: pip install 'shear_ops[pot]'") from error
    return cost.new_tensor([ot.emd2([], [], c.cpu().numpy()) for c in cost])


def span_distances(
    hidden: Tensor, cu_seqlens: Tensor, group_ids: Tensor, labels: Tensor, **parameters: Any
) -> Distances:
    """Step 1: the distance of every span to the nearest span of its opposing set.

    Args:
        hidden: (N, d) packed states of B rollouts. cu_seqlens: (B + 1,) their offsets.
        group_ids, labels: (B,) integers; label 1 correct, 0 incorrect, -1 ignored.
        parameters: the fields of Parameters.

    Returns:
        Distances of the K spans, rollout by rollout, in units of a token cost; inf and -1 where
        the opposing set is empty.
    """
    p = Parameters(**parameters)
    states = _states(hidden, p)
    offsets = cu_seqlens.tolist()
    if offsets != sorted(offsets) or (offsets[0], offsets[-1]) != (0, len(states)):
        raise ValueError("cu_seqlens must not decrease from 0 to the number of tokens")
    where = [
        (i, begin + a, begin + b)
        for i, (begin, end) in enumerate(pairwise(offsets))
        for a, b in spans(end - begin, p.span, p.stride)
    ]
    rollout, begins, ends = states.new_tensor(where, dtype=torch.int64).reshape(-1, 3).unbind(1)
    distance = states.new_full((len(where),), math.inf)
    found = Solution(distance, torch.zeros_like(distance), torch.zeros_like(rollout))
    nearest, total, stopped = torch.full_like(rollout, -1), 0, 0
    for correct, incorrect, mean_norm in _mixed_groups(states, cu_seqlens, group_ids, labels):
        rows = [k for k, span in enumerate(where) if span[0] in correct]
        cols = [k for k, span in enumerate(where) if span[0] in incorrect]
        table = _all_pairs(
            states, [where[k][1:] for k in rows], [where[k][1:] for k in cols], mean_norm, p
        )
        total += len(rows) * len(cols)
        stopped += int((table.residual > p.tol).sum())
        transposed = Solution(*(t.T for t in table))
        for own, opposing, side in ((rows, cols, table), (cols, rows, transposed)):
            best = side.value.argmin(1, keepdim=True)  # the first of equal ones
            nearest[own] = rollout.new_tensor(opposing)[best[:, 0]]
            picked = {
                "min": [t.gather(1, best)[:, 0] for t in side],
                "mean": [side.value.mean(1), side.residual.amax(1), side.iterations.amax(1)],
            }[p.aggregation]
            for out, values in zip(found, picked, strict=True):
                out[own] = values
    counts = (total, 0, 0, total, stopped)
    return Distances(
        found.value, nearest, found.residual, found.iterations, rollout, begins, ends, counts
    )


def span_weights(
    hidden: Tensor, cu_seqlens: Tensor, group_ids: Tensor, labels: Tensor, **parameters: Any
) -> Tensor:
    """Steps 1 to 3: token weights (N,) in float64, for Step 4 to multiply the advantages by.

    Arguments as in span_distances. Tokens without an opposing set have weight 1.
    """
    arguments = (hidden, cu_seqlens, group_ids, labels)
    return token_weights(span_distances(*arguments, **parameters), *arguments, **parameters)


def token_weights(
    found: Distances,
    hidden: Tensor,
    cu_seqlens: Tensor,
    group_ids: Tensor,
    labels: Tensor,
    **parameters: Any,
) -> Tensor:
    """Steps 2 and 3: of the span distances found, the token weights (N,)."""
    p = Parameters(**parameters)
    states, offsets = _states(hidden, p), cu_seqlens.tolist()
    weights = states.new_ones(len(states))
    for correct, incorrect, mean_norm in _mixed_groups(states, cu_seqlens, group_ids, labels):
        for i in correct + incorrect:
            tokens = slice(offsets[i], offsets[i + 1])
            of_rollout = states[tokens].norm(dim=1).mean().item()
            if of_rollout < LEAST_ROLLOUT_NORM * mean_norm:  # no scale: its weights would be inf
                of_rollout = mean_norm
            divisor = {"group": mean_norm, "rollout": of_rollout}[p.normalization]
            t = torch.arange(offsets[i], offsets[i + 1], device=states.device)[:, None]
            mine = found.rollout == i
            covers = (found.begin[mine] <= t) & (t < found.end[mine])  # (T, K)
            distances = found.distance[mine].expand_as(covers)
            pooled = {
                "max": distances.where(covers, -math.inf).amax(1),
                "mean": distances.where(covers, 0.0).sum(1) / covers.sum(1),
            }[p.pooling]
            # all states zero: every distance is 0, and so is the mean norm
            weights[tokens] = torch.where(pooled == 0, 0.0, pooled / divisor)
    return weights


def pair_distances(x: Tensor, y: Tensor, **parameters: Any) -> Tensor:
    """The span distances (K1, K2) of all spans of one rollout (T1, d) to all of another (T2, d).

    In units of a token cost; the mean norm in which reg counts is that of both together.
    """
    p = Parameters(**parameters)
    states = torch.cat([_states(x, p, "x"), _states(y, p, "y")])
    rows, cols = (spans(len(t), p.span, p.stride) for t in (x, y))
    cols = [(len(x) + begin, len(x) + end) for begin, end in cols]
    return _all_pairs(states, rows, cols, states.norm(dim=1).mean().item(), p).value


def _states(hidden: Tensor, p: Parameters, name: str = "hidden") -> Tensor:
    _check_has_data(name, hidden)
    finite = hidden.isfinite().all(1)
    if p.check_finite and not bool(finite.all()):
        token = int((~finite).nonzero()[0])
        raise ValueError(f"{name} must be finite, got NaN or Inf at token {token}")
    return hidden.detach().double()


def _check_has_data(name: str, tensor: Tensor) -> None:
    if tensor.is_meta:
        raise ValueError(f"{name} is on meta, which has no data: give a tensor on a CPU or GPU")


def _mixed_groups(
    states: Tensor, cu_seqlens: Tensor, group_ids: Tensor, labels: Tensor
) -> Iterator[tuple[list[int], list[int], float]]:
    """Eq. 4: correct and incorrect rollouts of every group that has both, and its mean norm.

    Rollouts without tokens and those labelled -1 take no part, not in the mean norm either.
    """
    offsets, norms = cu_seqlens.tolist(), states.norm(dim=1)
    groups: dict[int, tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))
    for i, (group, label) in enumerate(zip(group_ids.tolist(), labels.tolist(), strict=True)):
        if label >= 0 and offsets[i] < offsets[i + 1]:
            groups[group][0 if label == 1 else 1].append(i)
    for correct, incorrect in groups.values():
        if correct and incorrect:
            tokens = [norms[offsets[i] : offsets[i + 1]] for i in correct + incorrect]
            yield correct, incorrect, torch.cat(tokens).mean().item()


def _all_pairs(
    states: Tensor,
    rows: list[tuple[int, int]],
    cols: list[tuple[int, int]],
    mean_norm: float,
    p: Parameters,
) -> Solution:
    """The span distances (K1, K2) of spans [begin, end) of states, for every row and column."""
    shape = (len(rows), len(cols))
    # without a scale nothing is computed: all states are zero, or not finite and unchecked
    value = states.new_full(shape, 0.0 if mean_norm == 0 else math.nan)
    table = Solution(value, torch.zeros_like(value), torch.zeros_like(value, dtype=torch.int64))
    if mean_norm == 0 or not math.isfinite(mean_norm):
        return table
    by_length = defaultdict(list)  # a batch wants problems of one shape (n, m)
    for (i, (a, b)), (j, (c, d)) in product(enumerate(rows), enumerate(cols)):
        by_length[b - a, d - c].append((i, j))
    for (n, m), pairs in by_length.items():
        size = max(1, 2**22 // (n * m + (n + m) * states.shape[1]))  # bounds the memory
        for first in range(0, len(pairs), size):
            index = torch.tensor(pairs[first : first + size], device=states.device)
            x, y = (
                torch.stack([states[slice(*where[k])] for k in column.tolist()])
                for where, column in zip((rows, cols), index.unbind(1), strict=True)
            )
            for out, values in zip(table, _distances(x, y, mean_norm, p), strict=True):
                out[index.unbind(1)] = values
    return table


def _distances(x: Tensor, y: Tensor, mean_norm: float, p: Parameters) -> Solution:
    """The span distances (B,) of spans x (B, n, d) and y (B, m, d)."""
    if p.distance == "sinkhorn":
        eps = {"mean_norm": p.reg * mean_norm, "cost": p.reg}[p.reg_unit]
        return sinkhorn(token_cost(x, y), eps, p.n_iters, p.tol)
    if p.distance == "chamfer":
        value = chamfer(token_cost(x, y))
    elif p.distance == "mmd":
        value = mmd(x, y, sigma=mean_norm)
    elif p.distance == "cosine":
        value = cosine(x, y, mean_norm)
    elif p.distance == "exact":
        value = exact(token_cost(x, y))
    else:
        raise ValueError(f"distance must be one of SpanConfig's, got {p.distance!r}")
    return Solution(value, torch.zeros_like(value), torch.zeros_like(value, dtype=torch.int64))
