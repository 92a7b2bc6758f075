"""HiddenBank: hidden states collected over micro-batches until their groups are complete."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from contextlib import suppress
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..config import SpanConfig, check_config, check_count
from ..ops.api import PairCounts
from ..ops.batch import Batch, Integers, Row, as_integers
from . import distributed
from .distributed import Computed, Rollout, mixed_members
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
        group_size: rollouts that are added of every group, on all ranks together; None: not known.
            A group that is complete on its rank is computed in the add of its last rollout, and its
            states go: stored are those of incomplete groups only. A group may stay incomplete,
            as where rollouts are filtered; more rollouts of it raise.
        max_bytes: most bytes of states in ``storage``; None: no limit. What is above goes from a
            GPU to pinned host memory; where states are stored in host memory anyway, add raises.
        config, backend: as in shear_ops.span_weights.

    Raises:
        TypeError, ValueError: naming the argument, the value seen and the value wanted.
    """

    def __init__(
        self,
        *,
        storage: str = "device",
        mixed_groups: Collection[int] | None = None,
        group_size: int | None = None,
        max_bytes: int | None = None,
        config: SpanConfig = SpanConfig(),
        backend: str | None = None,
    ) -> None:
        """Make an empty bank."""
        if storage not in STORAGES:
            raise ValueError(f"storage must be one of {', '.join(STORAGES)}, got {storage!r}")
        if group_size is not None:
            check_count("group_size", group_size)
        if max_bytes is not None:
            if isinstance(max_bytes, bool) or not isinstance(max_bytes, int):
                raise TypeError(f"max_bytes must be an int, got {max_bytes!r}")
            if max_bytes < 1:
                raise ValueError(f"max_bytes must be at least 1, got {max_bytes}")
        check_config(config)
        self._storage = storage
        self._mixed_groups = None if mixed_groups is None else {int(g) for g in mixed_groups}
        self._group_size, self._max_bytes = group_size, max_bytes
        self._config, self._backend = config, backend
        self._empty()

    def _empty(self) -> None:
        self._rows: dict[int, Row] = {}  # by sample id
        self._states: dict[int, Tensor] = {}
        self._held: Counter[torch.device] = Counter()  # bytes of states
        self._like: Tensor | None = None  # (0, d) with the dtype and device of the states
        self._groups: dict[int, list[Rollout]] = {}
        self._early = Computed()

    def __len__(self) -> int:
        """Return the number of rollouts added."""
        return len(self._rows)

    @property
    def nbytes(self) -> int:
        """Bytes of the stored states."""
        return self._held.total()

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
        """Add the rollouts of a micro-batch, and with group_size compute the complete groups.

        States of these that are refused, as NaN is, are an error of finalize, on all ranks.

        Args:
            hidden, cu_seqlens, mask, group_ids, labels: as in shear_ops.span_weights.
            sample_ids: (B,) integers, each added once.

        Raises:
            TypeError, ValueError: naming the argument, the value seen and the value wanted.
            MemoryError: where max_bytes does not suffice; nothing was added then.
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
        parts = torch.split(states, [row.tokens for row in rows])
        new = [
            Rollout(row.group, sample, row.label, row.tokens, rank=0, place=place)
            for place, (sample, row) in enumerate(zip(samples, rows, strict=True), len(self._rows))
        ]
        groups = self._with(new)
        complete = {g: rs for g, rs in groups.items() if len(rs) == self._group_size}
        arrived = {r.sample: own for r, own in zip(new, parts, strict=True) if self._takes(r)}
        self._check_budget(
            [arrived[r.sample] for r in new if r.sample in arrived and r.group not in complete],
            [r.sample for rollouts in complete.values() for r in rollouts],
        )
        self._like = states[:0].clone()
        self._rows.update(zip(samples, rows, strict=True))
        self._groups |= groups
        try:
            self._compute(complete, arrived, self._like)
        finally:
            for sample, own in arrived.items():
                self._store(sample, own)

    def _takes(self, rollout: Rollout) -> bool:
        """Return whether a rollout's states may be needed."""
        known = self._mixed_groups
        return rollout.label >= 0 and (known is None or rollout.group in known)

    def _with(self, new: Sequence[Rollout]) -> dict[int, list[Rollout]]:
        """Groups of new rollouts, with those that were added before, by sample id."""
        groups: dict[int, list[Rollout]] = {}
        for rollout in new:
            members = groups.setdefault(rollout.group, [*self._groups.get(rollout.group, ())])
            members.append(rollout)
            if self._group_size is not None and len(members) > self._group_size:
                raise ValueError(
                    f"group_size must be that of every group, got {self._group_size} and another "
                    f"rollout of group {rollout.group} (sample id {rollout.sample})"
                )
        return {group: sorted(members) for group, members in groups.items()}

    def _compute(
        self, complete: dict[int, list[Rollout]], arrived: dict[int, Tensor], like: Tensor
    ) -> None:
        """Compute complete groups, and let their states go: those stored and those arrived."""
        mixed = {g: taking for g, members in complete.items() if (taking := mixed_members(members))}
        mixed = {g: taking for g, taking in mixed.items() if self._takes(taking[0])}
        options = distributed.Options(self._config, Weighting(), 0, self._backend)

        def take(rollout: Rollout) -> Tensor:
            sample = rollout.sample
            return arrived[sample] if sample in arrived else self._states[sample]

        # as in finalize, whatever mode the caller's forward runs in
        modes = torch.inference_mode(False), torch.autocast(like.device.type, enabled=False)
        # what fails here does so again in finalize, which tells all ranks
        with suppress(ValueError, torch.OutOfMemoryError), modes[0], modes[1]:
            self._early.add_local(mixed, take, like, options, frees=False)
        for group, members in complete.items():
            if group in self._early.weights or group not in mixed:
                for rollout in members:
                    arrived.pop(rollout.sample, None)
                    if (own := self._states.pop(rollout.sample, None)) is not None:
                        self._held[own.device] -= own.nbytes

    def _check_like(self, states: Tensor) -> None:
        """Raise unless states have the dimension and dtype of those added before."""
        like = self._like
        if like is not None and (states.shape[1], states.dtype) != (like.shape[1], like.dtype):
            raise ValueError(
                f"hidden must have d = {like.shape[1]} and {like.dtype} as before, "
                f"got d = {states.shape[1]} and {states.dtype}"
            )

    def _check_budget(self, coming: Sequence[Tensor], going: Sequence[int]) -> None:
        """Raise MemoryError unless states can be stored once those of going samples are gone."""
        host = torch.device("cpu")
        if self._max_bytes is None or not coming:
            return
        if self._storage == "device" and coming[0].device != host:
            return  # what is above goes to the host
        gone = sum(self._states[sample].nbytes for sample in going if sample in self._states)
        needed = self._held[host] - gone + sum(states.nbytes for states in coming)
        if needed > self._max_bytes:
            raise MemoryError(
                f"max_bytes must be at least {needed} to store these rollouts, too, got "
                f"{self._max_bytes}. Less is stored with mixed_groups, where rewards are known "
                "before the forwards, with group_size, and with fewer groups per finalize"
            )

    def _store(self, sample: int, states: Tensor) -> None:
        most, held = self._max_bytes, self._held[states.device]
        fits = most is None or held + states.nbytes <= most
        if states.device.type == "cpu" or (self._storage == "device" and fits):
            states = states.clone()  # not a view that keeps the whole micro-batch
        else:
            states = _pinned(states)
        self._states[sample] = states
        self._held[states.device] += states.nbytes

    def finalize(
        self,
        process_group: dist.ProcessGroup | None = None,
        *,
        config: SpanConfig | None = None,
        weighting: Weighting = Weighting(),
        step: int = 0,
        backend: str | None = None,
    ) -> BankedWeights:
        """Compute the weights of everything added, and empty the bank. Collective.

        Group by group, and the states of a group go when it is computed: beside what is stored,
        memory is needed for one group at a time (see distributed.regroup).

        Args:
            process_group, weighting, step: as in distributed.span_weights. Every rank calls it
                equally often, also with an empty bank.
            config, backend: default those of the bank; others only without group_size.

        Raises:
            TypeError, ValueError, RuntimeError: as distributed.span_weights; ValueError if
                mixed_groups or group_size differ between ranks, or if a group has more than
                group_size rollouts.
        """
        rows, states, early = self._rows, self._states, self._early
        nothing = torch.empty(0, 1, dtype=torch.float32, device="cpu")
        like = nothing if self._like is None else self._like
        self._empty()
        link = Link(process_group, like.device)
        options = distributed.Options(
            self._config if config is None else config,
            weighting,
            step,
            self._backend if backend is None else backend,
            self._group_size,
        )
        link.agree(lambda: self._check(options, like.device))
        distributed.check_same_mixed_groups(self._mixed_groups, process_group, like.device)
        samples, kept = list(rows), set(states)
        # what was not stored has weight 1 whatever its states: a rollout without tokens
        taking = [
            row if s in kept or row.group in early.weights else row._replace(tokens=0)
            for s, row in rows.items()
        ]

        def take(place: int, begin: int, end: int) -> Tensor:
            sample = samples[place]
            part = states[sample][begin:end]
            if end == rows[sample].tokens:
                del states[sample]
            return part

        frees = all(own.device == like.device for own in states.values())
        found = distributed.regroup(
            link, taking, samples, take, like, options, early=early, frees=frees
        )
        weights = {
            sample: found.weights[place]
            if place in found.weights
            else torch.ones(row.tokens, dtype=torch.float32, device=like.device)
            for place, (sample, row) in enumerate(rows.items())
        }
        return BankedWeights(weights, *found[1:])

    def _check(self, options: distributed.Options, device: torch.device) -> None:
        """Raise unless finalize can use options, and they are those of groups computed in add."""
        options.check(device)
        for name, own, given in (
            ("config", self._config, options.config),
            ("backend", self._backend, options.backend),
        ):
            if self._group_size is not None and given != own:
                raise ValueError(
                    f"{name} must be that of HiddenBank where group_size is given: {own!r}, "
                    f"got {given!r}"
                )


def _pinned(states: Tensor) -> Tensor:
    """Return a copy in host memory from which a GPU reads directly."""
    return torch.empty_like(states, device="cpu", pin_memory=True).copy_(states)
