"""What the alternatives have to do: solve a batch of costs, or find nearest spans."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from shear_ops import reference

from .peers import Solve
from .problems import Group
from .truth import nearest_distances, sharp_cost, span_costs
from .tune import worst_error


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
