"""The plan of a call as tables on the device: small integers, copied there once per call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .tasks import COST_COLS, COST_ROWS, LINES, SPANS, TOKENS

Integers = NDArray[np.int64]

# Columns of a block, as in csrc/plan.h; the last one is added here.
(GROUP, ROW_SPAN, ROW_SPANS, COL_SPAN, COL_SPANS, ROW_TOKEN, ROW_TOKENS, COL_TOKEN, COL_TOKENS, LD,
 COST_OFFSET, ROW_OFFSET, PAIR_OFFSET, COL_OFFSET) = range(14)  # fmt: skip


class Tasks(NamedTuple):
    """Programs of a launch: those of item k are [first[k], first[k + 1])."""

    first: Tensor
    total: int


@dataclass(frozen=True)
class Chunk:
    """Blocks whose token costs are in memory at the same time.

    Attributes:
        blocks: (M, 14), see tasks.py.
        cost_tiles, row_lines, col_lines, row_means, col_means: programs of the launches.
        pairs: of the blocks; pairs.total of them are in the chunk.
        first_touching, touching: for every rollout, the blocks that it is part of, as
            2 * block + (1 if it is in the columns).
        cost_floats, window_floats: of token costs and windows.
    """

    blocks: Tensor
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
    """All of a call; `host` is what _C.make_plan returned."""

    host: dict[str, Any]
    rollouts: Tensor
    spans: Tensor
    groups: int
    first_member: Tensor
    members: Tensor
    tokens: Tasks
    chunks: list[Chunk]
    self_chunks: list[Chunk]

    @property
    def longest(self) -> int:
        """Tokens of the longest span."""
        spans = self.host["spans"]
        return int((spans[:, 1] - spans[:, 0]).max(initial=0))


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


class _Programs:
    """Tasks before their upload."""

    def __init__(self, counts: Integers, upload: Upload) -> None:
        first = _offsets(counts)
        self.find, self.total = upload.add(first), int(first[-1])

    def on(self, whole: Tensor) -> Tasks:
        return Tasks(self.find(whole), self.total)


def _chunk(
    blocks: Integers, row_of: Integers, col_of: Integers, rollouts: int, upload: Upload
) -> Callable[[Tensor], Chunk]:
    """Prepare a chunk of blocks; row_of and col_of are their rollouts."""
    row_floats = blocks[:, ROW_TOKENS] * blocks[:, COL_SPANS]
    col_floats = blocks[:, COL_TOKENS] * blocks[:, ROW_SPANS]
    wide = np.concatenate([blocks, _offsets(col_floats)[:-1, None]], axis=1)
    pairs = blocks[:, ROW_SPANS] * blocks[:, COL_SPANS]
    sides = np.concatenate([row_of, col_of])
    entries = np.concatenate([2 * np.arange(len(blocks)), 2 * np.arange(len(blocks)) + 1])
    order = np.lexsort((entries, sides))
    table = upload.add(wide)
    programs = {
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

    def on(whole: Tensor) -> Chunk:
        return Chunk(
            table(whole), **{name: t.on(whole) for name, t in tasks.items()},
            first_touching=first_touching(whole), touching=touching(whole), cost_floats=costs,
            window_floats=int(max(row_floats.sum(), col_floats.sum())),
        )  # fmt: skip

    return on


def blocks_of_sizes(
    row_spans: Integers, col_spans: Integers, spans: Integers, ld: Integers, cost_offset: Integers,
    group: Integers,
) -> Integers:  # fmt: skip
    """One block per pair of spans, each the whole of its costs."""
    one = np.ones_like(row_spans)
    rows, cols = (spans[s, 1] - spans[s, 0] for s in (row_spans, col_spans))
    return np.stack([
        group, row_spans, one, col_spans, one, spans[row_spans, 0], rows, spans[col_spans, 0], cols,
        ld, cost_offset, _offsets(rows)[:-1], np.arange(len(rows)),
    ], axis=1)  # fmt: skip


SLICE = 2**24  # token costs of spans with themselves that are in memory at the same time


def self_pairs(plan: dict[str, Any]) -> list[Integers]:
    """Blocks of spans against themselves, chunk by chunk; those that take no part are left out."""
    spans = plan["spans"]
    group = plan["rollouts"][spans[:, 2], 4]
    some = np.flatnonzero(group >= 0)
    if not len(some):
        return []
    sizes = spans[some, 1] - spans[some, 0]
    at_once = max(1, SLICE // int(sizes.max()) ** 2)
    chunks = []
    for begin in range(0, len(some), at_once):
        part, size = some[begin : begin + at_once], sizes[begin : begin + at_once]
        blocks = blocks_of_sizes(part, part, spans, size, _offsets(size * size)[:-1], group[part])
        blocks[:, PAIR_OFFSET] = part
        chunks.append(blocks)
    return chunks


def pairs_of_spans(chunk: Integers, plan: dict[str, Any]) -> Integers:
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
    groups = rollouts[:, 4]
    members = np.argsort(groups, kind="stable")[int((groups < 0).sum()) :]
    found = [upload.add(a) for a in (
        rollouts, spans, _offsets(np.bincount(groups[members], minlength=plan["groups"])), members,
    )]  # fmt: skip
    tokens = _Programs(_tiles(rollouts[:, 1] - rollouts[:, 0], TOKENS), upload)
    chunks = []
    for first, last, *_ in plan["chunks"].tolist():
        blocks = plan["blocks"][first:last]
        row_of, col_of = spans[blocks[:, ROW_SPAN], 2], spans[blocks[:, COL_SPAN], 2]
        if of_means:
            blocks = pairs_of_spans(blocks, plan)
        chunks.append(_chunk(blocks, row_of, col_of, len(rollouts), upload))
    own = [
        _chunk(blocks, 0 * blocks[:, 0], 0 * blocks[:, 0], 1, upload)
        for blocks in (self_pairs(plan) if with_self else [])
    ]
    whole = upload.to(device)
    on = [f(whole) for f in found]
    return Tables(
        plan, on[0], on[1], plan["groups"], on[2], on[3], tokens.on(whole),
        [chunk(whole) for chunk in chunks], [chunk(whole) for chunk in own],
    )  # fmt: skip


def problem_tables(
    n_rows: Integers, n_cols: Integers, n: int, m: int, device: torch.device
) -> Tables:
    """The tables of a batch of transport problems, costs (B, n, m): a block per problem."""
    batch = len(n_rows)
    ends = np.concatenate([n_rows, n_cols])
    spans = np.stack([0 * ends, ends, 0 * ends], axis=1)
    index = np.arange(batch)
    blocks = blocks_of_sizes(index, batch + index, spans, 0 * index + m, n * m * index, 0 * index)
    upload = Upload()
    table = upload.add(spans)
    chunk = _chunk(blocks, 0 * index, 0 * index, 1, upload)
    empty = upload.add(np.zeros(2, np.int64))
    whole = upload.to(device)
    none = empty(whole)
    return Tables(
        {"spans": spans}, none, table(whole), 1, none, none, Tasks(none, 0), [chunk(whole)], []
    )
