"""What is measured: synthetic groups, pairs of recorded real spans, and what peers do with them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any

import torch
from torch import Tensor

from shear_ops import SpanConfig, reference
from shear_ops.cli.rollouts import load_rollouts, shipped_rollouts

from .contest import worst_error
from .language import Text
from .peers import Solve
from .truth import nearest_distances, sharp_cost, span_costs

CONFIG = SpanConfig()  # the paper's spans of 100 every 25, reg 0.03
SETTINGS = {
    "clustered": "half of the passages of every rollout are noisy copies of passages that the "
    "group shares, so that many pairs are bounded away, though fewer than on the recorded real "
    "rollouts",
    "unpruned": "the rollouts share nothing but their vocabulary: hardly any pair is bounded away, "
    "the worst case",
}


@dataclass(frozen=True, eq=False)
class Group:
    """One GRPO group: rollouts of equal length, alternately correct and incorrect.

    The length is a whole number of strides past a span: no span is shorter than the others, and
    libraries that batch problems of one shape take the same spans as ours.
    """

    hidden: Tensor  # (rollouts * tokens, d)
    rollouts: int

    def __post_init__(self) -> None:
        """Refuse a length with a ragged tail."""
        if (self.tokens - CONFIG.span) % CONFIG.stride or self.tokens < CONFIG.span:
            raise ValueError(f"tokens must be span + k * stride, got {self.tokens}")

    @property
    def tokens(self) -> int:
        """Tokens of a rollout."""
        return len(self.hidden) // self.rollouts

    @property
    def correct(self) -> range:
        """Indices of the correct rollouts."""
        return range(0, self.rollouts, 2)

    @property
    def incorrect(self) -> range:
        """Indices of the incorrect rollouts."""
        return range(1, self.rollouts, 2)

    @property
    def windows(self) -> Tensor:
        """(K, span) positions of the tokens of every span of a rollout."""
        begins = [a for a, _ in reference.spans(self.tokens, CONFIG.span, CONFIG.stride)]
        return torch.tensor(begins)[:, None] + torch.arange(CONFIG.span)

    @property
    def pairs(self) -> int:
        """Span pairs of the group."""
        return len(self.correct) * len(self.incorrect) * len(self.windows) ** 2

    @property
    def mean_norm(self) -> float:
        """Mean Euclidean norm of a token."""
        return float(self.hidden.float().norm(dim=1).double().mean())

    @property
    def eps(self) -> float:
        """The regularisation in units of a cost, as other libraries take it."""
        return CONFIG.reg * self.mean_norm

    def states(self, rollout: int) -> Tensor:
        """Return the states (T, d) of one rollout."""
        return self.hidden[rollout * self.tokens : (rollout + 1) * self.tokens]

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of span_weights."""
        return {
            "hidden": self.hidden,
            "cu_seqlens": torch.arange(self.rollouts + 1, device="cpu") * self.tokens,
            "group_ids": torch.zeros(self.rollouts, dtype=torch.int64, device="cpu"),
            "labels": (torch.arange(self.rollouts, device="cpu") + 1) % 2,
        }

    def to(self, dtype: torch.dtype) -> Group:
        """Return the group with its states in another dtype."""
        return Group(self.hidden.to(dtype), self.rollouts)


def synthetic_group(
    setting: str, tokens: int, dim: int, *, rollouts: int = 8, seed: int = 0
) -> Group:
    """Return a group of rollouts in the synthetic language, float32 with values of bfloat16.

    On top of its words, context and noise: a mean state common to all, and a few outlier dimensions
    of 8 times the size.
    """
    if setting not in SETTINGS:
        raise ValueError(f"setting must be one of {', '.join(SETTINGS)}, got {setting!r}")
    with torch.device("cpu"):  # the same numbers wherever they are used
        states = _synthetic_states(setting, tokens, dim, rollouts, seed)
    return Group(states.to(torch.get_default_device()), rollouts)


def _synthetic_states(setting: str, tokens: int, dim: int, rollouts: int, seed: int) -> Tensor:
    text = Text(seed, dim, vocabulary=100, drift=0.5)
    mean_state = text.normal(dim)
    x = text.batch(rollouts, tokens)
    if setting == "clustered":
        passage = 100
        shared = text.batch(1, tokens)
        copied = torch.rand(rollouts, -(-tokens // passage), generator=text.generator) < 0.5
        copied = copied.repeat_interleave(passage, 1)[:, :tokens, None]
        noise = 0.2 * text.normal(*x.shape)
        x = torch.where(copied, shared + noise, x)
    x += mean_state
    x[..., ::256] *= 8
    return x.flatten(0, 1).bfloat16().float()


def real_span_pairs(count: int, *, seed: int = 0) -> tuple[Tensor, float]:
    """Costs (count, span, span) of random opposing full spans of the recorded rollouts, and eps."""
    with torch.device("cpu"):
        costs, eps = _real_span_pairs(count, seed)
    return costs.to(torch.get_default_device()), eps


def _real_span_pairs(count: int, seed: int) -> tuple[Tensor, float]:
    rollouts = load_rollouts(shipped_rollouts())
    hidden = rollouts.hidden.float()
    offsets, groups, labels = (
        t.tolist() for t in (rollouts.cu_seqlens, rollouts.group_ids, rollouts.labels)
    )

    def full_spans(rollout: int) -> Iterator[int]:
        length = offsets[rollout + 1] - offsets[rollout]
        for begin, end in reference.spans(length, CONFIG.span, CONFIG.stride):
            if end - begin == CONFIG.span:
                yield offsets[rollout] + begin

    pairs = [
        pair
        for i, j in product(range(len(rollouts)), repeat=2)
        if groups[i] == groups[j] and labels[i] == 1 and labels[j] == 0
        for pair in product(full_spans(i), full_spans(j))
    ]
    generator = torch.Generator().manual_seed(seed)
    rows, columns = torch.tensor(pairs)[torch.randperm(len(pairs), generator=generator)[:count]].T
    x, y = (hidden[begin[:, None] + torch.arange(CONFIG.span)] for begin in (rows, columns))
    costs = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
    return costs, CONFIG.reg * float(hidden.norm(dim=1).mean())


class Problems:
    """Transport problems of one shape, whose costs are given."""

    def __init__(self, cost: Tensor, eps: float) -> None:
        self.cost, self.eps = cost, eps

    @cached_property
    def truth(self) -> Tensor:
        """Converged sharp transport costs (B,), float64."""
        return sharp_cost(self.cost, self.eps)

    def warm_up(self, solve: Solve, chunk: int) -> None:
        """Solve a first and a last batch: compiles what is compiled per shape."""
        solve(self.cost[:chunk], self.eps)
        if rest := len(self.cost) % chunk:
            solve(self.cost[-rest:], self.eps)

    def run(self, solve: Solve, chunk: int) -> Tensor:
        """Sharp transport costs (B,) by a peer, so many problems per call."""
        return torch.cat([solve(part, self.eps) for part in self.cost.split(chunk)])

    def judge(self, value: Tensor) -> float:
        """Worst error of the values."""
        return worst_error(value, self.truth, self.eps)


class NearestSpans:
    """The distance of spans to their nearest span in a group, the way of the libraries.

    torch.cdist once per pair of rollouts, gathered windows, a batch solver, the minimum. Without
    `some` the whole group: every pair is solved once and serves both of its spans. With it, only
    these spans of the first correct rollout, against all spans of all incorrect ones.
    """

    def __init__(self, group: Group, some: list[int] | None = None) -> None:
        self.group, self.whole = group, some is None
        self.eps, self.columns = group.eps, group.windows
        self.rows = self.columns if some is None else self.columns[some]
        self.correct = group.correct if some is None else group.correct[:1]
        self.pairs = len(self.correct) * len(self.rows) * len(group.incorrect) * len(self.columns)

    @cached_property
    def truth(self) -> Tensor:
        """Converged distances (K,) of the row spans, and then of the column spans if whole."""
        x = torch.cat([self.group.states(i)[self.rows].flatten(0, 1) for i in self.correct])
        y = torch.cat([self.group.states(j) for j in self.group.incorrect])
        offsets = self.group.tokens * torch.arange(len(self.group.incorrect))
        columns = (offsets[:, None, None] + self.columns).flatten(0, 1)
        rows = torch.arange(len(x)).view(-1, self.rows.shape[1])
        costs = reference.token_cost(x.double(), y.double())
        of_rows, of_columns = nearest_distances(costs, rows, columns, self.eps)
        return torch.cat([of_rows, of_columns]) if self.whole else of_rows

    def spans(self, distance: Tensor) -> Tensor:
        """Pick from the distances of all spans of the group (rollouts * K,) those of `truth`."""
        table = distance.view(self.group.rollouts, -1)
        if not self.whole:
            return table[0, (self.rows[:, 0] // (self.columns[1, 0] - self.columns[0, 0]))]
        return torch.cat([table[i].flatten() for i in (self.group.correct, self.group.incorrect)])

    def token_costs(self, i: int, j: int) -> Tensor:
        """Token costs (T, T) of two rollouts; torch.cdist has no kernel for half precision."""
        return torch.cdist(self.group.states(i).float(), self.group.states(j).float())

    @cached_property
    def all_costs(self) -> dict[tuple[int, int], Tensor]:
        """The token costs of every pair of rollouts, for when their time is not to be counted."""
        return {(i, j): self.token_costs(i, j) for i in self.correct for j in self.group.incorrect}

    def warm_up(self, solve: Solve, chunk: int) -> None:
        """Solve one batch: compiles what is compiled for any batch."""
        if not self.whole:
            _ = self.all_costs
        span = self.rows.shape[1]
        solve(torch.rand(chunk, span, span) * self.eps, self.eps)

    def run(self, solve: Solve, chunk: int) -> Tensor:
        """Distances (K,) in the order of `truth`, by a peer that solves so many pairs per call."""
        costs = None if self.whole else self.all_costs
        value = {
            (i, j): self._table(
                self.token_costs(i, j) if costs is None else costs[i, j], solve, chunk
            )
            for i in self.correct
            for j in self.group.incorrect
        }
        of_rows = [
            torch.stack([value[i, j].amin(1) for j in self.group.incorrect]).amin(0)
            for i in self.correct
        ]
        if not self.whole:
            return torch.cat(of_rows)
        of_columns = [
            torch.stack([value[i, j].amin(0) for i in self.correct]).amin(0)
            for j in self.group.incorrect
        ]
        return torch.cat([*of_rows, *of_columns])

    def _table(self, costs: Tensor, solve: Solve, chunk: int) -> Tensor:
        """Distances (R, K) of the row spans to the column spans of two rollouts."""
        pairs = torch.cartesian_prod(
            torch.arange(len(self.rows)), torch.arange(len(self.columns))
        ).view(-1, 2)
        found = [
            solve(span_costs(costs, self.rows[p[:, 0]], self.columns[p[:, 1]]), self.eps)
            for p in pairs.split(chunk)
        ]
        return torch.cat(found).view(len(self.rows), len(self.columns))

    def judge(self, value: Tensor) -> float:
        """Worst error of the distances."""
        return worst_error(value, self.truth, self.eps)
