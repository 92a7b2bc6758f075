"""Token weights of groups whose rollouts are spread over the ranks of a process group.

Every group with both labels gets one owner. The other ranks send it the hidden states of their
rollouts, the owner computes the group alone, in the order of the sample ids, and sends float32
weights back. So a hidden state crosses the wire at most once, groups with one label cost nothing,
and the result does not depend on the number of ranks or on who holds what: on one kind of device it
is the same bit for bit.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..config import SpanConfig, check_config
from ..ops import api, backends
from ..ops.batch import STATE_DTYPES, Batch, Integers, Row, as_integers
from .link import Link, Move
from .weighting import Weighting, check_step


class GroupWeights(NamedTuple):
    """Token weights of a rank's rollouts, and what they cost.

    Attributes:
        weights: float32, (N,) or (B, T) as span_weights returns them.
        states_sent, weights_sent: bytes that this rank sent to other ranks.
        groups, mixed_groups: of all ranks: how many groups, and how many with both labels.
        pairs: span pairs of all ranks.
    """

    weights: Tensor
    states_sent: int
    weights_sent: int
    groups: int
    mixed_groups: int
    pairs: api.PairCounts


class _Form(NamedTuple):
    """What a rank's call looks like, as integers."""

    rollouts: int
    dim: int
    dtype: int  # index into STATE_DTYPES


class _Rollout(NamedTuple):
    group: int
    sample: int
    label: int
    tokens: int
    rank: int
    place: int  # among the rollouts of its rank


def span_weights(
    hidden: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
    group_ids: Integers,
    labels: Integers,
    sample_ids: Integers | None = None,
    config: SpanConfig = SpanConfig(),
    weighting: Weighting = Weighting(),
    step: int = 0,
    backend: str | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> GroupWeights:
    """Token weights of this rank's rollouts, whose groups may lie on any ranks. Collective.

    Every rank of the process group calls it equally often, also with no rollouts. Without
    torch.distributed it computes the same on one process.

    Args:
        hidden, cu_seqlens, mask, labels, config, backend: as in shear_ops.span_weights, of this
            rank's rollouts. A rank without rollouts may pass hidden (0, 1) of any dtype, also
            float64.
        group_ids: (B,) integers, equal on all ranks for rollouts of one prompt.
        sample_ids: (B,) integers, unique within a group over all ranks: a group is computed in
            their order. Default: the position in the batch, all ranks' rollouts one after another.
        weighting: options on the weights, see Weighting. step: optimizer steps taken so far.
        process_group: default the whole world; a data-parallel group where ranks hold replicas.

    Returns:
        GroupWeights. States in groups with one label are not looked at, not even for NaN.

    Raises:
        TypeError, ValueError: as shear_ops.span_weights; duplicate sample_ids; arguments that
            differ between ranks. A state that is not finite is named by group, sample id, rank,
            rollout of that rank in the order given, and token within it, of those in its mask.
        RuntimeError: on the other ranks if one rank raised, with what it said, instead of leaving
            them waiting. A rank that died raises through the process group's time-out.
    """
    link = Link(process_group, hidden.device if isinstance(hidden, Tensor) else torch.device("cpu"))

    options = Options(config, weighting, step, backend)

    def check() -> tuple[Batch, list[int] | None]:
        options.check(hidden.device if isinstance(hidden, Tensor) else torch.device("cpu"))
        batch = Batch.of(
            without_float64_if_empty(hidden),
            cu_seqlens=cu_seqlens,
            mask=mask,
            group_ids=group_ids,
            labels=labels,
        ).check_values()
        if sample_ids is None:
            return batch, None
        ids = as_integers("sample_ids", sample_ids, batch.labels.shape[0])
        return batch, ids.long().tolist()

    batch, ids = link.agree(check)
    states, offsets = batch.hidden.detach(), batch.cu_seqlens.tolist()
    found = regroup(
        link, batch.rows(), ids, lambda i: states[offsets[i] : offsets[i + 1]], states, options
    )
    weights = torch.ones(offsets[-1], dtype=torch.float32, device=states.device)
    for place, own in found.weights.items():
        weights[offsets[place] : offsets[place + 1]] = own
    return GroupWeights(batch.restore(weights), *found[1:])


class Options(NamedTuple):
    """What a call has besides rollouts, the same on all ranks."""

    config: SpanConfig
    weighting: Weighting
    step: int
    backend: str | None

    def check(self, device: torch.device) -> None:
        """Raise TypeError or ValueError unless span_weights takes them for states on a device."""
        check_config(self.config)
        backends.choose(self.backend, device, self.config.distance)
        if not isinstance(self.weighting, Weighting):
            raise TypeError(f"weighting must be a Weighting, got {type(self.weighting).__name__}")
        check_step(self.step)

    def fields(self) -> dict[str, Any]:
        """Every field by the name that an error has for it."""
        return {
            **{f"config.{name}": value for name, value in asdict(self.config).items()},
            **{f"weighting.{name}": value for name, value in asdict(self.weighting).items()},
            "step": check_step(self.step),
            "backend": self.backend,
        }


class Regrouped(NamedTuple):
    """Weights of a rank's rollouts by place, where their group has both labels; else they are 1.

    The rest as in GroupWeights.
    """

    weights: dict[int, Tensor]
    states_sent: int
    weights_sent: int
    groups: int
    mixed_groups: int
    pairs: api.PairCounts


def regroup(
    link: Link,
    rows: Sequence[Row],
    sample_ids: Sequence[int] | None,
    take: Callable[[int], Tensor],
    like: Tensor,
    options: Options,
) -> Regrouped:
    """Bring every group with both labels to one rank, there compute it, and bring weights back.

    One group per rank at a time: beside what the caller stores, a rank holds the states of one
    group (while they are put together those that came from other ranks twice), or the workspace of
    its computation if that is more.

    Args:
        link: the ranks. rows: this rank's rollouts, checked. sample_ids: as in span_weights.
        take: the states of the rollout at a place in rows, on like's device. It is called once for
            rollouts of groups with both labels, when their group's turn comes, and never for
            others: what it returns need not be kept.
        like: of the dtype, device and last dimension of all states. options: checked.

    Raises:
        ValueError: arguments that differ between ranks, duplicate sample_ids, states that are
            refused.
        RuntimeError: on the other ranks if one rank raised.
    """
    dim, dtype, before = _forms(link, like, len(rows), options, sample_ids is not None)
    ids = range(before, before + len(rows)) if sample_ids is None else sample_ids
    groups = _groups(link, rows, ids)
    mixed = {group: taking for group, rollouts in groups.items() if (taking := _mixed(rollouts))}
    owners = _owners(mixed, link.size)
    moves = {
        group: [
            Move(r, r.tokens, r.rank, owners[group]) for r in members if r.rank != owners[group]
        ]
        for group, members in mixed.items()
    }
    computed: dict[_Rollout, Tensor] = {}
    counted: list[api.PairCounts] = []  # of the groups that this rank computes
    states_sent = 0
    for turn in _turns(owners):
        to_owner = [move for group in turn for move in moves[group]]
        arrived, sent = link.exchange(to_owner, lambda r: take(r.place), columns=dim, dtype=dtype)
        states_sent += sent

        def compute(turn: list[int] = turn, arrived: dict[_Rollout, Tensor] = arrived) -> None:
            for group in (g for g in turn if owners[g] == link.rank):
                members = mixed[group]
                lengths = [r.tokens for r in members]
                whole = torch.empty(sum(lengths), dim, dtype=dtype, device=like.device)
                for part, r in zip(torch.split(whole, lengths), members, strict=True):
                    part.copy_(arrived[r] if r in arrived else take(r.place))
                arrived.clear()
                weights, pairs = _of_group(whole, group, members, options)
                counted.append(pairs)
                computed.update(zip(members, weights, strict=True))

        link.agree(compute)
    returned, weights_sent = link.exchange(
        [move.back() for group in mixed for move in moves[group]],
        lambda rollout: computed[rollout][:, None],
        columns=1,
        dtype=torch.float32,
    )
    own = [r for members in mixed.values() for r in members if r.rank == link.rank]
    return Regrouped(
        weights={r.place: computed[r] if r in computed else returned[r][:, 0] for r in own},
        states_sent=states_sent,
        weights_sent=weights_sent,
        groups=len(groups),
        mixed_groups=len(mixed),
        pairs=_sum_of_counts(link, counted),
    )


def _of_group(
    states: Tensor, group: int, members: list[_Rollout], options: Options
) -> tuple[tuple[Tensor, ...], api.PairCounts]:
    """Weights of the rollouts of one group as they are used, and counts of its span pairs."""
    lengths = [r.tokens for r in members]
    try:
        weights, pairs = api.span_weights(
            states,
            cu_seqlens=torch.tensor([0, *lengths], device="cpu").cumsum(0),
            group_ids=[group] * len(members),
            labels=[r.label for r in members],
            config=options.config,
            backend=options.backend,
            return_counts=True,
        )
    except ValueError as error:
        raise _in_callers_words(error, states, members) from None
    return torch.split(options.weighting.apply(weights, options.step), lengths), pairs


def _turns(owners: Mapping[int, int]) -> list[list[int]]:
    """Groups of which no two have one owner, one list after the other."""
    turns: list[list[int]] = []
    seen: dict[int, int] = {}  # groups of an owner so far
    for group, owner in owners.items():
        turn = seen.get(owner, 0)
        seen[owner] = turn + 1
        if turn == len(turns):
            turns.append([])
        turns[turn].append(group)
    return turns


def mixed_groups(
    group_ids: Integers,
    labels: Integers,
    *,
    process_group: dist.ProcessGroup | None = None,
) -> set[int]:
    """Ids of the groups with both labels: the only ones whose states are needed. Collective.

    Args:
        group_ids, labels, process_group: as in span_weights.

    Returns:
        The same ids on every rank.

    Raises:
        TypeError, ValueError: naming the argument, the value seen and the value wanted.
        RuntimeError: on the other ranks if one rank raised.
    """
    link = Link(process_group, torch.device("cpu"))

    def check() -> list[list[int]]:
        groups = as_integers("group_ids", group_ids).long().tolist()
        truth = as_integers("labels", labels, len(groups)).long().tolist()
        if unknown := [label for label in truth if label not in (1, 0, -1)]:
            raise ValueError(f"labels must be 1, 0 or -1, got {unknown[0]}")
        return [[group, label] for group, label in zip(groups, truth, strict=True)]

    pairs = link.agree(check)
    seen = {(group, label) for part in link.gather(pairs, 2) for group, label in part}
    return {group for group, label in seen if label == 1 and (group, 0) in seen}


def check_same_mixed_groups(
    groups: Collection[int] | None, process_group: dist.ProcessGroup | None, device: torch.device
) -> None:
    """Raise ValueError unless all ranks know the same groups to have both labels. Collective."""
    own = None if groups is None else sorted(groups)
    codes = Link(process_group, device).gather([[_hash(own)]], 1)
    if len({code for ((code,),) in codes}) > 1:
        raise ValueError(
            "mixed_groups must be the same on all ranks, as distributed.mixed_groups returns them, "
            f"got others than these on some rank: {own}"
        )


def without_float64_if_empty(hidden: Tensor) -> Tensor:
    """States, or if there are none in torch's default dtype, whatever that is, none in float32."""
    if isinstance(hidden, Tensor) and hidden.dtype == torch.float64 and hidden.numel() == 0:
        return hidden.float()
    return hidden


def _hash(value: Any) -> int:
    return zlib.crc32(json.dumps(_plain(value)).encode())


def _plain(value: Any) -> Any:
    """A value whose text is that of every equal one: 1 and 1.0, numbers of numpy."""
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return int(value) if value == value // 1 else float(value)
    return value


def _forms(
    link: Link, like: Tensor, rollouts: int, options: Options, with_ids: bool
) -> tuple[int, torch.dtype, int]:
    """Dimension and dtype of the states on all ranks, and the rollouts on the ranks before ours."""
    own = _Form(rollouts=rollouts, dim=like.shape[1], dtype=STATE_DTYPES.index(like.dtype))
    fields = options.fields() | {"the presence of sample_ids": with_ids}
    hashes = [_hash(value) for value in fields.values()]
    told = [row for (row,) in link.gather([[*own, *hashes]], len(own) + len(hashes))]
    for place, (name, value) in enumerate(fields.items(), len(own)):
        if others := [r for r, row in enumerate(told) if row[place] != told[link.rank][place]]:
            raise ValueError(
                f"{name} must be the same on all ranks, got {value!r} on rank {link.rank} and "
                f"another value on rank {others[0]}"
            )
    ranks = [_Form(*row[: len(own)]) for row in told]
    # a rank without rollouts may have states of any form
    forms = {(form.dim, form.dtype) for form in ranks if form.rollouts} or {(own.dim, own.dtype)}
    if len(forms) > 1:
        seen = ", ".join(f"({dim}, {STATE_DTYPES[code]})" for dim, code in sorted(forms))
        raise ValueError(f"hidden must have one d and one dtype on all ranks, got {seen}")
    ((dim, code),) = forms
    return dim, STATE_DTYPES[code], sum(form.rollouts for form in ranks[: link.rank])


def _sum_of_counts(link: Link, counted: list[api.PairCounts]) -> api.PairCounts:
    everywhere = link.gather(counted, columns=len(api.PairCounts._fields))
    rows = [row for of_rank in everywhere for row in of_rank]
    return api.PairCounts(*(map(sum, zip(*rows, strict=True)) if rows else (0, 0, 0, 0, 0)))


def _groups(
    link: Link, rows: Sequence[Row], sample_ids: Sequence[int]
) -> dict[int, list[_Rollout]]:
    """Rollouts of all ranks by group, groups and rollouts in the order of their ids."""
    own = [(*row, sample) for row, sample in zip(rows, sample_ids, strict=True)]
    rollouts = sorted(
        _Rollout(group, sample, label=label, tokens=tokens, rank=rank, place=place)
        for rank, of_rank in enumerate(link.gather(own, columns=4))
        for place, (group, label, tokens, sample) in enumerate(of_rank)
    )
    groups: dict[int, list[_Rollout]] = {}
    for rollout in rollouts:
        members = groups.setdefault(rollout.group, [])
        if members and members[-1].sample == rollout.sample:
            raise ValueError(
                f"sample_ids must be unique within a group, got {rollout.sample} twice in group "
                f"{rollout.group} (ranks {members[-1].rank} and {rollout.rank})"
            )
        members.append(rollout)
    return groups


def _mixed(rollouts: list[_Rollout]) -> list[_Rollout]:
    """Those that take part, if there are tokens with both labels; else none."""
    taking = [r for r in rollouts if r.label >= 0 and r.tokens > 0]
    return taking if {r.label for r in taking} == {0, 1} else []


def _in_callers_words(error: ValueError, states: Tensor, members: list[_Rollout]) -> ValueError:
    """Name the rollout, by rank and sample id, where an error is about a token of members' states.

    The operator saw the rollouts of one group in an order that no caller knows.
    """
    what, found, _ = str(error).partition(" at token ")
    if not found:
        return error
    bad = ~states.isfinite().all(1)
    # else the largest, whose norm is too large
    token = int(bad.nonzero()[0] if bool(bad.any()) else states.double().norm(dim=1).argmax())
    for rollout in members:
        if token < rollout.tokens:
            break
        token -= rollout.tokens
    return ValueError(
        f"{what} at token {token} of rollout {rollout.place} of rank {rollout.rank} "
        f"(sample id {rollout.sample}, group {rollout.group})"
    )


def _owners(groups: dict[int, list[_Rollout]], ranks: int) -> dict[int, int]:
    """One of the ranks that hold a group: large groups first, each where it is least work.

    The work of a group is its token pairs; moving all of its states costs about as much again, so
    that a group leaves the rank that holds most of it only if that has much more to do already.
    """
    load, owners = [0] * ranks, {}
    work = {group: _token_pairs(members) for group, members in groups.items()}
    for group in sorted(groups, key=lambda g: (-work[g], g)):
        held: dict[int, int] = {}
        for rollout in groups[group]:
            held[rollout.rank] = held.get(rollout.rank, 0) + rollout.tokens
        total = sum(held.values())
        owner = min(held, key=lambda r: (load[r] * total + work[group] * (total - held[r]), r))
        load[owner] += work[group]
        owners[group] = owner
    return owners


def _token_pairs(rollouts: list[_Rollout]) -> int:
    correct = sum(r.tokens for r in rollouts if r.label)
    return correct * (sum(r.tokens for r in rollouts) - correct)
