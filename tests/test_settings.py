"""Settings of trainers: what a section of a configuration file may say."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest

from shear_ops import SpanConfig, Weighting
from shear_ops.training.settings import RewardSettings, Settings, refuse


def test_parse() -> None:
    assert Settings.parse({}) == Settings()
    section = {
        "threshold": 1,
        "align": "predictor",
        "spans": {"span": 50},
        "weighting": {"mean_one": True},
    }
    wanted = Settings(1, "predictor", SpanConfig(span=50), Weighting(mean_one=True))
    assert Settings.parse(section) == wanted


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"treshold": 1}, "shear.* must be among threshold, align, spans, weighting, apply, got treshold"),
        ({"apply": "both"}, "apply must be one of auto, advantages, gradient, got 'both'"),
        ({"spans": {"sapn": 1}}, "shear.spans.* must be among span, stride"),
        ({"weighting": {"sapn": 1}}, "shear.weighting.* must be among mean_one, clip"),
        ({"spans": {"span": 0}}, "span must be in"),
        ({"spans": 100}, "spans must be a SpanConfig, got 100"),
        ({"align": "next"}, "align must be token or predictor, got 'next'"),
        ({"threshold": "0.5"}, "threshold must be a number, got '0.5'"),
        ({"threshold": float("nan")}, "threshold must be a number, got nan"),
    ],
    ids=str,
)  # fmt: skip
def test_refuses(section: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError)) as raised:
        Settings.parse(section)
    assert message in str(raised.value)


def test_take() -> None:
    settings, rest = Settings.take(
        ["--a", "-1", "--shear.threshold", "-0.5", "--b=c", "--shear.align=predictor", "--shear.spans.distance",
         "chamfer", "--shear.spans.check_finite", "false", "--shear.weighting.clip", "0.5", "2", "--d", "x y"], "train", "<others>"
    )  # fmt: skip
    assert rest == ["--a", "-1", "--b=c", "--d", "x y"]
    assert (settings.threshold, settings.align) == (-0.5, "predictor")
    assert (settings.spans.distance, settings.spans.check_finite) == ("chamfer", False)
    assert tuple(settings.weighting.clip) == (0.5, 2)
    assert Settings.take([], "train", "<others>") == (Settings(), [])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shear.treshold", "1"], "must be among threshold, align, spans.span"),
        (["--shear.spans", "1"], "must be among threshold, align, spans.span"),
        (["--shear.spans.span", "0"], "span must be in"),
        (["--shear.threshold", "half"], "threshold must be a number, got 'half'"),
        (["--shear.align", "next"], "align must be token or predictor, got 'next'"),
        (["--shear.weighting.clip", "1"], "--shear.weighting.clip: expected 2 arguments"),
    ],
)
def test_take_refuses(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as raised:
        Settings.take(arguments, "train", "<others>")
    assert raised.value.code == 2
    assert message in capsys.readouterr().err


def test_take_shows_help(capsys: pytest.CaptureFixture[str]) -> None:
    """And leaves the flag to the command that has the other arguments."""
    assert Settings.take(["--a", "-h"], "train", "<others>") == (Settings(), ["--a", "-h"])
    printed = capsys.readouterr().out
    assert "usage: train [--shear.NAME VALUE ...] <others>" in printed
    assert "--shear.weighting.clip LOW HIGH" in printed


def test_refuse_says_the_first() -> None:
    read = []

    def refusals() -> Iterator[tuple[object, str]]:
        for holds in (0, None, [1], True):
            read.append(holds)
            yield holds, f"must not be {holds}"

    with pytest.raises(ValueError, match=re.escape("must not be [1]")):
        refuse(refusals())
    assert read == [0, None, [1]]  # what comes later may not be readable
    refuse([(False, "never")])


@pytest.mark.parametrize(
    ("wanted", "names", "position"),
    [(None, ["right"], 0), ("right", ["short", "right"], 1), (1, ["short", "right"], 1)],
)
def test_position_of_correctness(wanted: str | int | None, names: list[str], position: int) -> None:
    assert RewardSettings(correctness=wanted).position_of_correctness(names) == position


@pytest.mark.parametrize(
    ("wanted", "names", "message"),
    [
        (None, ["short", "right"], "reward_funcs has 2 functions (short, right): say which one"),
        ("wrong", ["short", "right"], "one of the reward functions (short, right), got 'wrong'"),
        ("right", ["right", "right"], "one of the reward functions (right, right), got 'right'"),
        (2, ["short", "right"], "one of the reward functions (short, right), got 2"),
        (-1, ["short", "right"], "one of the reward functions (short, right), got -1"),
    ],
)
def test_refuses_positions(wanted: Any, names: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        RewardSettings(correctness=wanted).position_of_correctness(names)
