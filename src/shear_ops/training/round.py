"""From rewards to laid out token weights: what every trainer does once per generation batch.

    rewards -> Rollouts.scored -> Round.add, micro-batch by micro-batch -> Round.finish -> lay_back

Everything else about a trainer is in its adapter: when rewards and states are known, and where it
has its tokens. A trainer that has all states at once takes weigh instead of a Round.
"""

from __future__ import annotations

import atexit
import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..ops.api import labels_from_rewards
from . import distributed
from .bank import BankedWeights, HiddenBank
from .settings import Settings

STEPS_TO_WARN = 10


@dataclass(frozen=True)
class Rollouts:
    """B rollouts of this rank, whose states come now or later.

    Args:
        sample_ids: B integers, unique over all ranks; a group is computed in their order.
        group_ids: B integers, equal on all ranks for rollouts of one prompt.
        labels: B of 1 correct, 0 incorrect, -1 takes no part.
    """

    sample_ids: list[int]
    group_ids: list[int]
    labels: list[int]

    @classmethod
    def scored(
        cls,
        rewards: Tensor,
        threshold: float,
        *,
        sample_ids: Iterable[int],
        group_ids: Iterable[int],
        ignored: Sequence[bool] | None = None,
        training: bool = True,
        process_group: dist.ProcessGroup | None = None,
    ) -> Rollouts:
        """Rollouts whose rewards are known before their states. Collective, also with none.

        In a group without both labels all get -1: their weights are 1, and no states are stored.

        Args:
            rewards: (B,) for correctness, NaN where unscorable. threshold: as in Settings.
            ignored: B, true where a rollout takes no part whatever its reward.
            training: false for rollouts that only evaluate: what Watch says is not about them.
            process_group: default the whole world.

        Raises:
            TypeError, ValueError: naming the argument, the value seen and the value wanted.
            RuntimeError: on the other ranks if one rank raised.
        """
        labels = labels_from_rewards(rewards, threshold).tolist()
        if ignored is not None:
            labels = [-1 if out else label for label, out in zip(labels, ignored, strict=True)]
        groups = list(group_ids)
        mixed = distributed.mixed_groups(groups, labels, process_group=process_group)
        if training:
            watch.step(rewards, threshold, bool(mixed))
        labels = [
            label if group in mixed else -1 for group, label in zip(groups, labels, strict=True)
        ]
        return cls(list(sample_ids), groups, labels)

    def __len__(self) -> int:
        """Return B."""
        return len(self.sample_ids)

    @property
    def mixed_share(self) -> float:
        """Share of this rank's groups that have both labels, on any rank; of scored rollouts."""
        pairs = zip(self.group_ids, self.labels, strict=True)
        return len({group for group, label in pairs if label >= 0}) / len(set(self.group_ids))

    def at(self, places: Iterable[int]) -> Rollouts:
        """Those at places in [0, B), in the order of places."""
        taken = list(places)
        return Rollouts(*([column[i] for i in taken] for column in vars(self).values()))


class Watch:
    """Warns if SHEAR is off: no step so far had a group with both labels. Once per process.

    After STEPS_TO_WARN steps, or at the end of a process that made fewer. Rollouts.scored tells it;
    a trainer that weighs without that does so itself. Steps are those that train.
    """

    def __init__(self) -> None:
        """Start before the first step."""
        self._steps, self._low, self._high = 0, math.inf, -math.inf
        self._threshold = math.nan
        self._over = False

    def step(self, rewards: Tensor, threshold: float, mixed: bool) -> None:
        """Count a step.

        Args:
            rewards: (B,) for correctness, of this rank or of all, NaN where unscorable.
            threshold: as in Settings. mixed: whether any group of any rank had both labels.
        """
        self._over |= mixed
        if self._over or rewards.numel() == 0:
            return
        self._steps, self._threshold = self._steps + 1, threshold
        if (scored := rewards[~rewards.isnan()]).numel():
            self._low = min(self._low, scored.min().item())
            self._high = max(self._high, scored.max().item())
        if self._steps == STEPS_TO_WARN:
            self._warn("the first ", stacklevel=4)

    def end(self) -> None:
        """Warn if there were steps, but too few for step() to warn."""
        if self._steps and not self._over:
            self._warn("all of ", stacklevel=2)

    def _warn(self, which: str, stacklevel: int) -> None:
        self._over = True
        warnings.warn(self._message(which), stacklevel=stacklevel)

    def _message(self, which: str) -> str:
        threshold, steps = self._threshold, f"{which}{self._steps} step{'s' * (self._steps > 1)}"
        if self._low > self._high:
            seen, why = "never a number", "none was scored"
        else:
            seen = f"from {self._low:g} to {self._high:g}"
            if self._high < threshold:
                why = "none was: set threshold between rewards of wrong and of right rollouts"
            elif self._low >= threshold:
                why = "all were: set threshold between rewards of wrong and of right rollouts"
            else:
                why = "within each group all were, or none"
        return (
            f"no group had correct and incorrect rollouts in {steps}, so all "
            f"token weights were 1, as without SHEAR. Rewards for correctness were {seen}, and a "
            f"rollout is correct from threshold = {threshold:g} on: {why}"
        )


watch = Watch()
atexit.register(lambda: watch.end())  # of whatever is the watch then


class Round:
    """States of micro-batches, in any order and on any ranks; then the weights of all of them.

    Args:
        settings: of the trainer. group_size: as in HiddenBank.
    """

    def __init__(self, settings: Settings, group_size: int | None = None) -> None:
        """Start without rollouts."""
        self._settings = settings
        self._bank = HiddenBank(group_size=group_size, config=settings.spans)

    def __len__(self) -> int:
        """Return the number of rollouts added."""
        return len(self._bank)

    def add(self, states: Tensor, lengths: Sequence[int] | Tensor, rollouts: Rollouts) -> None:
        """Add the rollouts of a micro-batch.

        Args:
            states: (N, d), those of the first rollout's tokens, then the second's, and so on.
            lengths: (B,) tokens of each rollout, N in all.
            rollouts: the B of them.

        Raises:
            TypeError, ValueError: as HiddenBank.add.
        """
        self._bank.add(states, cu_seqlens=_offsets(lengths), **asdict(rollouts))

    def finish(self, step: int, process_group: dist.ProcessGroup | None = None) -> BankedWeights:
        """Weights of all that was added; the next round can begin. Collective, also with none.

        Args:
            step: optimizer steps taken so far.
            process_group: default the whole world; a data-parallel group where ranks hold replicas.

        Raises:
            TypeError, ValueError, RuntimeError: as HiddenBank.finalize.
        """
        return self._bank.finalize(process_group, **_options(self._settings, step))


def weigh(
    settings: Settings,
    states: Tensor,
    lengths: Sequence[int] | Tensor,
    rollouts: Rollouts,
    step: int,
) -> distributed.GroupWeights:
    """Weights (N,) of a whole round that is there at once: states are not stored a second time.

    Collective over the whole world, also with no rollouts; arguments as in Round.

    Raises:
        TypeError, ValueError, RuntimeError: as distributed.span_weights.
    """
    return distributed.span_weights(
        states, cu_seqlens=_offsets(lengths), **asdict(rollouts), **_options(settings, step)
    )


def lay_back(weights: Iterable[Tensor], mask: Tensor) -> Tensor:
    """Weights where a trainer has their tokens, and 1 elsewhere.

    Args:
        weights: (T_i,) of each rollout, or parts of them, on any device.
        mask: bool or 0/1 of any shape, e.g. (B, C) or (R,); its ones, row by row, are the tokens.

    Returns:
        float32 of mask's shape, on its device.

    Raises:
        ValueError: unless mask has as many ones as there are weights.
    """
    laid_out = torch.ones(mask.shape, dtype=torch.float32, device=mask.device)
    flat = torch.cat([laid_out.new_empty(0), *(part.to(mask.device) for part in weights)])
    places = mask.flatten().nonzero()[:, 0]
    if len(places) != len(flat):  # one weight alone would be broadcast
        raise ValueError(f"mask must have {len(flat)} ones, one per weight, got {len(places)}")
    laid_out.view(-1)[places] = flat
    return laid_out


def _offsets(lengths: Sequence[int] | Tensor) -> Tensor:
    counts = torch.as_tensor(lengths, dtype=torch.int64, device="cpu")
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0))


def _options(settings: Settings, step: int) -> dict[str, Any]:
    return {"config": settings.spans, "weighting": settings.weighting, "step": step}
