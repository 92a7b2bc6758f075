"""Hidden states to int8 rows, by the rule of csrc/rounding.h: the same bits as on the CPU."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .. import _C
from .columns import STRETCH, STRETCH_GROUP, STRETCH_PLACE, STRETCH_TOKEN, STRETCH_TOKENS
from .tables import Chunk
from .tasks import ROUNDED, find, has_scale

MOST = tl.constexpr(float(_C.ROUNDING["most_int8"]))
LEAST_ENTRY = tl.constexpr(_C.ROUNDING["least_entry"])
MAGIC = tl.constexpr(1.5 * 2**23)  # floats from here on are integers


class Rows(NamedTuple):
    """Int8 rows (places, row_bytes) of the tokens of a chunk, and the length of a step of each."""

    row: Any
    scale: Any


@triton.jit
def nearest_integer(x):
    """The nearest integer of |x| < 2^22, the even one of two."""
    return ((x + MAGIC) - MAGIC).to(tl.int32)


@triton.jit
def signs(k):
    """Whether dimensions k change their sign: sign_of_dimension of csrc/rounding.h."""
    k = k.to(tl.uint32)
    k = (k ^ (k >> 16)) * 0x85EBCA6B
    k = (k ^ (k >> 13)) * 0xC2B2AE35
    return ((k ^ (k >> 16)) >> 31) != 0


@triton.jit
def rotated(
    states, there, center, k0,
    DIM: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """A block of dimensions from k0 on of T states: less the center, with signs, transformed."""
    k = k0 + tl.arange(0, BLOCK)
    left = k < DIM
    inside = there[:, None] & left[None, :]
    x = tl.load(states[:, None] + k[None, :], mask=inside, other=0.0).to(tl.float32)
    x -= tl.load(center + k, mask=left, other=0.0)[None, :]
    x = tl.where(signs(k)[None, :], -x, x)
    # partners are neighbours in every step: each moves the last bit of the index to the front
    for _ in tl.static_range(BITS):
        low, high = tl.split(tl.reshape(x, (T, BLOCK // 2, 2)))
        x = tl.reshape(tl.permute(tl.join(low + high, low - high), (0, 2, 1)), (T, BLOCK))
    return x


@triton.jit(do_not_specialize=["count"])
def round_kernel(
    hidden, center, group_norm, stretches, first, count, rows,
    DIM: tl.constexpr, DEPTH: tl.constexpr, BLOCK: tl.constexpr, BITS: tl.constexpr,
    STEP: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """The rows of T tokens of a stretch, and the lengths of their steps.

    To be compiled without fused multiply-adds.
    """
    task = tl.program_id(0).to(tl.int64)
    s = find(first, count, task)
    stretch = stretches + s * STRETCH
    g = tl.load(stretch + STRETCH_GROUP)
    if not has_scale(group_norm, g):
        return
    lane = (task - tl.load(first + s)) * T + tl.arange(0, T)
    there = lane < tl.load(stretch + STRETCH_TOKENS)
    states = hidden + (tl.load(stretch + STRETCH_TOKEN) + lane) * DIM
    place = tl.load(stretch + STRETCH_PLACE) + lane
    center += g * DIM
    largest = tl.zeros((T,), tl.float32)
    for k0 in range(0, DEPTH, BLOCK):
        x = rotated(states, there, center, k0, DIM, T, BLOCK, BITS)
        largest = tl.maximum(largest, tl.max(tl.abs(x), 1))
    is_center = ~(largest >= LEAST_ENTRY)
    tl.store(rows.scale + place, tl.where(is_center, 0.0, largest * STEP), mask=there)
    to_steps = tl.div_rn(tl.full((T,), MOST, tl.float32), tl.where(is_center, 1.0, largest))
    to_steps = tl.where(is_center, 0.0, to_steps)
    for k0 in range(0, DEPTH, BLOCK):
        x = rotated(states, there, center, k0, DIM, T, BLOCK, BITS)
        entry = nearest_integer(x * to_steps[:, None]).to(tl.int8)
        k = k0 + tl.arange(0, BLOCK)
        tl.store(rows.row + place[:, None] * DEPTH + k[None, :], entry, mask=there[:, None])


def round_states(
    hidden: Tensor, center: Tensor, group_norm: Tensor, chunk: Chunk, rows: Rows
) -> None:
    """Fill the int8 rows of a chunk."""
    tasks, depth = chunk.roundings, rows.row.shape[1]
    block = max(size for size in _C.ROUNDING["step"] if depth % size == 0)
    round_kernel[tasks.total,](
        hidden, center, group_norm, chunk.stretches, tasks.first, len(chunk.stretches), rows,
        DIM=hidden.shape[1], DEPTH=depth, BLOCK=block, BITS=block.bit_length() - 1,
        STEP=_C.ROUNDING["step"][block], T=ROUNDED, enable_fp_fusion=False,
    )  # fmt: skip
