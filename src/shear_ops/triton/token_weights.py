"""Steps 2 and 3 of the paper: distances / mean norm, then the maximum (or mean) over the spans that
cover a token.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tasks import (
    ROLLOUT,
    ROLLOUT_BEGIN,
    ROLLOUT_END,
    ROLLOUT_FIRST_SPAN,
    ROLLOUT_GROUP,
    ROLLOUT_LAST_SPAN,
    find,
)


@triton.jit(do_not_specialize=["count", "span", "stride"])
def token_weights_kernel(
    rollouts, first, count, distance, group_norm, rollout_norm, weights, span, stride,
    BY_GROUP: tl.constexpr, MAXIMUM: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Weights of some tokens of a rollout; 1 where it has no opposing set."""
    task = tl.program_id(0).to(tl.int64)
    i = find(first, count, task)
    rollout = rollouts + i * ROLLOUT
    begin = tl.load(rollout + ROLLOUT_BEGIN)
    t = (task - tl.load(first + i)) * T + tl.arange(0, T)
    there = begin + t < tl.load(rollout + ROLLOUT_END)
    group = tl.load(rollout + ROLLOUT_GROUP)
    if group < 0:
        tl.store(weights + begin + t, tl.full((T,), 1.0, tl.float32), mask=there)
        return
    norm = tl.load(group_norm + group) if BY_GROUP else tl.load(rollout_norm + i)
    first_span = tl.load(rollout + ROLLOUT_FIRST_SPAN)
    most = tl.load(rollout + ROLLOUT_LAST_SPAN) - first_span - 1
    # span k covers [k stride, k stride + span); the last one reaches to the end of the rollout
    low = tl.where(t < span, 0, (t - span) // stride + 1)
    low = tl.minimum(low, most)
    high = tl.minimum(t // stride, most)
    pooled = tl.zeros((T,), tl.float32)
    steps = tl.max(tl.where(there, high - low, 0), 0)
    step = steps * 0
    while step <= steps:
        k = low + step
        covers = there & (k <= high)
        d = tl.load(distance + first_span + k, mask=covers, other=0.0)
        if MAXIMUM:
            pooled = tl.where((d <= pooled) | (pooled != pooled), pooled, d)  # keeps NaN
        else:
            pooled += d
        step += 1
    if not MAXIMUM:
        pooled = pooled / (high - low + 1).to(tl.float32)
    tl.store(weights + begin + t, tl.where(pooled == 0, 0.0, pooled / norm), mask=there)
