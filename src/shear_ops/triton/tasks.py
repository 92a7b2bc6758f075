"""What a program of a launch works on: all blocks of a chunk share a launch, so that many small
groups fill a GPU.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Of one program; tables.py counts programs by them.
COST_ROWS, COST_COLS = 128, 256  # of token costs
LINES = 32  # rows or columns of token costs whose windows are reduced
SPANS = 32  # pairs of one span with others
TOKENS = 128  # of one rollout

# Columns of the tables that csrc/bindings.cpp makes of a plan; COL_OFFSET is added by tables.py.
ROLLOUT = tl.constexpr(5)  # columns in all
ROLLOUT_BEGIN = tl.constexpr(0)
ROLLOUT_END = tl.constexpr(1)
ROLLOUT_FIRST_SPAN = tl.constexpr(2)
ROLLOUT_LAST_SPAN = tl.constexpr(3)
ROLLOUT_GROUP = tl.constexpr(4)

SPAN = tl.constexpr(3)
SPAN_BEGIN = tl.constexpr(0)
SPAN_END = tl.constexpr(1)
SPAN_ROLLOUT = tl.constexpr(2)

BLOCK = tl.constexpr(14)
GROUP = tl.constexpr(0)
ROW_SPAN = tl.constexpr(1)
ROW_SPANS = tl.constexpr(2)
COL_SPAN = tl.constexpr(3)
COL_SPANS = tl.constexpr(4)
ROW_TOKEN = tl.constexpr(5)
ROW_TOKENS = tl.constexpr(6)
COL_TOKEN = tl.constexpr(7)
COL_TOKENS = tl.constexpr(8)
LD = tl.constexpr(9)
COST_OFFSET = tl.constexpr(10)
ROW_OFFSET = tl.constexpr(11)
PAIR_OFFSET = tl.constexpr(12)
COL_OFFSET = tl.constexpr(13)


@triton.jit
def find(first, count, task):
    """Index b with first[b] <= task < first[b + 1], of `count`; task a scalar or a vector."""
    low = task * 0
    step = 1
    while step < count:
        step *= 2
    while step > 0:
        probe = low + step
        there = probe < count
        at = tl.load(first + probe, mask=there, other=0)
        low = tl.where(there & (at <= task), probe, low)
        step = step // 2
    return low


@triton.jit
def has_scale(group_norm, group):
    """Not so if all states of a group are zero, or one is not finite: nothing is computed then."""
    norm = tl.load(group_norm + group)
    return (norm > 0) & (norm < float("inf"))
