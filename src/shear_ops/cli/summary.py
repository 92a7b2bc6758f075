"""What there is to say about scored rollouts: groups, counts, how well weights find mistakes."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config import SpanConfig
from ..ops.api import SpanDistances, span_distances, span_weights
from .rollouts import Rollouts

WEAK_AUC = 0.6


@dataclass(frozen=True)
class Scores:
    """Rollouts with their weights (N,), span distances, and seconds that span_weights took."""

    rollouts: Rollouts
    config: SpanConfig
    weights: Tensor
    found: SpanDistances
    seconds: float

    def weights_of(self, rollout: int) -> Tensor:
        """Return the token weights (T,) of a rollout."""
        return self.weights[self.rollouts.tokens_of(rollout)]


def score_rollouts(rollouts: Rollouts, config: SpanConfig, backend: str | None) -> Scores:
    """Compute weights (timed) and span distances (for the counts)."""
    start = time.perf_counter()
    weights = span_weights(**rollouts.arguments(), config=config, backend=backend)
    seconds = time.perf_counter() - start
    found = span_distances(**rollouts.arguments(), config=config, backend=backend)
    return Scores(rollouts, config, weights, found, seconds)


def auc(positive: Tensor, negative: Tensor) -> float:
    """Probability that a positive value exceeds a negative one, ties counting half.

    NaN if there is one: it has no place in an order.
    """
    if bool(positive.isnan().any() | negative.isnan().any()):
        return math.nan
    ordered = negative.sort().values
    below = torch.searchsorted(ordered, positive)
    not_above = torch.searchsorted(ordered, positive, right=True)
    return float((below + not_above).double().mean() / (2 * len(negative)))


def mistake_auc(
    rollouts: Rollouts, weights: Tensor, among: Iterable[int] | None = None
) -> dict[str, float | int | None]:
    """AUC with which weights separate tokens from the first wrong step on from tokens before it.

    Over incorrect rollouts (of those among) whose first wrong step is known: of all tokens pooled,
    and the mean over rollouts. Rollouts with no token before it are left out.
    """
    after, before = [], []
    left_out = 0
    for i in range(len(rollouts)) if among is None else among:
        if int(rollouts.labels[i]) != 0:
            continue
        first = rollouts.first_wrong_of(i)
        if first <= 0:
            left_out += 1
            continue
        own = weights[rollouts.tokens_of(i)]
        after.append(own[first:])
        before.append(own[:first])
    if not after:
        return {"pooled": None, "mean": None, "rollouts": 0, "left_out": left_out}
    single = [auc(a, b) for a, b in zip(after, before, strict=True)]
    return {
        "pooled": auc(torch.cat(after), torch.cat(before)),
        "mean": sum(single) / len(single),
        "rollouts": len(single),
        "left_out": left_out,
    }


def _p95(weights: Tensor) -> float:
    with np.errstate(invalid="ignore"):  # between two infinite weights
        return float(np.quantile(weights.numpy(), 0.95))  # torch.quantile ends at 2^24 weights


def group_rows(scores: Scores) -> list[dict[str, Any]]:
    """One row per group, in order of appearance; stopped counts spans."""
    rows = []
    rollouts, all_labels = scores.rollouts, scores.rollouts.labels.tolist()
    not_converged = scores.found.iterations >= scores.config.n_iters
    stopped = scores.found.rollout[not_converged].bincount(minlength=len(rollouts)).tolist()
    for group_id, members in rollouts.groups.items():
        labels = [all_labels[i] for i in members]
        own = torch.cat([scores.weights_of(i) for i in members])
        rows.append({
            "group": group_id,
            "rollouts": len(members),
            "correct": labels.count(1),
            "incorrect": labels.count(0),
            "ignored": labels.count(-1),
            "tokens": len(own),
            "mean": float(own.mean()) if len(own) else None,
            "p95": _p95(own) if len(own) else None,
            "max": float(own.max()) if len(own) else None,
            "stopped": sum(stopped[i] for i in members),
            "auc": mistake_auc(rollouts, scores.weights, members)["pooled"],
        })  # fmt: skip
    return rows


def reference_check(scores: Scores) -> dict[str, Any] | None:
    """The float64 reference on the mixed group with the fewest tokens: AUC of both, difference."""
    rows = [r for r in group_rows(scores) if r["correct"] and r["incorrect"] and r["tokens"]]
    if not rows:
        return None
    group_id = min(rows, key=lambda r: (r["correct"] * r["incorrect"], r["tokens"]))["group"]
    part = scores.rollouts.group(group_id)
    start = time.perf_counter()
    wanted = span_weights(**part.arguments(), config=scores.config, backend="reference")
    seconds = time.perf_counter() - start
    seen = span_weights(**part.arguments(), config=scores.config)
    return {
        "group": group_id,
        "seconds": seconds,
        "auc": mistake_auc(part, wanted)["pooled"],
        "auc_backend": mistake_auc(part, seen)["pooled"],
        "largest_difference": float((seen - wanted).abs().max()),
    }


def summarize(scores: Scores, reference: dict[str, Any] | None) -> dict[str, Any]:
    """Everything that is printed, as plain data."""
    rollouts = scores.rollouts
    return {
        "source": rollouts.source,
        "config": asdict(scores.config),
        "rollouts": len(rollouts),
        "tokens": len(rollouts.hidden),
        "dim": rollouts.hidden.shape[1],
        "dtype": str(rollouts.hidden.dtype).removeprefix("torch."),
        "seconds": scores.seconds,
        "pairs": scores.found.pairs._asdict(),
        "groups": group_rows(scores),
        "auc": {
            "weights": mistake_auc(rollouts, scores.weights),
            "uniform": mistake_auc(rollouts, torch.ones_like(scores.weights)),
            "reference": reference,
        },
    }


def cell(value: object) -> str:
    """What a table shows: three decimals of a number that is no count, a dash for None."""
    if value is None:
        return "–"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def top_weight(weights: Tensor) -> float:
    """Return the weight that gets the full colour: the largest finite one, above 0."""
    finite: list[float] = weights[weights.isfinite()].tolist()
    return max([*finite, 1e-9])


def shade(weight: float, top: float) -> float:
    """Return how much of the colour of top a weight gets, 0 to 1: none where it is NaN."""
    return 0.0 if math.isnan(weight) else min(weight / top, 1.0)


def verdict(summary: dict[str, Any]) -> str:
    """One sentence on the AUC, as it is."""
    value = summary["auc"]["weights"]["pooled"]
    if value is None:
        return "No incorrect rollout with a known first wrong step: no AUC."
    if math.isnan(value):
        return "Some weights are NaN: no AUC."
    if value < WEAK_AUC:
        return (
            f"AUC {value:.3f}: on these rollouts the weights hardly separate tokens after the "
            "first wrong step from tokens before it."
        )
    return f"AUC {value:.3f} (uniform weights: {summary['auc']['uniform']['pooled']:.3f})."


def shown_rollout(rollouts: Rollouts, wanted: int | None) -> int:
    """Return the rollout to print: the wanted one, else the first incorrect one with a mistake."""
    if wanted is not None:
        if not 0 <= wanted < len(rollouts):
            raise ValueError(f"--rollout must be in [0, {len(rollouts)}), got {wanted}")
        return wanted
    for i in range(len(rollouts)):
        if int(rollouts.labels[i]) == 0 and rollouts.first_wrong_of(i) > 0:
            return i
    return 0
