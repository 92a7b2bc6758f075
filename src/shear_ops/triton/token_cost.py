"""Hidden states to token costs: a tiled product, then ||x||^2 + ||y||^2 - 2<x, y> and its root.

Near-duplicates cancel in that form, and they are exactly the small costs that a minimum picks: their
entries are marked, and recomputed by direct difference.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .states import States
from .tables import Chunk
from .target import target_of
from .tasks import (
    BLOCK,
    COL_TOKEN,
    COL_TOKENS,
    COST_OFFSET,
    COST_TILE,
    GROUP,
    LD,
    ROW_TOKEN,
    ROW_TOKENS,
    find,
    has_scale,
)

STRIP = 16  # rows and columns that are repaired together
NEAR_DUPLICATE = tl.constexpr(2.0**-7)  # of ||x||^2 + ||y||^2, below which cancellation eats d^2
MARK = tl.constexpr(-1.0)


@triton.jit
def tile_of(blocks, b, local, TILE: tl.constexpr, HIGH: tl.constexpr):
    """Row and column of a block's tile: strips of HIGH tiles, so that both operands stay in cache."""
    rows = tl.cdiv(tl.load(blocks + b * BLOCK + ROW_TOKENS), TILE)
    cols = tl.cdiv(tl.load(blocks + b * BLOCK + COL_TOKENS), TILE)
    top = local // (HIGH * cols) * HIGH
    high = tl.minimum(HIGH, rows - top)
    local -= top * cols
    return (top + local % high) * TILE, local // high * TILE


@triton.jit(do_not_specialize=["count"])
def token_cost_kernel(
    hidden, center, sq_norm, centered, group_norm, blocks, first, count, costs, marks,
    CENTER: tl.constexpr, DIM: tl.constexpr, T: tl.constexpr, DEPTH: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One tile of token costs; marks[task] is how many of its entries want repair.

    CENTER: works on the blocks of centred groups, the other variant on the rest.
    """
    task = tl.program_id(0).to(tl.int64)
    b = find(first, count, task)
    g = tl.load(blocks + b * BLOCK + GROUP)
    if not has_scale(group_norm, g):
        return
    if (tl.load(centered + g) != 0) != CENTER:
        return
    row, col = tile_of(blocks, b, task - tl.load(first + b), T, 8)
    row_tokens = tl.load(blocks + b * BLOCK + ROW_TOKENS)
    col_tokens = tl.load(blocks + b * BLOCK + COL_TOKENS)
    i = row + tl.arange(0, T)
    j = col + tl.arange(0, T)
    x_token = tl.load(blocks + b * BLOCK + ROW_TOKEN) + tl.minimum(i, row_tokens - 1)
    y_token = tl.load(blocks + b * BLOCK + COL_TOKEN) + tl.minimum(j, col_tokens - 1)
    k = tl.arange(0, DEPTH)
    product = tl.zeros((T, T), tl.float32)
    for k0 in range(0, DIM, DEPTH):
        left = k0 + k < DIM
        x = tl.load(hidden + x_token[:, None] * DIM + (k0 + k)[None, :], mask=left[None, :], other=0.0)
        y = tl.load(hidden + y_token[None, :] * DIM + (k0 + k)[:, None], mask=left[:, None], other=0.0)
        if CENTER:
            c = tl.load(center + g * DIM + k0 + k, mask=left, other=0.0)
            x = tl.where(left[None, :], x.to(tl.float32) - c[None, :], 0.0)
            y = tl.where(left[:, None], y.to(tl.float32) - c[:, None], 0.0)
        if UPCAST:
            x = x.to(tl.float32)
            y = y.to(tl.float32)
        product = tl.dot(x, y, product, input_precision=PRECISION)
    norms = tl.load(sq_norm + x_token)[:, None] + tl.load(sq_norm + y_token)[None, :]
    squared = norms - 2.0 * product
    near = squared < NEAR_DUPLICATE * norms
    cost = tl.where(near, MARK, tl.sqrt(tl.maximum(squared, 0.0)))
    inside = (i < row_tokens)[:, None] & (j < col_tokens)[None, :]
    tl.store(marks + task, tl.sum(tl.sum((near & inside).to(tl.int32), 1), 0))
    ld = tl.load(blocks + b * BLOCK + LD)
    at = costs + tl.load(blocks + b * BLOCK + COST_OFFSET) + i[:, None] * ld + j[None, :]
    tl.store(at, cost, mask=inside)


@triton.jit(do_not_specialize=["count"])
def repair_kernel(
    hidden, group_norm, blocks, first, count, costs, marks,
    DIM: tl.constexpr, T: tl.constexpr, S: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """||x - y|| by direct difference for the marked entries of S rows of a tile."""
    task = tl.program_id(0).to(tl.int64)
    b = find(first, count, task)
    if not has_scale(group_norm, tl.load(blocks + b * BLOCK + GROUP)):
        return
    if tl.load(marks + task) == 0:
        return
    row, col = tile_of(blocks, b, task - tl.load(first + b), T, 8)
    row_tokens = tl.load(blocks + b * BLOCK + ROW_TOKENS)
    col_tokens = tl.load(blocks + b * BLOCK + COL_TOKENS)
    ld = tl.load(blocks + b * BLOCK + LD)
    origin = costs + tl.load(blocks + b * BLOCK + COST_OFFSET)
    k = tl.arange(0, DEPTH)
    i = row + tl.program_id(1) * S + tl.arange(0, S)
    x_at = hidden + (tl.load(blocks + b * BLOCK + ROW_TOKEN) + i) * DIM
    for part in range(0, T, S):
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
                    x_at[:, None] + k0 + k[None, :], mask=left & (i < row_tokens)[:, None], other=0.0
                )
                y = tl.load(
                    y_at[:, None] + k0 + k[None, :], mask=left & (j < col_tokens)[:, None], other=0.0
                )
                off = x.to(tl.float32)[:, None, :] - y.to(tl.float32)[None, :, :]
                squares += off * off
            tl.store(at, tl.sqrt(tl.sum(squares, 2)), mask=marked)


def token_costs(states: States, chunk: Chunk, costs: Tensor) -> None:
    """Fill the token costs of a chunk."""
    dim, tasks = states.hidden.shape[1], chunk.cost_tiles
    target = target_of(costs.device)
    marks = torch.empty(tasks.total, dtype=torch.int32, device=costs.device)
    half = states.hidden.dtype != torch.float32
    known = states.sq_norm, states.centered, states.group_norm
    table = chunk.blocks, tasks.first, len(chunk.blocks)
    for center in (False, True):  # float32 states are all centred or, unit means, none are
        wide = half and not center
        token_cost_kernel[tasks.total,](
            states.hidden, states.center, *known, *table, costs, marks,
            CENTER=center, DIM=dim, T=COST_TILE, DEPTH=64 if wide else 32,
            PRECISION="ieee" if wide else target.precision, UPCAST=target.upcast,
            num_warps=8 if not wide else 4, num_stages=3 if not wide else 4,
        )  # fmt: skip
    repair_kernel[tasks.total, COST_TILE // STRIP](
        states.hidden, states.group_norm, *table, costs, marks,
        DIM=dim, T=COST_TILE, S=STRIP, DEPTH=16, num_warps=4,
    )  # fmt: skip
