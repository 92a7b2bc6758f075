"""Settings: what every trainer must be told, and the only place that checks it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, TypeVar

from ..config import SpanConfig, check_threshold
from .apply import check_way
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
        apply: ``"advantages"``: weights multiply advantages; ``"gradient"``: the gradient of the
            token log-probabilities (see scale_gradient), for losses that take one advantage per
            rollout; ``"auto"``: advantages where the trainer's loss takes them per token.

    Raises:
        TypeError, ValueError: naming the field, the value seen and the value wanted.
    """

    threshold: float = 0.5
    align: str = "token"
    spans: SpanConfig = field(default_factory=SpanConfig)
    weighting: Weighting = field(default_factory=Weighting)
    apply: str = "auto"

    def __post_init__(self) -> None:
        """Check every field; spans and weighting have checked theirs."""
        check_threshold(self.threshold)
        for name, kind in _SECTIONS.items():
            if not isinstance(value := getattr(self, name), kind):
                raise TypeError(f"{name} must be a {kind.__name__}, got {value!r}")
        if self.align not in ALIGNMENTS:
            raise ValueError(f"align must be {' or '.join(ALIGNMENTS)}, got {self.align!r}")
        check_way(self.apply)

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

    @classmethod
    def take(
        cls: type[Own], arguments: Sequence[str], program: str, others: str
    ) -> tuple[Own, list[str]]:
        """Take ``--shear.*`` off a command line; exits with a message if one is wrong.

        With -h or --help among the arguments, prints help on those of SHEAR, and goes on.

        Args:
            arguments: of the command line. program: the command.
            others: what usage calls the arguments that are not SHEAR's.

        Returns:
            Settings, and the other arguments.
        """
        parser = argparse.ArgumentParser(
            program,
            usage=f"%(prog)s [--shear.NAME VALUE ...] {others}",
            add_help=False,
            allow_abbrev=False,
        )
        paths = _add_arguments(parser, asdict(cls()))
        given, rest = parser.parse_known_args(arguments)
        if unknown := [argument for argument in rest if argument.startswith("--shear")]:
            parser.error(f"--shear.* must be among {', '.join(paths)}, got {', '.join(unknown)}")
        if {"-h", "--help"} & set(rest):
            parser.print_help()
        made: dict[str, Any] = {}
        for path, value in vars(given).items():
            section, _, name = path.partition(".")
            if name:
                made.setdefault(section, {})[name] = value
            else:
                made[section] = value
        try:
            return cls.parse(made), rest
        except (TypeError, ValueError) as error:
            parser.error(f"--shear: {error}")


def only_advantages(settings: Settings, why: str) -> tuple[object, str]:
    """For the table of refusals of an adapter that cannot reach its loss's log-probabilities."""
    return settings.apply == "gradient", f"apply must be auto or advantages, got gradient: {why}"


def refuse(refusals: Iterable[tuple[object, str]]) -> None:
    """Raise what an adapter's table says its trainer must not do.

    Args:
        refusals: conditions, and what to say where one holds. A generator is read up to there.

    Raises:
        ValueError: with the first sentence whose condition holds.
    """
    for holds, sentence in refusals:
        if holds:
            raise ValueError(sentence)


@dataclass(frozen=True)
class RewardSettings(Settings):
    """Settings for a trainer that scores rollouts with several reward functions.

    Rollouts for which the reward function gave None are ignored: weight 1, and in no opposing set.

    Args:
        threshold, align, spans, weighting, apply: as in Settings.
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


def _add_arguments(parser: argparse.ArgumentParser, defaults: Mapping[str, Any]) -> list[str]:
    """Add --shear.* for every setting; return their names, as threshold and spans.stride."""
    paths = []
    for section, default in defaults.items():
        nested = default if isinstance(default, dict) else {"": default}
        for name, value in nested.items():
            paths.append(f"{section}.{name}".rstrip("."))
            parser.add_argument(
                f"--shear.{paths[-1]}",
                dest=paths[-1],
                type=_value,
                nargs=2 if name == "clip" else None,
                metavar=("LOW", "HIGH") if name == "clip" else "VALUE",
                default=argparse.SUPPRESS,
                help=f"default {json.dumps(value)}",
            )
    return paths


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
