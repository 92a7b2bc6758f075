"""Metrics of token weights, by the names that all trainers log them under."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

from torch import Tensor

from .bank import BankedWeights
from .distributed import GroupWeights


def of_weights(weights: Tensor) -> dict[str, float]:
    """``shear/weight_mean`` and ``shear/weight_max`` of weights (N,), N > 0."""
    return {
        "shear/weight_mean": weights.mean().item(),
        "shear/weight_max": weights.max().item(),
    }


def log_weights(
    accelerator: Any,
    weights: Tensor,
    found: GroupWeights | BankedWeights,
    metrics: MutableMapping[str, Any],
) -> None:
    """Append what trainers log, lists by name. Collective.

    ``shear/weight_mean``, ``weight_p95``, ``weight_max``, ``mixed_groups``, ``stopped``.

    For trainers that gather with accelerate.

    Args:
        accelerator: the trainer's accelerate.Accelerator.
        weights: (N,) of all tokens of this rank.
        found: what the weights were found with; mixed_groups is the share of groups with both
            labels (the others have weight 1), stopped that of the solved span pairs whose distance
            had not converged after n_iters: 0, or the weights may be off.
        metrics: lists by name, made when missing.
    """
    padded = accelerator.pad_across_processes(weights, pad_index=-1)
    everywhere = accelerator.gather(padded)
    everywhere = everywhere[everywhere != -1]  # weights are at least 0, or NaN, which must show
    metrics["shear/mixed_groups"].append(found.mixed_groups / max(found.groups, 1))
    metrics["shear/stopped"].append(found.pairs.stopped_share)
    if everywhere.numel():
        for name, value in of_weights(everywhere).items():
            metrics[name].append(value)
        # not torch.quantile, which takes 16 million at most
        rank = -(-everywhere.numel() * 95 // 100)
        metrics["shear/weight_p95"].append(everywhere.sort().values[rank - 1].item())
