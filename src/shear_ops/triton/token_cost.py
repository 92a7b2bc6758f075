"""Hidden states to token costs: a tiled product, then ||x||^2 + ||y||^2 - 2<x, y> and its root.

Near-duplicates cancel in that form, and they are exactly the small costs that a minimum picks:
their entries are marked, and recomputed by direct difference. The product is one of int8 rows,
exact in int32, or of centred states in float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _C
from .columns import (
    BLOCK,
    COL_PLACE,
    COL_TOKEN,
    COL_TOKENS,
    COST_OFFSET,
    GROUP,
    LD,
    ROW_PLACE,
    ROW_TOKEN,
    ROW_TOKENS,
)
from .rounding import Rows
from .states import States
from .tables import Chunk
from .target import target_of
from .tasks import COST_COLS, COST_ROWS, find, has_scale

STRIP = 16  # rows of a tile that are repaired together
REPAIRS = 8  # programs that repair, per processor
NEAR_DUPLICATE = tl.constexpr(_C.NEAR_DUPLICATE)
NEAR_ROUNDED = tl.constexpr(_C.NEAR_ROUNDED)
MARK = tl.constexpr(-1.0)


HIGH = tl.constexpr(8)  # tiles of a strip
HALVES = tl.constexpr(2)  # of a tile, of its columns


@triton.jit
def tile_of(blocks, b, local, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Row and column of a block's tile, in strips of HIGH tiles: both operands stay in cache.

    Outside the block if it has fewer tiles.
    """
    rows = tl.cdiv(tl.load(blocks + b * BLOCK + ROW_TOKENS), ROWS)
    cols = tl.cdiv(tl.load(blocks + b * BLOCK + COL_TOKENS), COLS)
    top = local // (HIGH * cols) * HIGH
    high = tl.maximum(tl.minimum(HIGH, rows - top), 1)
    local -= top * cols
    return (top + local % high) * ROWS, local // high * COLS


@triton.jit
def load_depth(row, k, DIM: tl.constexpr, DEPTH: tl.constexpr):
    """Dimensions k of a state, 0 beyond the last one."""
    if DIM % DEPTH == 0:
        return tl.load(row + k)
    else:
        return tl.load(row + k, mask=k < DIM, other=0.0)


@triton.jit
def product_of_states(
    hidden, center, x_token, y_token,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr, DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Products [ROWS, WIDTH] of the states of tokens less a center."""
    k = tl.arange(0, DEPTH)
    product = tl.zeros((ROWS, WIDTH), tl.float32)
    for k0 in range(0, DIM, DEPTH):
        x = load_depth(hidden + x_token[:, None] * DIM, (k0 + k)[None, :], DIM, DEPTH)
        y = load_depth(hidden + y_token[None, :] * DIM, (k0 + k)[:, None], DIM, DEPTH)
        c = load_depth(center, k0 + k, DIM, DEPTH)
        x = x.to(tl.float32) - c[None, :]  # beyond the last dimension both are 0 - 0
        y = y.to(tl.float32) - c[:, None]
        product = tl.dot(x, y, product, input_precision=PRECISION)
    return product


@triton.jit
def product_of_rows(
    rows, x_place, y_place,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """The same of int8 rows."""
    k = tl.arange(0, DEPTH)
    steps = tl.zeros((ROWS, WIDTH), tl.int32)
    for k0 in range(0, DIM, DEPTH):
        x = tl.load(rows.row + x_place[:, None] * DIM + (k0 + k)[None, :])
        y = tl.load(rows.row + y_place[None, :] * DIM + (k0 + k)[:, None])
        steps = tl.dot(x, y, steps, out_dtype=tl.int32)
    scale = tl.load(rows.scale + x_place)[:, None] * tl.load(rows.scale + y_place)[None, :]
    return scale * steps.to(tl.float32)


@triton.jit(do_not_specialize=["count"])
def token_cost_kernel(
    hidden, center, sq_norm, rows, group_norm, blocks, first, count, costs, marks,
    ROUNDED: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of token costs from int8 rows, ROUNDED, or half of its columns from states: float32
    operands take more registers.

    marks (tasks, HALVES) is how many of its entries want repair, 0 before. DIM: of what is
    multiplied.
    """
    task = tl.program_id(0).to(tl.int64)
    b = find(first, count, task)
    g = tl.load(blocks + b * BLOCK + GROUP)
    if not has_scale(group_norm, g):
        return
    WIDTH: tl.constexpr = COLS if ROUNDED else COLS // HALVES
    half = tl.program_id(1)
    row, col = tile_of(blocks, b, task - tl.load(first + b), ROWS, COLS)
    col += half * WIDTH
    row_tokens = tl.load(blocks + b * BLOCK + ROW_TOKENS)
    col_tokens = tl.load(blocks + b * BLOCK + COL_TOKENS)
    if (row >= row_tokens) | (col >= col_tokens):
        return
    i = row + tl.arange(0, ROWS)
    j = col + tl.arange(0, WIDTH)
    x = tl.minimum(i, row_tokens - 1)
    y = tl.minimum(j, col_tokens - 1)
    x_token = tl.load(blocks + b * BLOCK + ROW_TOKEN) + x
    y_token = tl.load(blocks + b * BLOCK + COL_TOKEN) + y
    if ROUNDED:
        x += tl.load(blocks + b * BLOCK + ROW_PLACE)
        y += tl.load(blocks + b * BLOCK + COL_PLACE)
        product = product_of_rows(rows, x, y, ROWS, WIDTH, DIM, DEPTH)
    else:
        product = product_of_states(
            hidden, center + g * DIM, x_token, y_token, ROWS, WIDTH, DIM, DEPTH, PRECISION
        )
    norms = tl.load(sq_norm + x_token)[:, None] + tl.load(sq_norm + y_token)[None, :]
    squared = norms - 2.0 * product
    near = squared < (NEAR_ROUNDED if ROUNDED else NEAR_DUPLICATE) * norms
    cost = tl.where(near, MARK, tl.sqrt(tl.maximum(squared, 0.0)))
    inside = (i < row_tokens)[:, None] & (j < col_tokens)[None, :]
    wanted = tl.sum(tl.sum((near & inside).to(tl.int32), 1), 0)
    tl.store(marks + task * HALVES + half, wanted)
    ld = tl.load(blocks + b * BLOCK + LD)
    at = costs + tl.load(blocks + b * BLOCK + COST_OFFSET) + i[:, None] * ld + j[None, :]
    tl.store(at, cost, mask=inside)


@triton.jit
def list_marked(
    costs, ld, rows, cols, found, S: tl.constexpr, COLS: tl.constexpr, SCAN: tl.constexpr
):
    """Write down the marked entries of S x COLS costs, rows x cols of them used; how many."""
    number = tl.zeros((), tl.int32)
    for begin in range(0, S * COLS, SCAN):
        entry = begin + tl.arange(0, SCAN)
        i = entry // COLS
        j = entry % COLS
        inside = (i < rows) & (j < cols)
        marked = (tl.load(costs + i * ld + j, mask=inside, other=0.0) < 0).to(tl.int32)
        tl.store(found + number + tl.cumsum(marked, 0) - 1, entry, mask=marked != 0)
        number += tl.sum(marked, 0)
    return number


@triton.jit(do_not_specialize=["count", "total"])
def repair_kernel(
    hidden, blocks, first, count, total, costs, marks, lists,
    DIM: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, S: tl.constexpr,
    SCAN: tl.constexpr, E: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """||x - y|| by direct difference for the marked entries, E at a time, of S rows of a tile.

    Marked entries are few and scattered: each is worth its own pair of states, but not its
    neighbours'. lists: room for S * COLS entries per program.
    """
    found = lists + tl.program_id(0).to(tl.int64) * S * COLS
    strips: tl.constexpr = ROWS // S
    strip = tl.program_id(0).to(tl.int64)
    while strip < total * strips:
        task = strip // strips
        if tl.load(marks + task * HALVES) + tl.load(marks + task * HALVES + 1) > 0:
            b = find(first, count, task)
            row, col = tile_of(blocks, b, task - tl.load(first + b), ROWS, COLS)
            row += strip % strips * S
            rows = tl.load(blocks + b * BLOCK + ROW_TOKENS) - row
            cols = tl.load(blocks + b * BLOCK + COL_TOKENS) - col
            ld = tl.load(blocks + b * BLOCK + LD)
            origin = costs + tl.load(blocks + b * BLOCK + COST_OFFSET) + row * ld + col
            x_at = hidden + (tl.load(blocks + b * BLOCK + ROW_TOKEN) + row) * DIM
            y_at = hidden + (tl.load(blocks + b * BLOCK + COL_TOKEN) + col) * DIM
            number = list_marked(origin, ld, rows, cols, found, S, COLS, SCAN)
            tl.debug_barrier()
            begin = number * 0
            while begin < number:
                lane = begin + tl.arange(0, E)
                entry = tl.load(found + lane, mask=lane < number, other=0)
                i = (entry // COLS).to(tl.int64)
                j = (entry % COLS).to(tl.int64)
                squares = tl.zeros((E, DEPTH), tl.float32)
                for k0 in range(0, DIM, DEPTH):
                    k = k0 + tl.arange(0, DEPTH)
                    inside = (lane < number)[:, None] & (k < DIM)[None, :]
                    x = tl.load(x_at + i[:, None] * DIM + k[None, :], mask=inside, other=0.0)
                    y = tl.load(y_at + j[:, None] * DIM + k[None, :], mask=inside, other=0.0)
                    off = x.to(tl.float32) - y.to(tl.float32)
                    squares += off * off
                squared = tl.sum(squares, 1)
                tl.store(origin + i * ld + j, tl.sqrt(squared), mask=lane < number)
                begin += E
            tl.debug_barrier()  # the next strip writes the list again
        strip += tl.num_programs(0)


def token_costs(states: States, chunk: Chunk, costs: Tensor, rows: Rows | None = None) -> None:
    """Fill the token costs of a chunk, from int8 rows if there are any."""
    dim, tasks = states.hidden.shape[1], chunk.cost_tiles
    target = target_of(costs.device)
    marks = torch.zeros(2 * tasks.total, dtype=torch.int32, device=costs.device)
    table = chunk.blocks, tasks.first, len(chunk.blocks)
    tile = {"ROWS": COST_ROWS, "COLS": COST_COLS}
    if rows is not None:
        row_bytes = rows.row.shape[1]
        depth = 128 if row_bytes % 128 == 0 else 64
        halves, bytes_each = 1, depth * (COST_ROWS + COST_COLS)
    else:
        row_bytes, depth, halves = 0, 32, 2
        bytes_each = depth * (COST_ROWS + COST_COLS // 2) * states.hidden.element_size()
    token_cost_kernel[tasks.total, halves](
        states.hidden, states.center, states.sq_norm, rows, states.group_norm, *table, costs, marks,
        **tile, ROUNDED=rows is not None, DIM=row_bytes or dim, DEPTH=depth,
        PRECISION=target.precision, num_warps=8, num_stages=target.stages(bytes_each),
    )  # fmt: skip
    programs = min(tasks.total * (COST_ROWS // STRIP), target.processors * REPAIRS)
    lists = torch.empty(programs * STRIP * COST_COLS, dtype=torch.int32, device=costs.device)
    repair_kernel[programs,](
        states.hidden, *table, tasks.total, costs, marks, lists, DIM=dim, **tile, S=STRIP,
        SCAN=2048, E=32, DEPTH=min(128, triton.next_power_of_2(dim)), num_warps=4,
    )  # fmt: skip
