"""Groups spread over ranks: the weights of one process bit for bit, counted bytes, failing ranks."""

from __future__ import annotations

import math
import os
import time
from collections import defaultdict
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import ranks
from problems import Text
from shear_ops import HiddenBank, SpanConfig, Weighting, distributed, span_weights
from shear_ops.ops.api import PairCounts
from shear_ops.training.metrics import log_weights

CONFIG = SpanConfig(span=16, stride=5)
GROUPS = 5
SIZE = 4

# Group 3 is all correct, group 4 has one label and an ignored rollout; one rollout has no tokens.
LENGTHS = (60, 75, 52, 64, 33, 80, 0, 41, 20, 90, 17, 16, 50, 40, 30, 20, 70, 10, 25, 35)
LABELS = (1, 0, 0, 1, 0, 1, 0, 0, 1, 1, 0, -1, 1, 1, 1, 1, 0, 0, -1, 0)


def rollouts(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [states.to(dtype) for states in Text(3, 24).rollouts(*LENGTHS)]


def batch(places: list[int], dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    states = rollouts(dtype)
    return {
        "hidden": torch.cat([torch.empty(0, 24, dtype=dtype), *(states[i] for i in places)]),
        "cu_seqlens": torch.tensor([0, *(LENGTHS[i] for i in places)]).cumsum(0),
        "group_ids": [100 - i // SIZE for i in places],
        "labels": [LABELS[i] for i in places],
        "config": CONFIG,
    }


def by_rollout(weights: Tensor, places: list[int]) -> dict[int, Tensor]:
    parts = weights.split([LENGTHS[i] for i in places])
    return dict(zip(places, parts, strict=True))


def plain(dtype: torch.dtype) -> dict[int, Tensor]:
    everything = list(range(GROUPS * SIZE))
    return by_rollout(span_weights(**batch(everything, dtype)), everything)


def scattered(rank: int, size: int) -> list[int]:
    """Every rank has another number of rollouts in another order; the last of several has none."""
    holders = max(1, size - 1) if size > 2 else size
    order = torch.randperm(GROUPS * SIZE, generator=torch.Generator().manual_seed(size)).tolist()
    return [i for i in order if (i * i) % holders == rank]


def weigh(rank: int, dtype: torch.dtype) -> tuple[dict[int, Tensor], Any]:
    places = scattered(rank, dist.get_world_size())
    found = distributed.span_weights(**batch(places, dtype), sample_ids=places)
    return by_rollout(found.weights, places), found[1:]


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_as_one_process(size: int) -> None:
    for dtype in (torch.float32, torch.bfloat16) if size == 3 else (torch.bfloat16,):
        wanted = plain(dtype)
        found: dict[int, Tensor] = {}
        for weights, (states_sent, weights_sent, groups, mixed, pairs) in ranks.run(
            size, weigh, dtype
        ):
            found |= weights
            assert (groups, mixed, pairs.stopped) == (5, 3, 0)
            assert (states_sent, weights_sent) == (0, 0) or size > 1
        assert sorted(found) == list(range(GROUPS * SIZE))
        assert all(torch.equal(found[i], wanted[i]) for i in wanted)
        assert sum(bool((w != 1).any()) for w in found.values()) == 10  # not vacuous


def test_without_torch_distributed() -> None:
    places = scattered(0, 1)
    found = distributed.span_weights(**batch(places))
    wanted = plain(torch.float32)
    assert all(torch.equal(w, wanted[i]) for i, w in by_rollout(found.weights, places).items())
    assert found[1:5] == (0, 0, 5, 3)


def test_padded_layout() -> None:
    arguments = batch(list(range(4)))
    mask = torch.zeros(4, 100, dtype=torch.bool)
    hidden = torch.full((4, 100, 24), torch.nan)
    for i, states in enumerate(rollouts()[:4]):
        mask[i, i : i + 2 * len(states) : 2] = True  # holes
        places = mask[i].nonzero()[:, 0]
        mask[i, places[len(states) :]] = False
        hidden[i, mask[i]] = states[: len(places)]
    del arguments["cu_seqlens"], arguments["hidden"]
    found = distributed.span_weights(hidden, mask=mask, **arguments)
    assert torch.equal(found.weights, span_weights(hidden, mask=mask, **arguments))


def bank_and_weigh(rank: int, known: bool) -> tuple[dict[int, Tensor], int, int]:
    places = scattered(rank, dist.get_world_size())
    everything = batch(places)
    mixed = (
        distributed.mixed_groups(everything["group_ids"], everything["labels"]) if known else None
    )
    bank = HiddenBank(mixed_groups=mixed)
    for part in (places[:3], places[3:4], [], places[4:]):
        arguments = batch(part)
        del arguments["config"]
        bank.add(**arguments, sample_ids=part)
    nbytes = bank.nbytes
    found = bank.finalize(config=CONFIG)
    assert len(bank) == 0
    assert list(found.weights) == places
    return found.weights, nbytes, found.states_sent


@pytest.mark.parametrize("known", [False, True])
def test_bank_over_ranks(known: bool) -> None:
    wanted = plain(torch.float32)
    found: dict[int, Tensor] = {}
    stored = 0
    for weights, nbytes, _ in ranks.run(2, bank_and_weigh, known):
        found |= weights
        stored += nbytes
    assert all(torch.equal(found[i], wanted[i]) for i in range(GROUPS * SIZE))
    taking = [i for i, label in enumerate(LABELS) if label >= 0 and (not known or i < 12)]
    assert stored == sum(LENGTHS[i] for i in taking) * 24 * 4


def one_rollout_per_rank(rank: int, tokens: int, dim: int, labels: list[int]) -> Any:
    hidden = torch.full((tokens, dim), float(rank + 1), dtype=torch.bfloat16)
    hidden[:, 0] = torch.arange(tokens)
    return distributed.span_weights(
        hidden, cu_seqlens=torch.tensor([0, tokens]), group_ids=[7], labels=[labels[rank]],
        config=CONFIG,
    )[1:5]  # fmt: skip


def mixed_and_not(rank: int, tokens: int, dim: int, labels: list[int], weigh: bool) -> Any:
    if not weigh:  # the bytes of a size that takes minutes to compute on two cores
        nothing = PairCounts(0, 0, 0, 0, 0)
        distributed.api.span_weights = lambda hidden, **_: (torch.ones(hidden.shape[0]), nothing)
    return [
        one_rollout_per_rank(rank, tokens, dim, some)
        for some in (labels, [labels[0]] * len(labels))
    ]


@pytest.mark.parametrize(
    ("labels", "tokens", "dim", "weigh"),
    [([1, 0, 0, 1], 30, 56, True), ([1, 0, 0, 1, 0, 1, 1, 0], 3000, 3584, False)],
    ids=["small", "paper"],
)
def test_bytes_over_the_wire(labels: list[int], tokens: int, dim: int, weigh: bool) -> None:
    """Each state that is not at its owner travels once; nothing for a group with one label."""
    size = len(labels)
    found = ranks.run(size, mixed_and_not, tokens, dim, labels, weigh)
    mixed, one_label = zip(*found, strict=True)
    sent = sum(states for states, _, _, _ in mixed)
    assert sent == (size - 1) * tokens * dim * 2
    assert sent == 150_528_000 or size == 4
    assert sum(weights for _, weights, _, _ in mixed) == (size - 1) * tokens * 4
    assert [counts[:2] for counts in one_label] == [(0, 0)] * size


def groups_on(ranks: dict[int, list[int]], tokens: dict[int, int]) -> dict[int, list[Any]]:
    """Groups with alternating labels, by the rank that holds each rollout."""
    return {
        group: [
            distributed.Rollout(
                group=group, sample=i, label=i % 2, tokens=tokens[group], rank=rank, place=0
            )
            for i, rank in enumerate(holders)
        ]
        for group, holders in ranks.items()
    }


def test_whole_groups_stay_where_they_are() -> None:
    ranks, tokens = {g: [g % 2] * 4 for g in range(6)}, {g: 50 + g for g in range(6)}
    assert distributed._owners(groups_on(ranks, tokens), 2) == {g: g % 2 for g in range(6)}


def test_owners_share_the_work() -> None:
    ranks, tokens = {g: [0, 1, 2, 3] for g in range(8)}, dict.fromkeys(range(8), 50)
    owners = list(distributed._owners(groups_on(ranks, tokens), 4).values())
    assert sorted(owners) == [0, 0, 1, 1, 2, 2, 3, 3]


def fail_at(rank: int, how: str) -> None:
    arguments = batch([0, 1, 2] if rank else [3])
    sample_ids = [0, 1, 2] if rank else [3]
    if rank == 1:
        if how == "killed":
            os.kill(os.getpid(), 9)
        elif how == "absent":
            time.sleep(8)
            return
        elif how == "nan":
            arguments["hidden"][65, 3] = torch.nan
        elif how == "norm":
            arguments["hidden"][150] = 1e19
        elif how == "labels":
            arguments["labels"] = [2, 0, 1]
        elif how == "sample_ids":
            sample_ids = [0, 1]
        elif how == "duplicate":
            sample_ids = [0, 1, 3]
        elif how == "dtype":
            arguments["hidden"] = arguments["hidden"].bfloat16()
        elif how == "config":
            arguments["config"] = SpanConfig(span=15, stride=5)
        elif how == "step":
            arguments["step"] = "two"
    distributed.span_weights(**arguments, sample_ids=sample_ids)


FAILURES = {  # what rank 1 does: the messages of rank 0 and of rank 1
    "nan": (
        "could not compute token weights: ValueError: hidden must be finite",
        "hidden must be finite",
    ),
    "norm": ("at token 15 of rollout 2 of rank 1 (sample id 2, group 100)",) * 2,
    "labels": (
        "rank 1 of the process group could not compute token weights: ValueError: labels must",
        "labels",
    ),
    "sample_ids": ("rank 1 of the process group could not", "sample_ids must have 3 entries"),
    "duplicate": ("sample_ids must be unique within a group, got 3 twice", "got 3 twice"),
    "dtype": ("hidden must have one d and one dtype on all ranks", "one dtype"),
    "config": (
        "config.span must be the same on all ranks, got 16 on rank 0 and another value on rank 1",
        "config.span must be the same on all ranks, got 15 on rank 1 and another value on rank 0",
    ),
    "step": ("rank 1 of the process group could not", "step must be an int, got 'two'"),
}


def every_failure(rank: int) -> tuple[list[str], Tensor]:
    messages = []
    for how in FAILURES:
        try:
            fail_at(rank, how)
        except (RuntimeError, TypeError, ValueError) as error:
            messages.append(str(error))
    places = [0, 1, 2] if rank else [3]
    return messages, distributed.span_weights(**batch(places), sample_ids=places).weights


def test_error_of_one_rank_raises_on_all() -> None:
    """... and leaves the process group in order for the next call."""
    (first, before), (second, after) = ranks.run(2, every_failure)
    for seen, wanted in zip((first, second), zip(*FAILURES.values(), strict=True), strict=True):
        assert len(seen) == len(wanted)
        assert all(text in message for text, message in zip(wanted, seen, strict=True)), seen
        assert seen[0].endswith("larger at token 5 of rollout 1 of rank 1 (sample id 1, group 100)")
    wanted = plain(torch.float32)
    assert torch.equal(torch.cat([after, before]), torch.cat([wanted[i] for i in range(4)]))


@pytest.mark.parametrize("how", ["killed", "absent"])
def test_missing_rank_raises_within_the_timeout(how: str) -> None:
    first, second = ranks.run(2, fail_at, how, timeout=4)
    assert isinstance(first, RuntimeError)
    assert second is None


def settings_of(rank: int, equal: bool) -> list[Any]:
    """(config, weighting, backend) of a rank."""
    number = (int, float, np.float64)[rank]
    weighting = Weighting(clip=(number(0), number(3)), warmup_steps=4)
    config = SpanConfig(span=16, stride=5, reg=number(1), tol=np.float64(5e-3) if rank else 5e-3)
    if rank < 2 or equal:
        return [(config, weighting, None)]
    return [
        (replace(config, reg=1.0 + 2**-52), weighting, None),
        (config, replace(weighting, clip=(0, 2)), None),
        (config, replace(weighting, warmup_steps=3), None),
        (config, weighting, "cpu"),
    ]


def with_settings(rank: int) -> list[str]:
    messages = []
    given = batch([rank]) | {"sample_ids": [rank]}
    same, other = settings_of(rank, True), settings_of(rank, False)
    for config, weighting, backend in same + (other * 4 if rank < 2 else other):
        step = (2, np.int64(2), torch.tensor(2))[rank]
        given |= {"config": config, "weighting": weighting, "backend": backend, "step": step}
        try:
            distributed.span_weights(**given)
            messages.append("")
        except ValueError as error:
            messages.append(str(error))
    return messages


def test_settings_that_print_differently_are_equal() -> None:
    for messages in ranks.run(3, with_settings):
        assert messages[0] == ""
        assert len(messages) == 5
        names = ("config.reg", "weighting.clip", "weighting.warmup_steps", "backend")
        for name, message in zip(names, messages[1:], strict=True):
            assert message.startswith(f"{name} must be the same on all ranks, got")


def finalize_with(rank: int) -> list[str]:
    messages = []
    for mixed in (
        ([1, 2], {2, 1}),
        ([], frozenset()),
        (None, None),
        ({1, 2}, {2}),
        ({1}, None),
        (None, {}),
    ):
        try:
            HiddenBank(mixed_groups=mixed[rank]).finalize()
            messages.append("")
        except ValueError as error:
            messages.append(str(error))
    return messages


def test_mixed_groups_that_differ_between_ranks() -> None:
    """Whatever the bank has: here nothing."""
    first, second = ranks.run(2, finalize_with)
    assert first[:3] == second[:3] == ["", "", ""]
    wanted = "mixed_groups must be the same on all ranks"
    assert all(message.startswith(wanted) for message in first[3:] + second[3:])
    assert first[3].endswith("on some rank: [1, 2]")
    assert second[4].endswith("on some rank: None")


def empty_in_float64(rank: int) -> tuple[Tensor, Tensor]:
    """Rank 1 has no rollouts, and another default dtype."""
    given = batch(list(range(4)), torch.bfloat16)
    bank = HiddenBank()
    if rank:
        torch.set_default_dtype(torch.float64)
        given = batch([]) | {"hidden": torch.empty(0, 1)}
        assert given["hidden"].dtype == torch.float64
    alone = distributed.span_weights(**given).weights
    del given["config"]
    bank.add(**given, sample_ids=range(len(given["labels"])))
    banked = bank.finalize(config=CONFIG).weights.values()
    return alone, torch.cat([alone[:0], *banked])


def test_empty_rank_in_another_default_dtype() -> None:
    (first, banked), (second, nothing) = ranks.run(2, empty_in_float64)
    wanted = span_weights(**batch(list(range(4)), torch.bfloat16))
    assert torch.equal(first, wanted)
    assert torch.equal(banked, wanted)
    assert second.shape == nothing.shape == (0,)
    assert second.dtype == nothing.dtype == torch.float32


def outside(rank: int) -> str:
    group = dist.new_group([0])
    if rank == 0:
        return ""
    with pytest.raises(ValueError, match="process_group must contain this process"):
        distributed.span_weights(**batch([0, 1]), process_group=group)
    return "refused"


def test_rank_outside_the_process_group() -> None:
    assert ranks.run(2, outside) == ["", "refused"]


def weights_of(weighting: Weighting, step: int = 0) -> Tensor:
    arguments = batch(list(range(GROUPS * SIZE)))
    return distributed.span_weights(**arguments, weighting=weighting, step=step).weights


def test_weighting() -> None:
    default = weights_of(Weighting())
    assert torch.equal(default, torch.cat([*plain(torch.float32).values()]))
    one_label = slice(sum(LENGTHS[:12]), None)
    mean_one = by_rollout(weights_of(Weighting(mean_one=True)), list(range(GROUPS * SIZE)))
    for g in range(3):
        tokens = torch.cat([mean_one[i] for i in range(4 * g, 4 * g + 4) if LABELS[i] >= 0])
        assert tokens.mean().item() == pytest.approx(1, abs=1e-6)
    assert torch.equal(mean_one[11], torch.ones(16))  # ignored
    clipped = weights_of(Weighting(clip=(0.3, 0.5)))
    assert torch.equal(clipped[: one_label.start].clamp(0.3, 0.5)[:60], clipped[:60])
    assert torch.equal(clipped[one_label], default[one_label])
    warm = [weights_of(Weighting(warmup_steps=4), step) for step in (0, 1, 4, 9)]
    assert torch.equal(warm[0], torch.ones_like(default))
    assert torch.allclose(warm[1], 1 + (default - 1) / 4)
    assert torch.equal(warm[2], default)
    assert torch.equal(warm[3], default)


def test_mean_one_of_identical_rollouts() -> None:
    hidden = rollouts()[0].repeat(2, 1)
    arguments: dict[str, Any] = {"cu_seqlens": torch.tensor([0, 60, 120]), "group_ids": [0, 0]}
    found = distributed.span_weights(
        hidden, **arguments, labels=[1, 0], config=CONFIG, weighting=Weighting(mean_one=True)
    )
    assert bool(found.weights.isfinite().all())
    assert torch.equal(Weighting(mean_one=True).apply(torch.zeros(3), 0), torch.ones(3))


@pytest.mark.parametrize(
    "weighting",
    [Weighting(mean_one=True), Weighting(clip=(0.5, 2)), Weighting(warmup_steps=4),
     Weighting(mean_one=True, clip=(0.5, 2), warmup_steps=4)],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("step", [0, 3, 4])
def test_nan_stays_nan(weighting: Weighting, step: int) -> None:
    """Of the operator with check_finite=False; other groups keep their weights."""
    given = batch(list(range(8)))
    options = {"weighting": weighting, "step": step}
    wanted = distributed.span_weights(**given, **options).weights
    given["config"] = SpanConfig(span=16, stride=5, check_finite=False)
    given["hidden"][70, 3] = torch.inf
    found = distributed.span_weights(**given, **options).weights
    second = sum(LENGTHS[:4])
    assert bool(found[:second].isnan().all())
    assert torch.equal(found[second:], wanted[second:])
    some = torch.tensor([1.0, torch.nan, 0.0])
    assert bool(weighting.apply(some, step)[1].isnan())


class Alone:
    """What metrics need of accelerate.Accelerator, for two ranks of which one has 3 tokens more."""

    def pad_across_processes(self, tensor: Tensor, pad_index: float) -> Tensor:
        return torch.cat([tensor, tensor.new_full((3,), pad_index)])

    def gather(self, tensor: Tensor) -> Tensor:
        return torch.cat([torch.arange(6.0), tensor])


def test_metrics_leave_out_padding_and_show_nan() -> None:
    pairs = PairCounts(total=100, bounded=50, abandoned=10, solved=40, stopped=8)
    found = distributed.GroupWeights(torch.empty(0), 0, 0, groups=4, mixed_groups=1, pairs=pairs)
    logged: dict[str, list[float]] = defaultdict(list)
    log_weights(Alone(), torch.tensor([0.0, 9.0, 6.0]), found, logged)
    assert logged["shear/mixed_groups"] == [0.25]
    assert logged["shear/stopped"] == [0.2]
    assert logged["shear/weight_mean"] == [pytest.approx(30 / 9)]
    assert (logged["shear/weight_max"], logged["shear/weight_p95"]) == ([9], [9])
    log_weights(Alone(), torch.tensor([0.0, torch.nan, 6.0]), found, logged)
    assert math.isnan(logged["shear/weight_mean"][1])
    assert math.isnan(logged["shear/weight_max"][1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mean_one": 1}, "mean_one must be a bool"),
        ({"clip": (2.0, 1.0)}, "clip must be"),
        ({"clip": (-1.0, 1.0)}, "clip must be"),
        ({"clip": (0.0, float("nan"))}, "clip must be"),
        ({"clip": 3}, "clip must be .low, high. or None, got 3"),
        ({"clip": "12"}, "clip must be .low, high. or None, got '12'"),
        ({"clip": ("0.5", "2")}, "clip must be .low, high. or None"),
        ({"clip": (1, 2, 3)}, "clip must be .low, high., got .1, 2, 3."),
        ({"warmup_steps": -1}, "warmup_steps must be at least 0"),
        ({"warmup_steps": 1.5}, "warmup_steps must be an int"),
    ],
)
def test_weighting_is_checked(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        Weighting(**arguments)


def test_weighting_steps_and_lists() -> None:
    assert Weighting(clip=[0.5, 2]) == Weighting(clip=(0.5, 2))  # type: ignore[arg-type]
    weights = torch.tensor([3.0])
    with pytest.raises(ValueError, match="step must be at least 0, got -5"):
        Weighting(warmup_steps=2).apply(weights, -5)
    with pytest.raises(TypeError, match="step must be an int, got None"):
        Weighting().apply(weights, None)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [1e-45, 1.0, 3e38])
def test_mean_one_of_weights_whose_sum_leaves_float32(value: float) -> None:
    weights = torch.full((5,), value)
    torch.testing.assert_close(Weighting(mean_one=True).apply(weights, 0), torch.ones(5))


def test_mixed_groups_refuses() -> None:
    assert distributed.mixed_groups([3, 3, 4, 4], [1, 0, 1, -1]) == {3}
    with pytest.raises(ValueError, match="labels must be 1, 0 or -1, got 2"):
        distributed.mixed_groups([3, 3], [2, 0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_weights_are_float32_whatever_the_default(dtype: torch.dtype) -> None:
    given = batch([0, 1])
    torch.set_default_dtype(dtype)
    try:
        found = distributed.span_weights(**given)
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.weights.dtype == torch.float32


@pytest.mark.parametrize(("place", "token"), [(0, 59), (5, 7), (7, 0)])
def test_bank_names_what_is_not_finite(place: int, token: int) -> None:
    """As it was added: in another order than that of the sample ids, in parts."""
    bank = HiddenBank()
    order = [7, 2, 0, 3, 5, 1, 4]
    for part in (order[:3], order[3:6], order[6:]):
        arguments = batch(part)
        if place in part:
            before = sum(LENGTHS[i] for i in part[: part.index(place)])
            arguments["hidden"][before + token] = -torch.inf
        del arguments["config"]
        bank.add(**arguments, sample_ids=[1000 + i for i in part])
    where = rf"token {token} of rollout {order.index(place)} of rank 0 \(sample id {1000 + place}, group {100 - place // 4}\)$"
    with pytest.raises(ValueError, match=f"^hidden must be finite .*, got NaN, Inf .* at {where}"):
        bank.finalize(config=CONFIG)


def test_bank_refuses() -> None:
    with pytest.raises(ValueError, match="storage must be one of device, cpu, got 'disk'"):
        HiddenBank(storage="disk")
    bank = HiddenBank()
    arguments = batch([0, 1])
    del arguments["config"]
    bank.add(**arguments, sample_ids=[0, 1])
    with pytest.raises(ValueError, match=r"new and unique, got \[1, 2\], known: \[1\]"):
        bank.add(**arguments, sample_ids=[1, 2])
    with pytest.raises(ValueError, match=r"d = 24 and torch.float32 as before"):
        bank.add(**{**arguments, "hidden": arguments["hidden"][:, :8]}, sample_ids=[2, 3])
    for change, error, message in (
        ({"hidden": None}, TypeError, "hidden must be a torch.Tensor"),
        ({"cu_seqlens": arguments["cu_seqlens"] + 2}, ValueError, "cu_seqlens must start at 0"),
        ({"cu_seqlens": arguments["cu_seqlens"].flip(0)}, ValueError, "cu_seqlens must"),
        ({"labels": [2, 0]}, ValueError, "labels must be 1, 0 or -1, got 2"),
    ):
        with pytest.raises(error, match=message):
            bank.add(**{**arguments, **change}, sample_ids=[2, 3])
    assert len(bank) == 2
