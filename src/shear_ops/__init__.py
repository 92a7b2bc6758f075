"""Token-level credit for GRPO from hidden states (SHEAR, arXiv 2604.23318).

``span_weights`` turns the last-layer hidden states of a batch of rollouts into one weight per
token; ``torch.ops.shear.span_weights`` is the same as a torch operator.
"""

from . import reference, torch_op  # noqa: F401
from ._C import build_info, cpu_isa
from .api import (
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
from .config import SpanConfig

__version__: str = build_info()["version"]

__all__ = [
    "PairCounts",
    "Plan",
    "SinkhornResult",
    "SpanConfig",
    "SpanDistances",
    "build_info",
    "cpu_isa",
    "labels_from_rewards",
    "pair_distances",
    "plan",
    "reference",
    "sinkhorn",
    "span_distances",
    "span_weights",
    "weighted_advantages",
]
