"""Independent judges of small pieces: other solvers, closed forms, and loops instead of tensors."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def sinkhorn_pot(cost: Array, reg: float) -> float:
    """Sharp transport cost <P, C> of POT's log-domain Sinkhorn between uniform measures."""
    import ot

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # POT only warns where it has not converged
        plan = ot.sinkhorn(
            [], [], cost, reg, method="sinkhorn_log", stopThr=1e-9, numItermax=200_000
        )
    return float((plan * cost).sum())


def w1(cost: Array) -> float:
    """Exact transport cost between uniform measures, by linear programming."""
    import ot

    return float(ot.emd2([], [], cost))


def w1_on_a_line(x: Array, y: Array) -> float:
    """W1 of two samples of numbers, of any sizes: the area between their distribution functions."""
    both = np.sort(np.concatenate([x, y]))
    gap = np.abs(
        np.searchsorted(np.sort(x), both, "right") / len(x)
        - np.searchsorted(np.sort(y), both, "right") / len(y)
    )
    return float((gap[:-1] * np.diff(both)).sum())


def bounds(cost: Array) -> tuple[float, float]:
    """R and Q, one entry at a time."""
    n, m = cost.shape
    r = sum(min(cost[i, j] for j in range(m)) for i in range(n)) / n
    q = sum(min(cost[i, j] for i in range(n)) for j in range(m)) / m
    return float(r), float(q)


def chamfer(cost: Array) -> float:
    return float((cost.min(1).mean() + cost.min(0).mean()) / 2)


def spans(length: int, span: int, stride: int) -> Iterator[tuple[int, int]]:
    """Spans as a walk: on by the stride until one reaches the end."""
    begin = 0
    while begin < length:
        end = min(begin + span, length)
        yield begin, end
        if end == length:
            return
        begin += stride


def span_weights(
    hidden: Array,
    cu_seqlens: list[int],
    group_ids: list[int],
    labels: list[int],
    distance: Callable[[Array], float],
    config: dict[str, Any],
) -> Array:
    """Token weights with any distance of a cost matrix, one token at a time."""
    rollouts = [hidden[a:b] for a, b in pairwise(cu_seqlens)]
    size = {"span": config["span"], "stride": config["stride"]}
    weights: list[float] = []
    for x, group, label in zip(rollouts, group_ids, labels, strict=True):
        same = [
            (y, other)
            for y, its_group, other in zip(rollouts, group_ids, labels, strict=True)
            if its_group == group and other >= 0
        ]
        opposing = [
            y[a:b] for y, other in same if other == 1 - label for a, b in spans(len(y), **size)
        ]
        if label < 0 or not opposing:
            weights += [1.0] * len(x)
            continue
        distances = {}
        for a, b in spans(len(x), **size):
            values = [
                distance(np.linalg.norm(x[a:b, None] - other[None], axis=2)) for other in opposing
            ]
            mean = config.get("aggregation") == "mean"
            distances[a, b] = sum(values) / len(values) if mean else min(values)
        own = config.get("normalization") == "rollout"
        norms = [math.hypot(*t) for y in ([x] if own else [y for y, _ in same]) for t in y]
        for t in range(len(x)):
            covering = [d for (a, b), d in distances.items() if a <= t < b]
            mean = config.get("pooling") == "mean"
            pooled = sum(covering) / len(covering) if mean else max(covering)
            weights.append(pooled / (sum(norms) / len(norms)) if pooled else 0.0)
    return np.array(weights)
