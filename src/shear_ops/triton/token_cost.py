"""Hidden states to token costs: a tiled product, then ||x||^2 + ||y||^2 - 2<x, y> and its root.

Near-duplicates cancel in that form, and they are exactly the small costs that a minimum picks:
their entries are marked, and recomputed by direct difference.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _C
from .columns import BLOCK, COL_TOKEN, COL_TOKENS, COST_OFFSET, GROUP, LD, ROW_TOKEN, ROW_TOKENS
from .states import States
from .tables import Chunk
from .target import target_of
from .tasks import COST_COLS, COST_ROWS, find, has_scale

STRIP = 16  # rows and columns that are repaired together
NEAR_DUPLICATE = tl.constexpr(_C.NEAR_DUPLICATE)
MARK = tl.constexpr(-1.0)


HIGH = tl.constexpr(8)  # tiles of a strip
HALVES = tl.constexpr(2)  # of a tile, of its columns


@triton.jit
def tile_of(blocks, b, local, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Row and column of a block's tile, in strips of HIGH tiles: both operands stay in cache."""
    rows = tl.cdiv(tl.load(blocks + b * BLOCK + ROW_TOKENS), ROWS)
    cols = tl.cdiv(tl.load(blocks + b * BLOCK + COL_TOKENS), COLS)
    top = local // (HIGH * cols) * HIGH
    high = tl.minimum(HIGH, rows - top)
    local -= top * cols
    return (top + local % high) * ROWS, local // high * COLS


@triton.jit
def load_depth(row, k, DIM: tl.constexpr, DEPTH: tl.constexpr):
    """Dimensions k of a state, 0 beyond the last one."""
    if DIM % DEPTH == 0:
        return tl.load(row + k)
    else:
        return tl.load(row + k, mask=k < DIM, other=0.0)


@triton.jit(do_not_specialize=["count"])
def token_cost_kernel(
    hidden, center, sq_norm, centered, group_norm, blocks, first, count, costs, marks,
    CENTER: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    HALF: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One tile of token costs or, HALF, half of its columns: float32 operands take more registers.

    marks (tasks, HALVES) is how many of its entries want repair. CENTER: works on the blocks of
    centred groups, the other variant on the rest.
    """
    task = tl.program_id(0).to(tl.int64)
    b = find(first, count, task)
    g = tl.load(blocks + b * BLOCK + GROUP)
    if not has_scale(group_norm, g):
        return
    if (tl.load(centered + g) != 0) != CENTER:
        return
    WIDTH: tl.constexpr = COLS // HALVES if HALF else COLS
    half = tl.program_id(1)
    row, col = tile_of(blocks, b, task - tl.load(first + b), ROWS, COLS)
    row_tokens = tl.load(blocks + b * BLOCK + ROW_TOKENS)
    col_tokens = tl.load(blocks + b * BLOCK + COL_TOKENS)
    i = row + tl.arange(0, ROWS)
    j = col + half * WIDTH + tl.arange(0, WIDTH)
    x_token = tl.load(blocks + b * BLOCK + ROW_TOKEN) + tl.minimum(i, row_tokens - 1)
    y_token = tl.load(blocks + b * BLOCK + COL_TOKEN) + tl.minimum(j, col_tokens - 1)
    k = tl.arange(0, DEPTH)
    product = tl.zeros((ROWS, WIDTH), tl.float32)
    for k0 in range(0, DIM, DEPTH):
        x = load_depth(hidden + x_token[:, None] * DIM, (k0 + k)[None, :], DIM, DEPTH)
        y = load_depth(hidden + y_token[None, :] * DIM, (k0 + k)[:, None], DIM, DEPTH)
        if CENTER:  # beyond the last dimension both are 0 - 0
            c = load_depth(center + g * DIM, k0 + k, DIM, DEPTH)
            x = x.to(tl.float32) - c[None, :]
            y = y.to(tl.float32) - c[:, None]
        if UPCAST:
            x = x.to(tl.float32)
            y = y.to(tl.float32)
        product = tl.dot(x, y, product, input_precision=PRECISION)
    norms = tl.load(sq_norm + x_token)[:, None] + tl.load(sq_norm + y_token)[None, :]
    squared = norms - 2.0 * product
    near = squared < NEAR_DUPLICATE * norms
    cost = tl.where(near, MARK, tl.sqrt(tl.maximum(squared, 0.0)))
    inside = (i < row_tokens)[:, None] & (j < col_tokens)[None, :]
    wanted = tl.sum(tl.sum((near & inside).to(tl.int32), 1), 0)
    tl.store(marks + task * HALVES + half, wanted)
    if not HALF:
        tl.store(marks + task * HALVES + 1, 0)
    ld = tl.load(blocks + b * BLOCK + LD)
    at = costs + tl.load(blocks + b * BLOCK + COST_OFFSET) + i[:, None] * ld + j[None, :]
    tl.store(at, cost, mask=inside)


@triton.jit(do_not_specialize=["count"])
def repair_kernel(
    hidden, group_norm, blocks, first, count, costs, marks,
    DIM: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, S: tl.constexpr,
    DEPTH: tl.constexpr,
):  # fmt: skip
    """||x - y|| by direct difference for the marked entries of S rows of a tile."""
    task = tl.program_id(0).to(tl.int64)
    b = find(first, count, task)
    if not has_scale(group_norm, tl.load(blocks + b * BLOCK + GROUP)):
        return
    if tl.load(marks + task * HALVES) + tl.load(marks + task * HALVES + 1) == 0:
        return
    row, col = tile_of(blocks, b, task - tl.load(first + b), ROWS, COLS)
    row_tokens = tl.load(blocks + b * BLOCK + ROW_TOKENS)
    col_tokens = tl.load(blocks + b * BLOCK + COL_TOKENS)
    ld = tl.load(blocks + b * BLOCK + LD)
    origin = costs + tl.load(blocks + b * BLOCK + COST_OFFSET)
    k = tl.arange(0, DEPTH)
    i = row + tl.program_id(1) * S + tl.arange(0, S)
    x_at = hidden + (tl.load(blocks + b * BLOCK + ROW_TOKEN) + i) * DIM
    for part in range(0, COLS, S):
        j = col + part + tl.arange(0, S)
        inside = (i < row_tokens)[:, None] & (j < col_tokens)[None, :]
        at = origin + i[:, None] * ld + j[None, :]
        marked = tl.load(at, mask=inside, other=0.0) < 0
        if tl.max(tl.max(marked.to(tl.int32), 1), 0) > 0:
            y_at = hidden + (tl.load(blocks + b * BLOCK + COL_TOKEN) + j) * DIM
            squares = tl.zeros((S, S, DEPTH), tl.float32)
            for k0 in range(0, DIM, DEPTH):
                left = (k0 + k < DIM)[None, :]
                x = tl.load(
                    x_at[:, None] + k0 + k[None, :],
                    mask=left & (i < row_tokens)[:, None],
                    other=0.0,
                )
                y = tl.load(
                    y_at[:, None] + k0 + k[None, :],
                    mask=left & (j < col_tokens)[:, None],
                    other=0.0,
                )
                off = x.to(tl.float32)[:, None, :] - y.to(tl.float32)[None, :, :]
                squares += off * off
            tl.store(at, tl.sqrt(tl.sum(squares, 2)), mask=marked)


def token_costs(states: States, chunk: Chunk, costs: Tensor) -> None:
    """Fill the token costs of a chunk."""
    dim, tasks = states.hidden.shape[1], chunk.cost_tiles
    target = target_of(costs.device)
    marks = torch.empty(2 * tasks.total, dtype=torch.int32, device=costs.device)
    half_precision = states.hidden.dtype != torch.float32
    known = states.sq_norm, states.centered, states.group_norm
    table = chunk.blocks, tasks.first, len(chunk.blocks)
    tile = {"DIM": dim, "ROWS": COST_ROWS, "COLS": COST_COLS}
    for center in (False, True):  # the float32 states of tokens are all centred, unit means are not
        wide = half_precision and not center
        depth, columns = (64, COST_COLS) if wide else (32, COST_COLS // 2)
        bytes_each = depth * (COST_ROWS + columns) * (2 if half_precision else 4)
        token_cost_kernel[tasks.total, 1 if wide else 2](
            states.hidden, states.center, *known, *table, costs, marks,
            **tile, CENTER=center, HALF=not wide, DEPTH=depth,
            PRECISION="ieee" if wide else target.precision, UPCAST=target.upcast,
            num_warps=8, num_stages=target.stages(bytes_each),
        )  # fmt: skip
    repair_kernel[tasks.total, COST_ROWS // STRIP](
        states.hidden, states.group_norm, *table, costs, marks, **tile, S=STRIP, DEPTH=16,
        num_warps=4,
    )  # fmt: skip
