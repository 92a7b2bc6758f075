"""Settings of trainers: what a section of a configuration file may say."""

from __future__ import annotations

import re
from typing import Any

import pytest

from shear_ops import SpanConfig, Weighting
from shear_ops.training.settings import RewardSettings, Settings


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
        ({"treshold": 1}, "shear.* must be among threshold, align, spans, weighting, got treshold"),
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
