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
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..config import SpanConfig, check_config
from ..ops import api, backends
from ..ops.batch import STATE_DTYPES, Batch, Integers, Row, as_integers
from .link import Link, Move
from .weighting import Weighting, check_step

TOGETHER_BYTES = 2**26  # of states: smaller groups are worth a common call
NO_LAUNCH = ("cpu",)  # devices where a call of its own costs a group nothing


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
    launches: int  # whether a call on the device of the states has to launch kernels


class Rollout(NamedTuple):
    """A rollout of any rank."""

    group: int
    sample: int
    label: int
    tokens: int
    rank: int
    place: int  # among the rollouts of its rank


Groups = dict[int, list[Rollout]]  # by id; rollouts in the order of their sample ids


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
        link,
        batch.rows(),
        ids,
        lambda i, begin, end: states[offsets[i] + begin : offsets[i] + end],
        states,
        options,
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
    group_size: int | None = None  # most rollouts of a group, if known

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
            "group_size": self.group_size,
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


class Computed:
    """Groups that this rank has computed.

    Attributes:
        weights: by group, (N,) float32 of its rollouts that take part, in the order of their sample
            ids, before any Weighting.
        pairs: counts, a call each.
    """

    def __init__(self) -> None:
        """Start with none."""
        self.weights: dict[int, Tensor] = {}
        self.pairs: list[api.PairCounts] = []

    def add(self, groups: Groups, states: Tensor, options: Options) -> None:
        """Compute groups in one call; states (N, d) are theirs, rollout by rollout."""
        members = _members(groups)
        lengths = [r.tokens for r in members]
        try:
            weights, pairs = api.span_weights(
                states,
                cu_seqlens=torch.tensor([0, *lengths], device="cpu").cumsum(0),
                group_ids=[r.group for r in members],
                labels=[r.label for r in members],
                config=options.config,
                backend=options.backend,
                return_counts=True,
            )
        except ValueError as error:
            raise _in_callers_words(error, states, members) from None
        sizes = [_tokens(group) for group in groups.values()]
        self.weights.update(zip(groups, torch.split(weights, sizes), strict=True))
        self.pairs.append(pairs)

    def add_local(
        self,
        groups: Groups,
        take: Callable[[Rollout], Tensor],
        like: Tensor,
        options: Options,
        frees: bool,
    ) -> None:
        """Compute groups whose rollouts are all here; arguments as in regroup."""
        together = TOGETHER_BYTES // (like.shape[1] * like.element_size()) if frees else 0
        for call in _calls(groups, _launches(like), together):
            called = {group: groups[group] for group in call}
            self.add(called, _assembled(called, take, like), options)


def regroup(
    link: Link,
    rows: Sequence[Row],
    sample_ids: Sequence[int] | None,
    take: Callable[[int, int, int], Tensor],
    like: Tensor,
    options: Options,
    *,
    early: Computed | None = None,
    frees: bool = False,
) -> Regrouped:
    """Bring every group with both labels to one rank, there compute it, and bring weights back.

    Beside what the caller stores, a rank holds the states of its largest group, or of smaller ones
    that are no more together, and the pieces of an exchange between ranks (see Link.exchange) or
    the workspace of a computation.

    Args:
        link: the ranks. rows: this rank's rollouts, checked. sample_ids: as in span_weights.
        take: states of the rollout at a place in rows from token begin to token end, on any device.
            It is asked once for each state of groups with both labels, when their group's turn
            comes, and never for others: what it returns need not be kept.
        like: of the dtype, device and last dimension of all states. options: checked.
        early: groups of options.group_size rollouts that this rank has computed already.
        frees: whether the bytes of what take returns were on like's device, and are free then.

    Raises:
        ValueError: arguments that differ between ranks, duplicate sample_ids, a group of more than
            options.group_size rollouts, states that are refused.
        RuntimeError: on the other ranks if one rank raised.
    """
    dim, dtype, launches, before = _forms(link, like, len(rows), options, sample_ids is not None)
    like = torch.empty(0, dim, dtype=dtype, device=like.device)
    ids = range(before, before + len(rows)) if sample_ids is None else sample_ids
    groups = _groups(link, rows, ids, options.group_size)
    mixed = {
        group: taking for group, rollouts in groups.items() if (taking := mixed_members(rollouts))
    }
    owners = _owners(mixed, link.size)
    moves = {
        group: [
            Move(r, r.tokens, r.rank, owners[group])
            for r in mixed[group]
            if r.rank != owners[group]
        ]
        for group in mixed
    }
    mine = {group: members for group, members in mixed.items() if owners[group] == link.rank}
    computed = Computed() if early is None else early

    def local() -> None:
        left = {g: mine[g] for g in mine if not moves[g] and g not in computed.weights}
        computed.add_local(left, lambda r: take(r.place, 0, r.tokens), like, options, frees)

    link.agree(local)
    states_sent = 0
    spread = {group: members for group, members in mixed.items() if moves[group]}
    for turn in _turns(spread, owners, launches):
        own = {group: mine[group] for group in turn if group in mine}
        whole, parts = _room(own, like)
        states_sent += link.exchange(
            [move for group in turn for move in moves[group]],
            lambda r, begin, end: take(r.place, begin, end),
            parts.__getitem__,
            columns=dim,
            dtype=dtype,
        )

        def compute(
            own: Groups = own, whole: Tensor = whole, parts: dict[Rollout, Tensor] = parts
        ) -> None:
            for r, part in parts.items():
                if r.rank == link.rank:
                    part.copy_(take(r.place, 0, r.tokens))
            if own:
                computed.add(own, whole, options)

        link.agree(compute)
        del compute, whole, parts  # before there is room for the next turn
    used: dict[Rollout, Tensor] = {}
    for group, members in mine.items():
        weights = options.weighting.apply(computed.weights[group], options.step)
        used.update(zip(members, torch.split(weights, [r.tokens for r in members]), strict=True))
    own_rollouts = [r for r in _members(mixed) if r.rank == link.rank]
    used |= {
        r: torch.empty(r.tokens, dtype=torch.float32, device=like.device)
        for r in own_rollouts
        if r not in used
    }
    weights_sent = link.exchange(
        [move.back() for group in mixed for move in moves[group]],
        lambda r, begin, end: used[r][begin:end, None],
        lambda r: used[r][:, None],
        columns=1,
        dtype=torch.float32,
    )
    return Regrouped(
        weights={r.place: used[r] for r in own_rollouts},
        states_sent=states_sent,
        weights_sent=weights_sent,
        groups=len(groups),
        mixed_groups=len(mixed),
        pairs=_sum_of_counts(link, computed.pairs),
    )


def _members(groups: Groups) -> list[Rollout]:
    return [rollout for members in groups.values() for rollout in members]


def _tokens(rollouts: Sequence[Rollout]) -> int:
    return sum(r.tokens for r in rollouts)


def _room(groups: Groups, like: Tensor) -> tuple[Tensor, dict[Rollout, Tensor]]:
    """Room (N, d) for the states of groups, and each rollout's part of it."""
    members = _members(groups)
    whole = like.new_empty(_tokens(members), like.shape[1])
    parts = torch.split(whole, [r.tokens for r in members])
    return whole, dict(zip(members, parts, strict=True))


def _assembled(groups: Groups, take: Callable[[Rollout], Tensor], like: Tensor) -> Tensor:
    whole, parts = _room(groups, like)
    for rollout, part in parts.items():
        part.copy_(take(rollout))
    return whole


def _launches(like: Tensor) -> bool:
    return like.device.type not in NO_LAUNCH


def _calls(groups: Groups, launches: bool, together: int = 0) -> list[list[int]]:
    """Groups of one call each, in order: where it launches kernels, several small ones.

    They have no more tokens together than the largest group has; where calls free the states that
    they took, that and what is free by then, up to so many together. So the peak is that of one
    group at a time.
    """
    if not launches:
        return [[group] for group in groups]
    most = max(map(_tokens, groups.values()), default=0)
    calls: list[list[int]] = []
    room, done, held = most, 0, 0  # held: tokens of the last call; done: of those before it
    for group, members in groups.items():
        tokens = _tokens(members)
        if not calls or held + tokens > room:
            done, held = done + held, 0
            room = max(most, min(most + done, together))
            calls.append([])
        calls[-1].append(group)
        held += tokens
    return calls


def _turns(groups: Groups, owners: Mapping[int, int], launches: bool) -> list[list[int]]:
    """Groups, a call of every owner at a time."""
    by_owner: dict[int, dict[int, list[Rollout]]] = {}
    for group, members in groups.items():
        by_owner.setdefault(owners[group], {})[group] = members
    calls = [_calls(own, launches) for own in by_owner.values()]
    return [[g for call in turn for g in call] for turn in zip_longest(*calls, fillvalue=[])]


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
) -> tuple[int, torch.dtype, bool, int]:
    """Dimension, dtype and launches of all ranks' states, and the rollouts on those before ours."""
    own = _Form(rollouts, like.shape[1], STATE_DTYPES.index(like.dtype), _launches(like))
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
    launches = any(form.launches for form in ranks if form.rollouts)
    return dim, STATE_DTYPES[code], launches, sum(form.rollouts for form in ranks[: link.rank])


def _sum_of_counts(link: Link, counted: list[api.PairCounts]) -> api.PairCounts:
    everywhere = link.gather(counted, columns=len(api.PairCounts._fields))
    rows = [row for of_rank in everywhere for row in of_rank]
    return api.PairCounts(*(map(sum, zip(*rows, strict=True)) if rows else (0, 0, 0, 0, 0)))


def _groups(
    link: Link, rows: Sequence[Row], sample_ids: Sequence[int], group_size: int | None
) -> Groups:
    """Rollouts of all ranks by group, groups and rollouts in the order of their ids."""
    own = [(*row, sample) for row, sample in zip(rows, sample_ids, strict=True)]
    rollouts = sorted(
        Rollout(group, sample, label=label, tokens=tokens, rank=rank, place=place)
        for rank, of_rank in enumerate(link.gather(own, columns=4))
        for place, (group, label, tokens, sample) in enumerate(of_rank)
    )
    groups: Groups = {}
    for rollout in rollouts:
        members = groups.setdefault(rollout.group, [])
        if members and members[-1].sample == rollout.sample:
            raise ValueError(
                f"sample_ids must be unique within a group, got {rollout.sample} twice in group "
                f"{rollout.group} (ranks {members[-1].rank} and {rollout.rank})"
            )
        members.append(rollout)
        if group_size is not None and len(members) > group_size:
            raise ValueError(
                f"group_size must be that of every group, got {group_size} and more rollouts of "
                f"group {rollout.group}, on ranks {sorted({r.rank for r in members})}"
            )
    return groups


def mixed_members(rollouts: Sequence[Rollout]) -> list[Rollout]:
    """Those that take part, if there are tokens with both labels; else none."""
    taking = [r for r in rollouts if r.label >= 0 and r.tokens > 0]
    return taking if {r.label for r in taking} == {0, 1} else []


def _in_callers_words(error: ValueError, states: Tensor, members: list[Rollout]) -> ValueError:
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


def _owners(groups: Groups, ranks: int) -> dict[int, int]:
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


def _token_pairs(rollouts: list[Rollout]) -> int:
    correct = sum(r.tokens for r in rollouts if r.label)
    return correct * (sum(r.tokens for r in rollouts) - correct)
