"""Columns of a plan's tables, by the names that C++ gives them in `_C.COLUMNS`.

A row is a rollout, a span, a block, a stretch or a chunk. The constants here are indices for
kernels and for arrays alike, and `rows` makes rows by name: nothing else knows the order of the
columns.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from numpy.typing import NDArray

from .. import _C

Integers = NDArray[np.int64]

_used: set[tuple[str, str]] = set()
COLUMNS = {**_C.COLUMNS, "block": (*_C.COLUMNS["block"], "col_offset")}  # like row_offset


def column(table: str, name: str) -> Any:
    """Index of a column; a constant of kernels that is an index of arrays too."""
    _used.add((table, name))
    return tl.constexpr(COLUMNS[table].index(name))


def width(table: str) -> Any:
    """Columns of a table: how far its rows are apart."""
    return tl.constexpr(len(COLUMNS[table]))


def rows(table: str, **columns: Integers) -> Integers:
    """Rows of a table; columns that nothing here uses may be left out, and are 0."""
    used = {name for of, name in _used if of == table}
    if not used <= columns.keys() <= set(COLUMNS[table]):
        raise TypeError(f"a {table} has the columns {', '.join(COLUMNS[table])}")
    nothing = np.zeros_like(next(iter(columns.values())))
    return np.stack([columns.get(name, nothing) for name in COLUMNS[table]], axis=1)


def named(table: str, array: Integers) -> dict[str, Integers]:
    """Columns of a table that _C.make_plan returned."""
    return dict(zip(_C.COLUMNS[table], array.T, strict=True))


ROLLOUT = width("rollout")
ROLLOUT_BEGIN = column("rollout", "begin")
ROLLOUT_END = column("rollout", "end")
ROLLOUT_SPAN_BEGIN = column("rollout", "span_begin")
ROLLOUT_SPAN_END = column("rollout", "span_end")
ROLLOUT_GROUP = column("rollout", "group")

SPAN = width("span")
SPAN_BEGIN = column("span", "begin")
SPAN_END = column("span", "end")
SPAN_ROLLOUT = column("span", "rollout")

BLOCK = width("block")
GROUP = column("block", "group")
ROW_SPAN = column("block", "row_span")
ROW_SPANS = column("block", "row_spans")
COL_SPAN = column("block", "col_span")
COL_SPANS = column("block", "col_spans")
ROW_TOKEN = column("block", "row_token")
ROW_TOKENS = column("block", "row_tokens")
COL_TOKEN = column("block", "col_token")
COL_TOKENS = column("block", "col_tokens")
LD = column("block", "ld")
COST_OFFSET = column("block", "cost_offset")
ROW_OFFSET = column("block", "row_offset")
COL_OFFSET = column("block", "col_offset")
PAIR_OFFSET = column("block", "pair_offset")
ROW_PLACE = column("block", "row_place")
COL_PLACE = column("block", "col_place")

STRETCH = width("stretch")
STRETCH_GROUP = column("stretch", "group")
STRETCH_TOKEN = column("stretch", "token")
STRETCH_TOKENS = column("stretch", "tokens")
STRETCH_PLACE = column("stretch", "place")

BLOCK_BEGIN = column("chunk", "block_begin")
BLOCK_END = column("chunk", "block_end")
STRETCH_BEGIN = column("chunk", "stretch_begin")
STRETCH_END = column("chunk", "stretch_end")
COST_FLOATS = column("chunk", "cost_floats")
PLACES = column("chunk", "places")
