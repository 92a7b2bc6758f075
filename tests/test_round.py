"""From rewards to laid out weights, without a trainer: what each rank and micro-batch may lack."""

from __future__ import annotations

import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import ranks
from problems import Text
from shear_ops import SpanConfig, Weighting, distributed, span_distances, span_weights
from shear_ops.ops.api import PairCounts
from shear_ops.training import bank
from shear_ops.training import round as round_module
from shear_ops.training.round import Rollouts, Round, lay_back, weigh
from shear_ops.training.settings import Settings

SETTINGS = Settings(spans=SpanConfig(span=16, stride=5))
SIZE = 4
NAN = float("nan")

# Group 2 is all correct; rollout 1 is unscorable, rollout 6 ignored, rollout 7 without tokens.
LENGTHS = (60, 45, 52, 64, 33, 50, 30, 0, 41, 20, 39, 17)
REWARDS = (1.0, NAN, 0.2, 0.5, 0.0, 2.0, 1.0, 0.0, 1.0, 1.0, 0.7, 1.0)
IGNORED = 6
LABELS = [1, -1, 0, 1, 0, 1, -1, 0, -1, -1, -1, -1]  # a group of one label takes no part


def states() -> list[Tensor]:
    return list(Text(3, 24).rollouts(*LENGTHS))


def wanted() -> dict[int, Tensor]:
    weights = span_weights(
        torch.cat(states()), cu_seqlens=torch.tensor([0, *LENGTHS]).cumsum(0),
        group_ids=[i // SIZE for i in range(len(LENGTHS))], labels=LABELS, config=SETTINGS.spans,
    )  # fmt: skip
    return dict(enumerate(weights.split(LENGTHS)))


def scored(places: list[int], rewards: Any = REWARDS) -> Rollouts:
    return Rollouts.scored(
        torch.tensor([rewards[i] for i in places]),
        SETTINGS.threshold,
        sample_ids=places,
        group_ids=[i // SIZE for i in places],
        ignored=[i == IGNORED for i in places],
    )


def run(
    places: list[int], settings: Settings = SETTINGS, step: int = 0, group_size: int | None = None
) -> Any:
    """A round of micro-batches of three rollouts, the last ones first."""
    rollouts, made, own = scored(places), Round(settings, group_size), states()
    order = list(range(len(places)))[::-1]
    for first in range(0, len(order), 3):
        part = order[first : first + 3]
        hidden = torch.cat([own[places[i]] for i in part])
        made.add(hidden, [LENGTHS[places[i]] for i in part], rollouts.at(part))
    assert len(made) == len(places)
    assert (made._bank.nbytes == 0) is (group_size is not None or not places)
    found = made.finish(step)
    assert len(made) == 0
    return found


@pytest.mark.parametrize("group_size", [None, SIZE])
def test_one_process(group_size: int | None) -> None:
    everything = list(range(len(LENGTHS)))
    assert scored(everything) == Rollouts(everything, [i // SIZE for i in everything], LABELS)
    assert scored(everything).mixed_share == pytest.approx(2 / 3)
    found, weights = run(everything, group_size=group_size), wanted()
    assert (found.groups, found.mixed_groups) == (3, 2)
    assert sorted(found.weights) == everything
    assert all(torch.equal(found.weights[i], weights[i]) for i in everything)
    moved = [i for i in everything if bool((weights[i] != 1).any())]
    assert moved == [0, 2, 3, 4, 5]  # not vacuous


def test_weigh_equals_a_round() -> None:
    everything = list(range(len(LENGTHS)))
    found = weigh(SETTINGS, torch.cat(states()), torch.tensor(LENGTHS), scored(everything), 0)
    assert torch.equal(found.weights, torch.cat(list(wanted().values())))
    assert (found.groups, found.mixed_groups) == (3, 2)


def test_settings_and_step_are_used() -> None:
    settings = Settings(spans=SETTINGS.spans, weighting=Weighting(warmup_steps=4))
    everything, full = list(range(len(LENGTHS))), wanted()
    for step, share in ((0, 0.0), (1, 0.25), (4, 1.0)):
        by_round = run(everything, settings, step).weights
        at_once = weigh(settings, torch.cat(states()), LENGTHS, scored(everything), step).weights
        for found in (by_round, dict(enumerate(at_once.split(LENGTHS)))):
            for i in everything:
                torch.testing.assert_close(found[i], 1 + share * (full[i] - 1))


def test_pairs_stopped_on_any_rank_are_told_to_all() -> None:
    for found in (run(list(range(len(LENGTHS)))), *ranks.run(3, stopped_on_rank)):
        if isinstance(found, Exception):
            raise found
        pairs = found if isinstance(found, PairCounts) else found.pairs
        pairs_wanted = span_distances(
            torch.cat(states()), cu_seqlens=torch.tensor([0, *LENGTHS]).cumsum(0),
            group_ids=[i // SIZE for i in range(len(LENGTHS))], labels=LABELS,
            config=SETTINGS.spans,
        ).pairs  # fmt: skip
        assert pairs.total == pairs_wanted.total == pairs.bounded + pairs.abandoned + pairs.solved
        assert (pairs.stopped > 0) is isinstance(found, PairCounts)


def stopped_on_rank(rank: int) -> PairCounts:
    places = [i for i in range(len(LENGTHS)) if i % 2 == rank] if rank < 2 else []
    return run(places, Settings(spans=replace(SETTINGS.spans, n_iters=1, tol=0.0))).pairs


def on_rank(rank: int) -> tuple[dict[int, Tensor], list[int], int]:
    """Groups straddle ranks 0 and 1; rank 2 has no rollouts."""
    places = [i for i in range(len(LENGTHS)) if i % 2 == rank] if rank < 2 else []
    labels = scored(places).labels
    found = run(places)
    assert (found.groups, found.mixed_groups) == (3, 2)
    return found.weights, labels, found.states_sent


def test_ranks_with_an_empty_one() -> None:
    results = ranks.run(3, on_rank)
    for result in results:
        if isinstance(result, Exception):
            raise result
    found = results[0][0] | results[1][0]
    assert results[2][:2] == ({}, [])
    assert [results[i % 2][1][i // 2] for i in range(len(LENGTHS))] == LABELS
    assert all(torch.equal(found[i], weights) for i, weights in wanted().items())
    assert sum(sent for *_, sent in results) > 0


def test_without_rollouts() -> None:
    assert scored([]) == Rollouts([], [], [])
    found = run([])
    assert (found.weights, found.groups, found.mixed_groups) == ({}, 0, 0)
    at_once = weigh(SETTINGS, torch.empty(0, 24), [], scored([]), 0)
    assert at_once.weights.shape == (0,)


def test_no_mixed_group_stores_nothing_and_weighs_one() -> None:
    """Not even looked at: the states are NaN."""
    places = list(range(4))
    rollouts = scored(places, [1.0, NAN, 1.0, 0.9])
    assert rollouts.labels == [-1] * 4
    assert rollouts.mixed_share == 0
    made = Round(SETTINGS)
    lengths = LENGTHS[:4]
    made.add(torch.full((sum(lengths), 24), torch.nan), lengths, rollouts)
    assert made._bank.nbytes == 0
    found = made.finish(0)
    assert (found.groups, found.mixed_groups) == (1, 0)
    assert all(torch.equal(found.weights[i], torch.ones(lengths[i])) for i in places)


@pytest.fixture
def one_rank(tmp_path: Any) -> Iterator[dist.ProcessGroup]:
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield dist.new_group([0])
    dist.destroy_process_group()


def test_process_group_reaches_every_collective(
    one_rank: dist.ProcessGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    real = distributed.Link

    class Link(real):  # type: ignore[misc, valid-type]
        def __init__(self, process_group: Any, device: torch.device) -> None:
            seen.append(process_group)
            super().__init__(process_group, device)

    for module in (distributed, bank):
        monkeypatch.setattr(module, "Link", Link)
    rollouts = Rollouts.scored(
        torch.tensor([1.0, 0.0]), 0.5, sample_ids=[0, 1], group_ids=[7, 7], process_group=one_rank
    )
    made = Round(SETTINGS)
    made.add(torch.cat(states()[:2]), LENGTHS[:2], rollouts)
    made.finish(0, one_rank)
    assert seen == [one_rank] * 3


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(round_module, "watch", round_module.Watch())


def score(*rewards: float, steps: int = 1) -> list[str]:
    """Warnings of some steps with groups of two."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(steps):
            places = range(len(rewards))
            given = torch.tensor(rewards)
            Rollouts.scored(given, 0.5, sample_ids=places, group_ids=[i // 2 for i in places])
    return [str(warning.message) for warning in seen]


@pytest.mark.parametrize(
    ("rewards", "message"),
    [((-3.0, -0.25, NAN, 0.125), "from -3 to 0.125, and a .* threshold = 0.5 on: none was: set threshold between"),
     ((1.0, 2.0), "from 1 to 2, and .*: all were: set threshold"),
     ((1.0, 1.0, 0.0, NAN), "from 0 to 1, and .*: within each group all were, or none"),
     ((NAN, NAN), "never a number, and .*: none was scored")],
)  # fmt: skip
def test_warns_once_without_a_mixed_group(
    rewards: tuple[float, ...], message: str, watched: None
) -> None:
    assert score(*rewards, steps=9) == []
    assert score(steps=20) == []  # of no rollouts
    (warning,) = score(*rewards, steps=50)
    assert "no group had correct and incorrect rollouts in the first 10 steps" in warning
    assert re.search(message, warning)
    assert score(*rewards, steps=50) == []


def test_does_not_warn_after_a_mixed_group(watched: None) -> None:
    assert score(0.0, 0.0, steps=9) == []
    assert score(0.0, 1.0) == []
    assert score(0.0, 0.0, steps=50) == []


def test_evaluation_does_not_count(watched: None) -> None:
    """Neither do its steps warn, nor does a mixed group in it say that SHEAR is on."""
    for _ in range(50):
        evaluated = torch.tensor([0.0, 1.0])
        Rollouts.scored(evaluated, 0.5, sample_ids=[0, 1], group_ids=[0, 0], training=False)
    assert score(0.0, 0.0, steps=9) == []
    assert len(score(0.0, 0.0)) == 1


PROCESS = """
import sys, torch
from shear_ops.training.round import Rollouts
for reward in map(float, sys.argv[1:]):
    Rollouts.scored(torch.tensor([reward, 0.0]), 0.5, sample_ids=[0, 1], group_ids=[0, 0])
print("trained")
"""


@pytest.mark.parametrize(
    ("rewards", "said"),
    [("0 0 0.25", "in all of 3 steps, so all .* were from 0 to 0.25, .* none was: set threshold"),
     ("0", "in all of 1 step, "), ("0 1 0", ""), ("", ""), ("0 " * 12, "in the first 10 steps")],
)  # fmt: skip
def test_warns_at_the_end_of_a_short_run(rewards: str, said: str) -> None:
    """It was silent: smoke tests and short runs have fewer than ten steps."""
    command = [sys.executable, "-c", PROCESS, *rewards.split()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, "trained\n")
    assert done.stderr.count("UserWarning: no group had correct and incorrect") == bool(said)
    assert re.search(said, done.stderr)


def test_at() -> None:
    rollouts = Rollouts([5, 6, 7], [1, 1, 2], [0, 1, -1])
    assert len(rollouts) == 3
    assert rollouts.at([2, 0]) == Rollouts([7, 5], [2, 1], [-1, 0])
    assert rollouts.at(range(0)) == Rollouts([], [], [])
    with pytest.raises(IndexError):
        rollouts.at([3])


def test_add_refuses() -> None:
    made = Round(SETTINGS)
    with pytest.raises(ValueError, match="cu_seqlens"):
        made.add(torch.zeros(5, 2), [2, 2], Rollouts([0, 1], [0, 0], [1, 0]))
    with pytest.raises(ValueError, match="labels must have 2 entries"):
        made.add(torch.zeros(4, 2), [2, 2], Rollouts([0, 1], [0, 0], [1]))


def test_scored_refuses() -> None:
    with pytest.raises(ValueError, match="zip"):
        Rollouts.scored(torch.ones(2), 0.5, sample_ids=[0, 1], group_ids=[0, 0], ignored=[True])
    with pytest.raises(ValueError, match="labels must have 1 entries, got 2"):
        Rollouts.scored(torch.ones(2), 0.5, sample_ids=[0, 1], group_ids=[0])


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64])
def test_lay_back(dtype: torch.dtype) -> None:
    mask = torch.tensor([[0, 1, 0, 1], [0, 0, 0, 0], [1, 1, 1, 0]], dtype=dtype)
    parts = [torch.tensor([2.0, 3.0]), torch.empty(0), torch.tensor([4.0, 5.0, 6.0])]
    rows = torch.tensor([[1.0, 2, 1, 3], [1, 1, 1, 1], [4, 5, 6, 1]])
    assert torch.equal(lay_back(parts, mask), rows)
    assert torch.equal(lay_back([torch.cat(parts)], mask), rows)
    assert torch.equal(lay_back(iter(parts[:1]), mask[0]), rows[0])
    assert torch.equal(lay_back([], mask[1]), torch.ones(4))
    assert lay_back([], mask[:0]).shape == (0, 4)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_lay_back_refuses(count: int) -> None:
    with pytest.raises(ValueError, match=f"mask must have {count} ones, one per weight, got 2"):
        lay_back([torch.full((count,), 2.0)], torch.tensor([1, 0, 1]))
