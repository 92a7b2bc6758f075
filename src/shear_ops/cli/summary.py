"""What there is to say about scored rollouts: groups, counts, how well weights find mistakes."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..config import SpanConfig
from ..ops.api import SpanDistances, span_distances, span_weights
from .rollouts import Rollouts

WEAK_AUC = 0.6

Array = npt.NDArray[np.float32]


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
    return _auc(positive.numpy(), negative.numpy())


# numpy where there is a call per group: torch's take several times as long on a few tokens
def _auc(positive: Array, negative: Array) -> float:
    if np.isnan(positive).any() or np.isnan(negative).any():
        return math.nan
    ordered = np.sort(negative)
    below = np.searchsorted(ordered, positive)
    not_above = np.searchsorted(ordered, positive, side="right")
    return float((below + not_above).mean() / (2 * len(negative)))


def mistake_auc(
    rollouts: Rollouts, weights: Tensor, among: Iterable[int] | None = None
) -> dict[str, float | int | None]:
    """AUC with which weights separate tokens from the first wrong step on from tokens before it.

    Over incorrect rollouts (of those among) whose first wrong step is known: of all tokens pooled,
    and the mean over rollouts. Rollouts with no token before it are left out.
    """
    incorrect = (rollouts.labels == 0).tolist()
    own = [i for i in (range(len(rollouts)) if among is None else among) if incorrect[i]]
    after, before = _split(rollouts, weights.numpy(), rollouts.first_wrongs(), own)
    single = [_auc(a, b) for a, b in zip(after, before, strict=True)]
    return {
        "pooled": _pooled(after, before),
        "mean": sum(single) / len(single) if single else None,
        "rollouts": len(single),
        "left_out": len(own) - len(single),
    }


def _split(
    rollouts: Rollouts, weights: Array, first_wrong: list[int], among: Iterable[int]
) -> tuple[list[Array], list[Array]]:
    """Weights from the first wrong step on, and before it, of those rollouts that have both."""
    after, before = [], []
    for i in among:
        if (first := first_wrong[i]) > 0:
            own = weights[rollouts.tokens_of(i)]
            after.append(own[first:])
            before.append(own[:first])
    return after, before


def _pooled(after: list[Array], before: list[Array]) -> float | None:
    return _auc(np.concatenate(after), np.concatenate(before)) if after else None


def _p95(weights: Array) -> float:
    """Quantile 0.95, between two weights; NaN if there is one."""
    place = 0.95 * (len(weights) - 1)
    low = int(place)
    high = min(low + 1, len(weights) - 1)
    ordered = np.partition(weights, (low, high))
    a, b, share = float(ordered[low]), float(ordered[high]), place - low
    if np.isnan(weights).any():
        return math.nan
    return a + (b - a) * share if a < b and share else a


def group_rows(scores: Scores) -> list[dict[str, Any]]:
    """One row per group, in order of appearance; stopped counts spans."""
    rows, values, first_wrong = [], scores.weights.numpy(), scores.rollouts.first_wrongs()
    rollouts, all_labels = scores.rollouts, scores.rollouts.labels.tolist()
    # of spans, not of pairs: how many pairs are solved at all depends on what comes first
    not_converged = scores.found.iterations >= scores.config.n_iters
    stopped = scores.found.rollout[not_converged].bincount(minlength=len(rollouts)).tolist()
    for group_id, members in rollouts.groups.items():
        labels = [all_labels[i] for i in members]
        incorrect = [i for i in members if all_labels[i] == 0]
        own = np.concatenate([values[rollouts.tokens_of(i)] for i in members])
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
            "auc": _pooled(*_split(rollouts, values, first_wrong, incorrect)),
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
