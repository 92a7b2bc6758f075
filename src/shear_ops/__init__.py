"""Token-level credit for GRPO from hidden states (SHEAR, arXiv 2604.23318).

``span_weights`` turns the last-layer hidden states of a batch of rollouts into one weight per
token; ``torch.ops.shear.span_weights`` is the same as a torch operator.
"""

from . import reference
from ._C import build_info, cpu_isa
from .config import SpanConfig
from .ops import torch_op  # noqa: F401  (registers)
from .ops.api import (
    PairCounts,
    Plan,
    SinkhornResult,
    SpanDistances,
    labels_from_rewards,
    pair_distances,
    plan,
    sinkhorn,
    span_distances,
    span_weights,
    weighted_advantages,
)
from .training import distributed
from .training.apply import scale_gradient
from .training.bank import BankedWeights, HiddenBank
from .training.capture import HiddenCapture
from .training.groups import group_ids_from_uids
from .training.weighting import Weighting

__version__: str = build_info()["version"]

__all__ = [
    "BankedWeights",
    "HiddenBank",
    "HiddenCapture",
    "PairCounts",
    "Plan",
    "SinkhornResult",
    "SpanConfig",
    "SpanDistances",
    "Weighting",
    "build_info",
    "cpu_isa",
    "distributed",
    "group_ids_from_uids",
    "labels_from_rewards",
    "pair_distances",
    "plan",
    "reference",
    "scale_gradient",
    "sinkhorn",
    "span_distances",
    "span_weights",
    "weighted_advantages",
]
