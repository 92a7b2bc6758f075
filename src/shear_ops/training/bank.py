"""HiddenBank: hidden states collected over micro-batches until their groups are complete."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..config import SpanConfig
from ..ops.api import PairCounts
from ..ops.batch import Batch, Integers, Row, as_integers
from . import distributed
from .link import Link
from .weighting import Weighting

STORAGES = ("device", "cpu")


class BankedWeights(NamedTuple):
    """Token weights by sample, and what they cost.

    Attributes:
        weights: by sample id, in the order of adding: (T_i,) float32 on the device of the states.
        states_sent, weights_sent, groups, mixed_groups, pairs: as in distributed.GroupWeights.
    """

    weights: dict[int, Tensor]
    states_sent: int
    weights_sent: int
    groups: int
    mixed_groups: int
    pairs: PairCounts


class HiddenBank:
    """Collects rollouts micro-batch by micro-batch, in any order; finalize computes all weights.

    Args:
        storage: ``"device"``: states stay where they are; ``"cpu"``: in host memory, pinned for
            states on a GPU, and back on their device in finalize, group by group.
        mixed_groups: ids of the groups with both labels (see distributed.mixed_groups), where
            rewards are known before the forwards: other groups are not stored. Ignored rollouts
            never are. The same on all ranks, or finalize raises.

    Raises:
        ValueError: for another storage.
    """

    def __init__(
        self, *, storage: str = "device", mixed_groups: Collection[int] | None = None
    ) -> None:
        """Make an empty bank."""
        if storage not in STORAGES:
            raise ValueError(f"storage must be one of {', '.join(STORAGES)}, got {storage!r}")
        self._storage = storage
        self._mixed_groups = None if mixed_groups is None else {int(g) for g in mixed_groups}
        self._rows: dict[int, Row] = {}  # by sample id
        self._states: dict[int, Tensor] = {}
        self._like: Tensor | None = None  # (0, d) with the dtype and device of the states

    def __len__(self) -> int:
        """Return the number of rollouts added."""
        return len(self._rows)

    @property
    def nbytes(self) -> int:
        """Bytes of the stored states."""
        return sum(states.numel() * states.element_size() for states in self._states.values())

    def add(
        self,
        hidden: Tensor,
        *,
        cu_seqlens: Tensor | None = None,
        mask: Tensor | None = None,
        sample_ids: Integers,
        group_ids: Integers,
        labels: Integers,
    ) -> None:
        """Add the rollouts of a micro-batch.

        Args:
            hidden, cu_seqlens, mask, group_ids, labels: as in shear_ops.span_weights.
            sample_ids: (B,) integers, each added once.

        Raises:
            TypeError, ValueError: naming the argument, the value seen and the value wanted.
        """
        batch = Batch.of(
            distributed.without_float64_if_empty(hidden),
            cu_seqlens=cu_seqlens,
            mask=mask,
            group_ids=group_ids,
            labels=labels,
        ).check_values()
        rows = batch.rows()
        samples = as_integers("sample_ids", sample_ids, len(rows)).long().tolist()
        if not rows:
            return
        states = batch.hidden.detach()
        self._check_like(states)
        known = [sample for sample in samples if sample in self._rows]
        if known or len(set(samples)) < len(samples):
            raise ValueError(f"sample_ids must be new and unique, got {samples}, known: {known}")
        self._like = states[:0].clone()
        parts = torch.split(states, [row.tokens for row in rows])
        for sample, row, own in zip(samples, rows, parts, strict=True):
            self._rows[sample] = row
            if row.label >= 0 and (self._mixed_groups is None or row.group in self._mixed_groups):
                self._states[sample] = self._store(own)

    def _check_like(self, states: Tensor) -> None:
        """Raise unless states have the dimension and dtype of those added before."""
        like = self._like
        if like is not None and (states.shape[1], states.dtype) != (like.shape[1], like.dtype):
            raise ValueError(
                f"hidden must have d = {like.shape[1]} and {like.dtype} as before, "
                f"got d = {states.shape[1]} and {states.dtype}"
            )

    def _store(self, states: Tensor) -> Tensor:
        if self._storage == "device" or states.device.type == "cpu":
            return states.clone()  # not a view that keeps the whole micro-batch
        return torch.empty_like(states, device="cpu", pin_memory=True).copy_(states)

    def finalize(
        self,
        process_group: dist.ProcessGroup | None = None,
        *,
        config: SpanConfig = SpanConfig(),
        weighting: Weighting = Weighting(),
        step: int = 0,
        backend: str | None = None,
    ) -> BankedWeights:
        """Compute the weights of everything added, and empty the bank. Collective.

        Group by group, and the states of a group go when it is computed: beside what is stored,
        memory is needed for one group at a time (see distributed.regroup).

        Args:
            process_group, config, weighting, step, backend: as in distributed.span_weights. Every
                rank calls it equally often, also with an empty bank.

        Raises:
            TypeError, ValueError, RuntimeError: as distributed.span_weights; ValueError if
                mixed_groups differ between ranks.
        """
        rows, states = self._rows, self._states
        nothing = torch.empty(0, 1, dtype=torch.float32, device="cpu")
        like = nothing if self._like is None else self._like
        self._rows, self._states, self._like = {}, {}, None
        link = Link(process_group, like.device)
        options = distributed.Options(config, weighting, step, backend)
        link.agree(lambda: options.check(like.device))
        distributed.check_same_mixed_groups(self._mixed_groups, process_group, like.device)
        samples, stored = list(rows), set(states)
        # what was not stored has weight 1 whatever its states: a rollout without tokens
        taking = [row if s in stored else row._replace(tokens=0) for s, row in rows.items()]
        found = distributed.regroup(
            link, taking, samples, lambda i: states.pop(samples[i]).to(like.device), like, options
        )
        weights = {
            sample: found.weights[place]
            if place in found.weights
            else torch.ones(row.tokens, dtype=torch.float32, device=like.device)
            for place, (sample, row) in enumerate(rows.items())
        }
        return BankedWeights(weights, *found[1:])
