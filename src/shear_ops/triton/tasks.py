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
ROUNDED = 32  # tokens whose int8 rows are made


@triton.jit
def find(first, count, task, STRIDE: tl.constexpr = 1):
    """Index b with first[b] <= task < first[b + 1], of `count`; task a scalar or a vector.

    STRIDE: from one entry of first to the next, for a column of a table.
    """
    low = task * 0
    step = 1
    while step < count:
        step *= 2
    while step > 0:
        probe = low + step
        there = probe < count
        at = tl.load(first + probe * STRIDE, mask=there, other=0)
        low = tl.where(there & (at <= task), probe, low)
        step = step // 2
    return low


@triton.jit
def has_scale(group_norm, group):
    """Not so if all states are zero, too faint or one is not finite: nothing is computed then."""
    norm = tl.load(group_norm + group)
    return (norm > 0) & (norm < float("inf"))
