"""HiddenBank: hidden states collected over micro-batches until their groups are complete."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..config import SpanConfig
from ..ops import api
from ..ops.checks import as_integers
from . import distributed
from .weighting import Weighting

STORAGES = ("device", "cpu")


class BankedWeights(NamedTuple):
    """Token weights by sample, and what they cost.

    Attributes:
        weights: by sample id, in the order of adding: (T_i,) float32 on the device of the states.
        states_sent, weights_sent, groups, mixed_groups: as in distributed.GroupWeights.
    """

    weights: dict[int, Tensor]
    states_sent: int
    weights_sent: int
    groups: int
    mixed_groups: int


class HiddenBank:
    """Collects rollouts micro-batch by micro-batch, in any order; finalize computes all weights.

    Args:
        storage: ``"device"``: states stay where they are; ``"cpu"``: in host memory, pinned for
            states on a GPU, and back on their device in finalize.
        mixed_groups: ids of the groups with both labels (see distributed.mixed_groups), where
            rewards are known before the forwards: other groups are not stored. Ignored rollouts
            never are.

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
        self._mixed_groups = mixed_groups
        self._rows: dict[int, tuple[int, int, int]] = {}  # group, label, tokens by sample id
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
        sample_ids: api.Integers,
        group_ids: api.Integers,
        labels: api.Integers,
    ) -> None:
        """Add the rollouts of a micro-batch.

        Args:
            hidden, cu_seqlens, mask, group_ids, labels: as in shear_ops.span_weights.
            sample_ids: (B,) integers, each added once.

        Raises:
            TypeError, ValueError: naming the argument, the value seen and the value wanted.
        """
        # the reference takes any device, and its values are checked at once
        call = api._prepare(hidden, cu_seqlens, mask, group_ids, labels, SpanConfig(), "reference")
        packed = call.packed
        batch = packed.cu_seqlens.shape[0] - 1
        ids = as_integers("sample_ids", sample_ids, batch)
        columns = [[int(v) for v in t.tolist()] for t in (ids, call.group_ids, call.labels)]
        lengths = packed.cu_seqlens.diff().tolist()
        like = packed.hidden.detach()[:0]
        if self._like is not None and (like.shape, like.dtype) != (
            self._like.shape,
            self._like.dtype,
        ):
            raise ValueError(
                f"hidden must have d = {self._like.shape[1]} and {self._like.dtype} as before, "
                f"got d = {like.shape[1]} and {like.dtype}"
            )
        known = [sample for sample in columns[0] if sample in self._rows]
        if known or len(set(columns[0])) < batch:
            raise ValueError(f"sample_ids must be new and unique, got {columns[0]}, known: {known}")
        self._like = like.clone()
        rollouts = zip(*columns, lengths, torch.split(packed.hidden.detach(), lengths), strict=True)
        for sample, group, label, tokens, states in rollouts:
            self._rows[sample] = (group, label, tokens)
            if label >= 0 and (self._mixed_groups is None or group in self._mixed_groups):
                self._states[sample] = self._store(states)

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

        Args:
            process_group, config, weighting, step, backend: as in distributed.span_weights. Every
                rank calls it equally often, also with an empty bank.

        Raises:
            TypeError, ValueError, RuntimeError: as distributed.span_weights.
        """
        rows, states = self._rows, self._states
        like = torch.empty(0, 1) if self._like is None else self._like
        self._rows, self._states, self._like = {}, {}, None
        stored = set(states)
        # what was not stored has weight 1 whatever its states: a rollout without tokens
        lengths = [rows[sample][2] if sample in stored else 0 for sample in rows]
        parts = [like, *(states.pop(s).to(like.device) for s in rows if s in stored)]
        hidden = torch.cat(parts)
        parts.clear()  # else every state is there twice from here on
        found = distributed.span_weights(
            hidden,
            cu_seqlens=torch.tensor([0, *lengths]).cumsum(0),
            group_ids=[group for group, _, _ in rows.values()],
            labels=[label for _, label, _ in rows.values()],
            sample_ids=list(rows),
            config=config,
            weighting=weighting,
            step=step,
            backend=backend,
            process_group=process_group,
        )
        found_of = torch.split(found.weights, lengths)
        weights = {
            sample: part if sample in stored else part.new_ones(rows[sample][2])
            for sample, part in zip(rows, found_of, strict=True)
        }
        return BankedWeights(weights, *found[1:])
