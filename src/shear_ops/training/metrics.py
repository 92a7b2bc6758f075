"""Metrics of token weights, for trainers that gather with accelerate."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor

from .bank import BankedWeights
from .distributed import GroupWeights


def log_weights(
    accelerator: Any,
    weights: Tensor,
    found: GroupWeights | BankedWeights,
    metrics: MutableMapping[str, Any],
) -> None:
    """Append ``shear/weight_mean``, ``weight_p95``, ``weight_max``, ``mixed_groups``. Collective.

    Args:
        accelerator: the trainer's accelerate.Accelerator.
        weights: (N,) of all tokens of this rank.
        found: what the weights were found with; mixed_groups is the share of groups with both
            labels (the others have weight 1).
        metrics: lists by name, made when missing.
    """
    padded = accelerator.pad_across_processes(weights, pad_index=torch.nan)
    everywhere = accelerator.gather(padded)
    everywhere = everywhere[~everywhere.isnan()]
    metrics["shear/mixed_groups"].append(found.mixed_groups / found.groups)
    if everywhere.numel():
        metrics["shear/weight_mean"].append(everywhere.mean().item())
        # not torch.quantile, which takes 16 million at most
        rank = -(-everywhere.numel() * 95 // 100)
        metrics["shear/weight_p95"].append(everywhere.sort().values[rank - 1].item())
        metrics["shear/weight_max"].append(everywhere.max().item())
