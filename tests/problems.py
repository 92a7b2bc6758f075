"""Named problems that every backend solves: small, from fixed seeds, each with one difficulty."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from bench.language import Text
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, eq=False)
class Problem:
    """Arguments of one call of span_weights.

    ``slow_mixing``: some of its span pairs take hundreds of iterations, so that two backends stop at
    other ones and differ by more than rounding.
    """

    name: str
    hidden: Tensor  # (N, d) float32
    cu_seqlens: Tensor
    group_ids: Tensor
    labels: Tensor
    config: dict[str, Any] = field(default_factory=dict)
    slow_mixing: bool = False

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """Those in which the states stay finite and different from 0."""
        largest = self.hidden.abs().max().item() if self.hidden.numel() else 0.0
        half = largest == 0 or 2**-14 <= largest < 65504
        return DTYPES if half else DTYPES[:2]

    def arguments(self, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """The tensors, with the states rounded to dtype."""
        return {
            "hidden": self.hidden.to(dtype),
            "cu_seqlens": self.cu_seqlens,
            "group_ids": self.group_ids,
            "labels": self.labels,
        }

    def __str__(self) -> str:
        return self.name


def problem(
    name: str,
    rollouts: Sequence[Tensor],
    labels: Sequence[int],
    group_ids: Sequence[int] | None = None,
    *,
    slow_mixing: bool = False,
    **config: Any,
) -> Problem:
    """One group unless group_ids are given; spans of 16 every 5 tokens unless config says."""
    return Problem(
        name,
        torch.cat(list(rollouts)) if rollouts else torch.zeros(0, 5),
        torch.tensor([0, *(len(r) for r in rollouts)]).cumsum(0),
        torch.tensor([0] * len(labels) if group_ids is None else group_ids, dtype=torch.int64),
        torch.tensor(labels, dtype=torch.int64),
        {"span": 16, "stride": 5, **config},
        slow_mixing,
    )


def _lengths_and_spans() -> list[Problem]:
    many = Text(1).rollouts(60, 75, 52, 64)
    both = [1, 0, 0, 1]
    no_tokens = torch.zeros(0, 64)
    return [
        problem("text", many, both),
        problem("ragged tails", Text(2).rollouts(17, 20, 33, 49), both, span=16, stride=16),
        problem("ragged tails, overlapping", Text(3).rollouts(17, 30, 34, 53), both),
        problem("rollouts shorter than a span", Text(4).rollouts(3, 7, 15, 1), both),
        problem("short and long rollouts", Text(5).rollouts(2, 90, 70, 5), both),
        problem(
            "rollouts without tokens",
            [no_tokens, *Text(6).rollouts(30, 0, 41, 22), no_tokens],
            [1, 1, 1, 0, 0, 0],
        ),
        problem("opposing rollouts without tokens", Text(7).rollouts(30, 0, 25), [1, 0, 1]),
        problem("rollouts of one token", Text(8).rollouts(1, 1, 1, 1, 1), [1, 0, 0, 1, 1]),
        problem("rollouts of one span", Text(9).rollouts(16, 16, 16, 16), both),
        problem("one token more than a span", Text(10).rollouts(17, 17), [1, 0]),
        problem("odd lengths", Text(11).rollouts(1, 2, 63, 129, 151), [1, 0, 1, 0, 1], reg=0.05),
        problem("spans side by side", many, both, span=16, stride=16),
        problem("spans of one token", Text(12).rollouts(30, 41), [1, 0], span=1, stride=1),
        problem("spans of two tokens", Text(13).rollouts(25, 30), [0, 1], span=2, stride=1),
        problem("stride of one", Text(14).rollouts(32, 29), [1, 0], span=12, stride=1, reg=0.05),
        problem("spans of 50 every 30", Text(15).rollouts(131, 90), [1, 0], span=50, stride=30),
        problem("spans of 7 every 3", Text(16).rollouts(40, 33, 51), [1, 0, 0], span=7, stride=3),
        problem("spans of 33 every 8", Text(17).rollouts(80, 71), [0, 1], span=33, stride=8),
        problem("paper spans", Text(18).rollouts(260, 199), [1, 0], span=100, stride=25),
        problem(
            "paper spans, odd lengths",
            Text(19).rollouts(1, 63, 129, 151),
            [0, 1, 0, 1],
            span=100,
            stride=25,
        ),
    ]


def _near_and_equal_tokens() -> list[Problem]:
    text = Text(30)
    prefix, tails = text(25), text.rollouts(30, 24, 37, 20)
    shared = [torch.cat([prefix, tail]) for tail in tails]
    one = text(40)
    shuffled = torch.cat([s[torch.randperm(20, generator=text.generator)] for s in one.split(20)])
    clean = Text(31, drift=0.0, noise=0.0, vocabulary=12)
    other = text(40)
    return [
        problem("shared prefix", shared, [1, 0, 1, 0]),
        problem(
            "shared prefix, span 40", shared, [1, 0, 1, 0], span=40, stride=10, slow_mixing=True
        ),
        problem("shared prefix, reg 0.1", shared, [1, 0, 1, 0], reg=0.1, slow_mixing=True),
        problem("shared prefix, offset", [s + 1000 for s in shared], [1, 0, 1, 0]),
        problem("identical rollouts", [one, one, one], [1, 0, 0]),
        problem("identical spans, shuffled", [one, shuffled], [1, 0], span=20, stride=20),
        problem("repeated tokens", clean.rollouts(45, 50, 38), [0, 1, 0], slow_mixing=True),
        problem(
            "rollouts of one repeated token",
            [clean(1).repeat(t, 1) for t in (20, 31, 8)],
            [1, 0, 0],
        ),
        problem("near-duplicates 1e-3", [one, one + 1e-3 * text.normal(40, 64), other], [1, 0, 1]),
        problem("near-duplicates 1e-6", [one, one + 1e-6 * text.normal(40, 64), other], [1, 0, 1]),
        problem("offset 1000", [s + 1000 for s in tails], [1, 1, 0, 0]),
        problem("offset along one dimension", [_add(s, 3, 400.0) for s in tails], [1, 1, 0, 0]),
    ]


def _add(states: Tensor, dim: int, offset: float) -> Tensor:
    states = states.clone()
    states[:, dim] += offset
    return states


def _groups_and_labels() -> list[Problem]:
    huge, low = 2**62, -7
    mixed = Text(40).rollouts(30, 25, 41, 22, 36, 28, 33, 19, 27, 24)
    pairs = Text(41, dim=16).rollouts(*(10 + 7 * i % 13 for i in range(16)))
    return [
        problem("1 against 7", Text(42).rollouts(40, 22, 31, 18, 25, 29, 17, 33), [1] + [0] * 7),
        problem("7 against 1", Text(43).rollouts(22, 31, 18, 40, 25, 29, 17, 33), [1] * 7 + [0]),
        problem("all correct", Text(44).rollouts(40, 22), [1, 1]),
        problem("all incorrect", Text(45).rollouts(40, 22), [0, 0]),
        problem("all ignored", Text(46).rollouts(40, 22), [-1, -1]),
        # the ignored rollout has another scale, which must not enter the mean norm
        problem("ignored rollout", [100 * mixed[0], *mixed[1:4]], [-1, 1, 0, 1]),
        problem("ignored opposing set", mixed[:4], [1, 1, -1, 1]),
        problem(
            "interleaved groups",
            mixed,
            [1, 0, 0, 1, 1, 0, 0, -1, 1, 0],
            [huge, low, huge, low, -huge, low, huge, huge, 0, -huge],
        ),
        problem(
            "one group mixed, others not",
            mixed,
            [1, 1, -1, 0, 0, 0, 1, 0, -1, -1],
            [5, 5, 4, 3, 3, 2, 2, 4, 1, 1],
        ),
        problem("groups of two", pairs, [0, 1] * 8, [i // 2 for i in range(16)], reg=0.1),
        problem("no rollouts", [], []),
        problem("no tokens", [torch.zeros(0, 5)] * 3, [1, 0, -1]),
    ]


def _regularisation() -> list[Problem]:
    text = Text(50, noise=0.1).rollouts(40, 36, 31)
    labels = [1, 0, 0]
    return [
        *(
            problem(f"reg {reg}", text, labels, reg=reg, slow_mixing=reg < 0.02)
            for reg in (0.005, 0.01, 0.02, 0.05, 0.1, 0.5)
        ),
        problem(
            "reg 4.5 in units of cost",
            Text(51, dim=128, scale=13.0).rollouts(170, 125),
            [1, 0],
            span=100,
            stride=25,
            reg=4.5,
            reg_unit="cost",
        ),
        problem("two clusters", _clusters(13, 14), [1, 0], slow_mixing=True, span=30, stride=10),
        problem(
            "two clusters, reg 0.01",
            _clusters(12, 18),
            [1, 0],
            slow_mixing=True,
            span=30,
            stride=30,
            reg=0.01,
        ),
        problem("two clusters of equal mass", _clusters(15, 15), [1, 0], span=30, stride=30),
    ]


def _clusters(first: int, second: int) -> list[Tensor]:
    """Rollouts of 40 tokens in the same two tight clusters, but so many of 30 in the first."""
    text = Text(52, dim=16)
    rollouts = []
    for count in (first, second):
        states = 0.05 * text.normal(40, 16)
        states[torch.arange(40) % 30 < count] += 3
        rollouts.append(states)
    return rollouts


def _dimensions_and_scales() -> list[Problem]:
    labels = [1, 0, 0]
    small = Text(60).rollouts(30, 41, 22)
    zeros = torch.zeros(30, 8)
    outliers = Text(61, dim=256).rollouts(45, 38, 30)
    for states in outliers:  # like the massive activations of real models
        states[:, 7] += 60
        states[:, 100] *= 25
    scaled = [c * s for c, s in ((1, small[0]), (20, small[1]), (0.1, small[2]))]
    sink = Text(62).rollouts(30, 25, 34)
    for states in sink:  # the first token of a model's context
        states[0] = 40 * states[0].sign()
    return [
        *(
            problem(
                f"dim {dim}", Text(63 + dim, dim).rollouts(30, 25, 21), labels, slow_mixing=dim == 1
            )
            for dim in (1, 2, 3, 17, 129, 1000, 4096)
        ),
        *(
            problem(f"norms {norm:.0e}", [norm / 8 * s for s in small], labels)
            for norm in (1e6, 1e5, 1e4, 1e-4)
        ),
        problem("all states zero", [zeros, zeros[:20]], [1, 0]),
        problem("correct states zero", [zeros, Text(64, 8)(25)], [1, 0]),
        problem("rollouts of different scale", scaled, labels),
        problem("outlier dimensions", outliers, labels),
        problem("outlier tokens", sink, labels),
        problem("heavy tails", [s.pow(3) for s in small], labels),
        # 384 tokens, 768 tokens and 384 (bfloat16: 512) dimensions are multiplied at a time
        problem(
            "a whole tile and more", Text(65, 520).rollouts(380, 780), [1, 0], span=120, stride=90
        ),
    ]


def _sinks() -> list[Problem]:
    """Costs that range far: tokens of huge norm, one huge channel, masses that hardly differ."""
    problems = []
    for times, share in ((50, 0.03), (300, 0.1), (3000, 0.03)):
        text = Text(90 + times)
        rollouts = text.rollouts(40, 33, 45, 38)
        for states in rollouts:
            sinks = torch.rand(len(states), generator=text.generator) < share
            states[sinks, 7] = times * (1 + 0.02 * text.normal(int(sinks.sum())))
        problems.append(
            problem(
                f"{share:.0%} sinks of norm {times}", rollouts, [1, 0, 1, 0], span=20, stride=6,
                slow_mixing=True,
            )
        )  # fmt: skip
    loud = Text(97).rollouts(40, 33, 45)
    for states in loud:
        states[:, 3] *= 50
    # three tokens of 24 against three of 25: 1/200 of the mass has to go all the way
    far = [Text(98)(24), Text(99)(25)]
    for states in far:
        states[:3, 5] += 200
    return [
        *problems,
        problem("a channel 50 times louder", loud, [1, 0, 1], slow_mixing=True),
        problem("hidden mass", far, [1, 0], span=25, stride=25, slow_mixing=True),
        problem("spans of two", Text(96, 3).rollouts(40, 40), [1, 0], span=2, stride=2, reg=0.1),
    ]


def _variants() -> list[Problem]:
    text = Text(80)
    prefix = text(12)
    rollouts = [torch.cat([prefix, c * text(t)]) for c, t in ((1, 22), (3, 30), (0.5, 17), (1, 1))]
    labels = [1, 0, 1, 0]

    def variant(name: str, **config: Any) -> Problem:
        return problem(name, rollouts, labels, **config)

    return [
        *(variant(distance, distance=distance) for distance in ("chamfer", "mmd", "cosine")),
        variant("normalised by rollout", normalization="rollout"),
        variant("mean pooling", pooling="mean"),
        variant("mean aggregation", aggregation="mean"),
        variant(
            "every other choice",
            normalization="rollout",
            pooling="mean",
            aggregation="mean",
            reg=0.1,
        ),
        *(
            variant(
                f"{distance}, every other choice",
                distance=distance,
                normalization="rollout",
                pooling="mean",
                aggregation="mean",
            )
            for distance in ("chamfer", "mmd", "cosine")
        ),
        *(
            problem(
                f"{distance}, all states zero", [torch.zeros(30, 8)] * 2, [1, 0], distance=distance
            )
            for distance in ("chamfer", "mmd", "cosine")
        ),
    ]


SHOWS, AVERAGES = 7, 3  # groups


def rounding_shows_in_one_group(**config: Any) -> Problem:
    """In one of two groups every token comes twenty times: nothing averages the error of a cost,
    and two spans are nearest but for 1e-4."""
    g = torch.Generator().manual_seed(1)
    noise, _ = torch.linalg.qr(torch.randn(200, 12, generator=g))
    noise = noise.T * (4 + 1e-4 * torch.randn(12, 1, generator=g))
    states = torch.randn(3, 200, generator=g) + noise.view(4, 3, 200)
    shows, text = states.repeat_interleave(20, 1), Text(5, 200).rollouts(70, 83)
    return problem(
        "", [shows[0], text[0], shows[1], shows[2], text[1], shows[3]], [1, 0, 0, 1, 1, 0],
        [SHOWS, AVERAGES, SHOWS, SHOWS, AVERAGES, SHOWS], span=20, stride=10, **config,
    )  # fmt: skip


def one_group(given: dict[str, Tensor], group: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Its rollouts, and the arguments of a call of these alone."""
    mine = (given["group_ids"] == group).nonzero()[:, 0]
    lengths = given["cu_seqlens"].diff()
    rows = given["hidden"].split(lengths.tolist())
    return mine, {
        "hidden": torch.cat([rows[i] for i in mine]),
        "cu_seqlens": torch.cat([torch.zeros(1, dtype=torch.int64), lengths[mine].cumsum(0)]),
        "group_ids": given["group_ids"][mine],
        "labels": given["labels"][mine],
    }


_PARTS: tuple[Callable[[], list[Problem]], ...] = (
    _lengths_and_spans,
    _near_and_equal_tokens,
    _groups_and_labels,
    _regularisation,
    _dimensions_and_scales,
    _sinks,
    _variants,
)


@cache
def table() -> tuple[Problem, ...]:
    """All problems."""
    return tuple(p for part in _PARTS for p in part())


PROBLEMS = table()
