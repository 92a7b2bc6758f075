"""Weighting: what a trainer may do with token weights before they multiply advantages."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Weighting:
    """Options on the token weights of a group; the defaults leave them as the paper has them.

    They are applied in the order of the arguments, group by group, and only to groups with both
    labels: elsewhere weights stay 1. No option can change the sign of an advantage.

    Args:
        mean_one: divide by the mean over the tokens of the group, so that a group moves the policy
            as far as in GRPO and the learning rate keeps its meaning. Where all are 0, they
            become 1. NaN stays NaN.
        clip: (low, high), 0 <= low <= high: bounds of the weights.
        warmup_steps: from weights of 1 at step 0 linearly to the weights at this step.

    Raises:
        TypeError, ValueError: naming the field, the value seen and the value wanted.
    """

    mean_one: bool = False
    clip: tuple[float, float] | None = None
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        """Check every field."""
        if not isinstance(self.mean_one, bool):
            raise TypeError(f"mean_one must be a bool, got {self.mean_one!r}")
        if self.clip is not None:
            if not isinstance(self.clip, Sequence) or not all(map(_is_number, self.clip)):
                raise TypeError(f"clip must be (low, high) or None, got {self.clip!r}")
            if len(self.clip) != 2:
                raise ValueError(f"clip must be (low, high), got {self.clip!r}")
            object.__setattr__(self, "clip", tuple(self.clip))  # equal and hashable, also of lists
            low, high = self.clip
            if not (0 <= low <= high and math.isfinite(low)):
                raise ValueError(f"clip must be (low, high), 0 <= low <= high, got {self.clip}")
        if isinstance(self.warmup_steps, bool) or not isinstance(self.warmup_steps, int):
            raise TypeError(f"warmup_steps must be an int, got {self.warmup_steps!r}")
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps must be at least 0, got {self.warmup_steps}")

    def apply(self, weights: Tensor, step: int) -> Tensor:
        """Return the weights (N,) of one group with both labels as they are used at a step.

        Args:
            weights: (N,) float32, all tokens of the group.
            step: optimizer steps taken so far; matters for warmup_steps only.

        Raises:
            TypeError, ValueError: unless step is an integer of at least 0.
        """
        step = check_step(step)
        if self.mean_one:
            mean = (weights / weights.numel()).sum()  # the sum alone may leave float32
            # every weight is 0, as of equal tokens: uniform weights are what has mean 1;
            # NaN, which check_finite=False promises, is not 0 and stays
            weights = (weights / mean).where(mean != 0, weights.new_ones(()))
        if self.clip is not None:
            weights = weights.clamp(*self.clip)
        if step < self.warmup_steps:
            weights = 1 + (weights - 1) * (step / self.warmup_steps)
        return weights


def check_step(step: object) -> int:
    """Return step, an integer of any kind (int, numpy's, a 0-d tensor), as an int, or raise."""
    try:
        if isinstance(step, bool):
            raise TypeError
        number = operator.index(step)  # type: ignore[arg-type]
    except (TypeError, RuntimeError):  # RuntimeError: a tensor without data
        raise TypeError(f"step must be an int, got {step!r}") from None
    if number < 0:
        raise ValueError(f"step must be at least 0, got {number}")
    return number


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
