"""Settings: what every trainer must be told, and the only place that checks it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from ..config import SpanConfig, check_threshold
from .capture import ALIGNMENTS
from .weighting import Weighting

_SECTIONS: dict[str, Any] = {"spans": SpanConfig, "weighting": Weighting}

Own = TypeVar("Own", bound="Settings")


@dataclass(frozen=True)
class Settings:
    """How token weights are made in a trainer.

    Args:
        threshold: a rollout is correct if its reward for correctness is at least this.
        align: as in HiddenCapture.
        spans: parameters of the method.
        weighting: options on the weights; steps are optimizer steps.

    Raises:
        TypeError, ValueError: naming the field, the value seen and the value wanted.
    """

    threshold: float = 0.5
    align: str = "token"
    spans: SpanConfig = field(default_factory=SpanConfig)
    weighting: Weighting = field(default_factory=Weighting)

    def __post_init__(self) -> None:
        """Check every field; spans and weighting have checked theirs."""
        check_threshold(self.threshold)
        for name, kind in _SECTIONS.items():
            if not isinstance(value := getattr(self, name), kind):
                raise TypeError(f"{name} must be a {kind.__name__}, got {value!r}")
        if self.align not in ALIGNMENTS:
            raise ValueError(f"align must be {' or '.join(ALIGNMENTS)}, got {self.align!r}")

    @classmethod
    def parse(cls: type[Own], section: Mapping[str, Any]) -> Own:
        """Settings from a section of a configuration file; spans and weighting are its own.

        Raises:
            TypeError, ValueError: naming the field, the value seen and the values wanted.
        """
        if not isinstance(section, Mapping):
            raise TypeError(f"shear must be a section of settings, got {section!r}")
        made = dict(section)
        known = [item.name for item in fields(cls)]
        if unknown := sorted(set(made) - set(known)):
            raise ValueError(f"shear.* must be among {', '.join(known)}, got {', '.join(unknown)}")
        for name, kind in _SECTIONS.items():
            if isinstance(given := made.get(name), Mapping):
                allowed = [item.name for item in fields(kind)]
                if unknown := sorted(set(given) - set(allowed)):
                    raise ValueError(
                        f"shear.{name}.* must be among {', '.join(allowed)}, got "
                        f"{', '.join(unknown)}"
                    )
                made[name] = kind(**given)
        return cls(**made)


@dataclass(frozen=True)
class RewardSettings(Settings):
    """Settings for a trainer that scores rollouts with several reward functions.

    Rollouts for which the reward function gave None are ignored: weight 1, and in no opposing set.

    Args:
        threshold, align, spans, weighting: as in Settings.
        correctness: the reward function that says whether a rollout is correct, by name or by
            position among the trainer's. May be left out if there is only one.

    Raises:
        TypeError, ValueError: naming the field, the value seen and the value wanted.
    """

    correctness: str | int | None = None

    def position_of_correctness(self, names: Sequence[str]) -> int:
        """Position of the reward function for correctness among those of a trainer.

        Raises:
            ValueError: if it is none of them, or if there are several and correctness is not set.
        """
        wanted, listed = self.correctness, ", ".join(names)
        if not names:
            raise ValueError("reward_funcs must have the function for correctness, got none")
        if wanted is None:
            if len(names) > 1:
                raise ValueError(
                    f"reward_funcs has {len(names)} functions ({listed}): say which one tells "
                    f"whether a rollout is correct, for example correctness={names[0]!r}. The sign "
                    "of a mixed advantage does not: all wrong groups have positive ones, too"
                )
            return 0
        if isinstance(wanted, int) and not isinstance(wanted, bool) and 0 <= wanted < len(names):
            return wanted
        if names.count(wanted) != 1:
            raise ValueError(
                f"correctness must be the name or the position of one of the reward functions "
                f"({listed}), got {wanted!r}"
            )
        return names.index(wanted)
