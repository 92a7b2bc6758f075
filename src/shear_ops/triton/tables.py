"""The plan of a call as tables on the device: small integers, copied there once per call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .columns import (
    BLOCK_BEGIN,
    BLOCK_END,
    COL_SPAN,
    COL_SPANS,
    COL_TOKEN,
    COL_TOKENS,
    COST_FLOATS,
    COST_OFFSET,
    LD,
    PAIR_OFFSET,
    PLACES,
    ROLLOUT_BEGIN,
    ROLLOUT_END,
    ROLLOUT_GROUP,
    ROW_SPAN,
    ROW_SPANS,
    ROW_TOKEN,
    ROW_TOKENS,
    SPAN_BEGIN,
    SPAN_END,
    SPAN_ROLLOUT,
    STRETCH_BEGIN,
    STRETCH_END,
    STRETCH_TOKENS,
    Integers,
    named,
    rows,
)
from .tasks import COST_COLS, COST_ROWS, LINES, ROUNDED, SPANS, TOKENS


class Tasks(NamedTuple):
    """Programs of a launch: those of item k are [first[k], first[k + 1])."""

    first: Tensor
    total: int


@dataclass(frozen=True)
class Chunk:
    """Blocks whose token costs are in memory at the same time.

    Attributes:
        blocks: (M, BLOCK), see columns.py.
        stretches: (S, STRETCH), tokens whose int8 rows the chunk has; roundings: programs.
        places: rows of the stretches.
        cost_tiles, row_lines, col_lines, row_means, col_means: programs of the launches.
        pairs: of the blocks; pairs.total of them are in the chunk.
        first_touching, touching: for every rollout, the blocks that it is part of, as
            2 * block + (1 if it is in the columns).
        cost_floats, window_floats: of token costs and windows.
    """

    blocks: Tensor
    stretches: Tensor
    roundings: Tasks
    places: int
    cost_tiles: Tasks
    row_lines: Tasks
    col_lines: Tasks
    row_means: Tasks
    col_means: Tasks
    pairs: Tasks
    first_touching: Tensor
    touching: Tensor
    cost_floats: int
    window_floats: int


@dataclass(frozen=True)
class Tables:
    """All of a call; `host` is what _C.make_plan returned.

    Attributes:
        correct: (B,) 1 for rollouts whose spans are rows of pairs.
        self_chunks: of spans with themselves.
        second: a chunk of the second look but for the spans (see second_pairs), or None.
    """

    host: dict[str, Any]
    rollouts: Tensor
    correct: Tensor
    spans: Tensor
    groups: int
    first_member: Tensor
    members: Tensor
    tokens: Tasks
    chunks: list[Chunk]
    self_chunks: list[Chunk]
    second: Chunk | None

    @property
    def row_bytes(self) -> int:
        """Bytes of an int8 row, 0 if states are not rounded."""
        return int(self.host["row_bytes"])

    @property
    def longest(self) -> int:
        """Tokens of the longest span."""
        return _longest(self.host["spans"])


class Upload:
    """Arrays that travel to the device as one."""

    def __init__(self) -> None:
        """Start with none."""
        self.parts: list[Integers] = []
        self.size = 0

    def add(self, array: Integers) -> Callable[[Tensor], Tensor]:
        """Take an array; returns what finds it in the uploaded tensor."""
        begin, shape = self.size, array.shape
        padding = array.size % 2  # every array starts on 16 bytes
        self.parts += [array.reshape(-1), np.zeros(padding, np.int64)]
        self.size += array.size + padding
        return lambda whole: whole[begin : begin + array.size].view(shape)

    def to(self, device: torch.device) -> Tensor:
        """Copy all to the device, without waiting for it."""
        whole = torch.from_numpy(np.concatenate([*self.parts, np.zeros(2, np.int64)]))
        if device.type == "cuda":
            whole = whole.pin_memory()
        return whole.to(device, non_blocking=True)


def _offsets(counts: Integers) -> Integers:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])


def _tiles(counts: Integers, size: int) -> Integers:
    return -(-counts // size)


def _sizes(spans: Integers) -> Integers:
    """Tokens of spans."""
    return spans[:, SPAN_END] - spans[:, SPAN_BEGIN]


def _longest(spans: Integers) -> int:
    return int(_sizes(spans).max(initial=0))


NO_STRETCHES = rows("stretch", group=(nothing := np.zeros(0, np.int64)), token=nothing,
                    tokens=nothing, place=nothing)  # fmt: skip


class _Programs:
    """Tasks before their upload."""

    def __init__(self, counts: Integers, upload: Upload) -> None:
        first = _offsets(counts)
        self.find, self.total = upload.add(first), int(first[-1])

    def on(self, whole: Tensor) -> Tasks:
        return Tasks(self.find(whole), self.total)


def _chunk(
    blocks: Integers, row_of: Integers, col_of: Integers, rollouts: int, upload: Upload,
    stretches: Integers = NO_STRETCHES, places: int = 0,
) -> Callable[[Tensor], Chunk]:  # fmt: skip
    """Prepare a chunk of blocks; row_of and col_of are their rollouts."""
    pairs = blocks[:, ROW_SPANS] * blocks[:, COL_SPANS]
    sides = np.concatenate([row_of, col_of])
    entries = np.concatenate([2 * np.arange(len(blocks)), 2 * np.arange(len(blocks)) + 1])
    order = np.lexsort((entries, sides))
    table, rounded = upload.add(blocks), upload.add(stretches)
    programs = {
        "roundings": _tiles(stretches[:, STRETCH_TOKENS], ROUNDED),
        "cost_tiles": _tiles(blocks[:, ROW_TOKENS], COST_ROWS)
        * _tiles(blocks[:, COL_TOKENS], COST_COLS),
        "row_lines": _tiles(blocks[:, ROW_TOKENS], LINES),
        "col_lines": _tiles(blocks[:, COL_TOKENS], LINES),
        "row_means": blocks[:, ROW_SPANS] * _tiles(blocks[:, COL_SPANS], SPANS),
        "col_means": blocks[:, COL_SPANS] * _tiles(blocks[:, ROW_SPANS], SPANS),
        "pairs": pairs,
    }
    tasks = {name: _Programs(counts, upload) for name, counts in programs.items()}
    first_touching = upload.add(_offsets(np.bincount(sides, minlength=rollouts)))
    touching = upload.add(entries[order])
    costs = int((blocks[:, COST_OFFSET] + blocks[:, ROW_TOKENS] * blocks[:, LD]).max(initial=0))
    row_floats = int((blocks[:, ROW_TOKENS] * blocks[:, COL_SPANS]).sum())
    col_floats = int(_col_floats(blocks).sum())

    def on(whole: Tensor) -> Chunk:
        return Chunk(
            table(whole), rounded(whole), places=places,
            **{name: t.on(whole) for name, t in tasks.items()},
            first_touching=first_touching(whole), touching=touching(whole), cost_floats=costs,
            window_floats=max(row_floats, col_floats),
        )  # fmt: skip

    return on


def _alone(blocks: Integers, upload: Upload) -> Callable[[Tensor], Chunk]:
    """Prepare a chunk whose blocks are of no rollouts."""
    none = np.zeros(len(blocks), np.int64)
    return _chunk(blocks, none, none, 1, upload)


def _col_floats(blocks: Integers) -> Integers:
    """Of the column windows of blocks, (col_tokens, row_spans) each."""
    return blocks[:, COL_TOKENS] * blocks[:, ROW_SPANS]


def _with_col_offset(blocks: Integers) -> Integers:
    """Blocks of one chunk as _C.make_plan has them, and where their column windows are."""
    return rows("block", **named("block", blocks), col_offset=_offsets(_col_floats(blocks))[:-1])


def blocks_of_spans(
    row_span: Integers, col_span: Integers, spans: Integers, **columns: Integers
) -> Integers:
    """One block per pair of spans, each the whole of its costs.

    columns: group, ld, cost_offset and pair_offset of the blocks.
    """
    one = np.ones_like(row_span)
    row_tokens, col_tokens = _sizes(spans[row_span]), _sizes(spans[col_span])
    return rows(
        "block", row_span=row_span, row_spans=one, col_span=col_span, col_spans=one,
        row_token=spans[row_span, SPAN_BEGIN], row_tokens=row_tokens,
        col_token=spans[col_span, SPAN_BEGIN], col_tokens=col_tokens, row_place=0 * one,
        col_place=0 * one, row_offset=_offsets(row_tokens)[:-1],
        col_offset=_offsets(col_tokens)[:-1], **columns,
    )  # fmt: skip


SLICE = 2**24  # token costs of single pairs of spans that are in memory at the same time


def _taking_part(plan: dict[str, Any]) -> Integers:
    """Spans of rollouts with an opposing set."""
    group = plan["rollouts"][plan["spans"][:, SPAN_ROLLOUT], ROLLOUT_GROUP]
    return np.flatnonzero(group >= 0)


def self_pairs(plan: dict[str, Any]) -> list[Integers]:
    """Blocks of spans against themselves, chunk by chunk; those that take no part are left out."""
    spans, some = plan["spans"], _taking_part(plan)
    if not len(some):
        return []
    group = plan["rollouts"][spans[:, SPAN_ROLLOUT], ROLLOUT_GROUP]
    sizes = _sizes(spans[some])
    at_once = max(1, SLICE // int(sizes.max()) ** 2)
    chunks = []
    for begin in range(0, len(some), at_once):
        part, size = some[begin : begin + at_once], sizes[begin : begin + at_once]
        offset = _offsets(size * size)[:-1]
        chunks.append(blocks_of_spans(
            part, part, spans, group=group[part], ld=size, cost_offset=offset, pair_offset=part,
        ))  # fmt: skip
    return chunks


def second_pairs(plan: dict[str, Any]) -> Integers:
    """Blocks of the second look at every span's nearest span, a pair each, as many as fit.

    Each has room for the longest spans. Which spans they are is known on the device; until then
    they are of a group after the last one, which has no scale: nothing is computed.
    """
    count, longest = len(plan["spans"]), _longest(plan["spans"][_taking_part(plan)])
    of_first_look = int(plan["chunks"][:, COST_FLOATS].max())
    fit = max(1, max(SLICE, of_first_look) // longest**2)
    looks = -(-count // fit)
    index = np.arange(-(-count // looks))
    zero = 0 * index
    size = zero + longest
    return rows(
        "block", group=zero + plan["groups"], row_span=zero, row_spans=zero + 1, col_span=zero,
        col_spans=zero + 1, row_token=zero, row_tokens=size, col_token=zero, col_tokens=size,
        ld=size, cost_offset=longest**2 * index, row_offset=longest * index,
        col_offset=longest * index, pair_offset=index, row_place=zero, col_place=zero,
    )  # fmt: skip


def pairs_of_spans(chunk: Integers) -> Integers:
    """Blocks whose "tokens" are spans, and whose "costs" are the pairs: for distances of means."""
    blocks = chunk.copy()
    blocks[:, ROW_TOKEN], blocks[:, ROW_TOKENS] = chunk[:, ROW_SPAN], chunk[:, ROW_SPANS]
    blocks[:, COL_TOKEN], blocks[:, COL_TOKENS] = chunk[:, COL_SPAN], chunk[:, COL_SPANS]
    blocks[:, LD], blocks[:, COST_OFFSET] = chunk[:, COL_SPANS], chunk[:, PAIR_OFFSET]
    return blocks


def tables_of(
    plan: dict[str, Any], device: torch.device, *, of_means: bool = False, with_self: bool = False
) -> Tables:
    """The tables of a plan by _C.make_plan.

    of_means: of pairs of span means, not of tokens; with_self: also of spans with themselves.
    """
    rollouts, spans = plan["rollouts"], plan["spans"]
    upload = Upload()
    groups = rollouts[:, ROLLOUT_GROUP]
    members = np.argsort(groups, kind="stable")[int((groups < 0).sum()) :]
    correct = np.zeros(len(rollouts), np.int64)
    correct[spans[plan["blocks"][:, ROW_SPAN], SPAN_ROLLOUT]] = 1
    found = [upload.add(a) for a in (
        rollouts, correct, spans, _offsets(np.bincount(groups[members], minlength=plan["groups"])),
        members,
    )]  # fmt: skip
    lengths = rollouts[:, ROLLOUT_END] - rollouts[:, ROLLOUT_BEGIN]
    tokens = _Programs(_tiles(lengths, TOKENS), upload)
    chunks = []
    for chunk in plan["chunks"]:
        blocks = _with_col_offset(plan["blocks"][chunk[BLOCK_BEGIN] : chunk[BLOCK_END]])
        row_of, col_of = (spans[blocks[:, side], SPAN_ROLLOUT] for side in (ROW_SPAN, COL_SPAN))
        if of_means:
            blocks = pairs_of_spans(blocks)
        stretches = plan["stretches"][chunk[STRETCH_BEGIN] : chunk[STRETCH_END]]
        chunks.append(_chunk(
            blocks, row_of, col_of, len(rollouts), upload, stretches, int(chunk[PLACES])
        ))  # fmt: skip
    own = [_alone(blocks, upload) for blocks in (self_pairs(plan) if with_self else [])]
    looks_again = plan["row_bytes"] > 0 and len(plan["chunks"]) > 0
    second = _alone(second_pairs(plan), upload) if looks_again else None
    whole = upload.to(device)
    on = [f(whole) for f in found]
    return Tables(
        plan, on[0], on[1], on[2], plan["groups"], on[3], on[4], tokens.on(whole),
        [on_device(whole) for on_device in chunks], [on_device(whole) for on_device in own],
        second(whole) if second else None,
    )  # fmt: skip


def problem_tables(
    n_rows: Integers, n_cols: Integers, n: int, m: int, device: torch.device
) -> Tables:
    """The tables of a batch of transport problems, costs (B, n, m): a block per problem."""
    batch, ends = len(n_rows), np.concatenate([n_rows, n_cols])
    spans = rows("span", begin=0 * ends, end=ends, rollout=0 * ends)
    index = np.arange(batch)
    blocks = blocks_of_spans(
        index, batch + index, spans, group=0 * index, ld=0 * index + m, cost_offset=n * m * index,
        pair_offset=index,
    )  # fmt: skip
    upload = Upload()
    table = upload.add(spans)
    chunk = _alone(blocks, upload)
    empty = upload.add(np.zeros(2, np.int64))
    whole = upload.to(device)
    none = empty(whole)
    return Tables(
        {"spans": spans}, none, none, table(whole), 1, none, none, Tasks(none, 0), [chunk(whole)],
        [], None,
    )  # fmt: skip
