"""Steps 2 and 3 of the paper: distances / mean norm, then the maximum (or mean) over the spans that
cover a token.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .. import _C
from .columns import (
    ROLLOUT,
    ROLLOUT_BEGIN,
    ROLLOUT_END,
    ROLLOUT_GROUP,
    ROLLOUT_SPAN_BEGIN,
    ROLLOUT_SPAN_END,
    SPAN,
    SPAN_BEGIN,
    SPAN_END,
)
from .tasks import find

LEAST_ROLLOUT_NORM = tl.constexpr(_C.LEAST_ROLLOUT_NORM)


@triton.jit(do_not_specialize=["count"])
def token_weights_kernel(
    rollouts, spans, first, count, distance, group_norm, rollout_norm, weights,
    BY_GROUP: tl.constexpr, MAXIMUM: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Weights of some tokens of a rollout; 1 where it has no opposing set."""
    task = tl.program_id(0).to(tl.int64)
    i = find(first, count, task)
    rollout = rollouts + i * ROLLOUT
    begin = tl.load(rollout + ROLLOUT_BEGIN) + (task - tl.load(first + i)) * T
    end = tl.minimum(begin + T, tl.load(rollout + ROLLOUT_END))
    token = begin + tl.arange(0, T)
    there = token < end
    group = tl.load(rollout + ROLLOUT_GROUP)
    if group < 0:
        tl.store(weights + token, tl.full((T,), 1.0, tl.float32), mask=there)
        return
    norm = tl.load(group_norm + group)
    if not BY_GROUP:
        own = tl.load(rollout_norm + i)
        norm = tl.where(own < LEAST_ROLLOUT_NORM * norm, norm, own)
    # begins and ends increase from span to span: from the last one that ends before these tokens
    # (or the first of all) to the last one that begins before they end
    span = tl.load(rollout + ROLLOUT_SPAN_BEGIN)
    of_rollout = spans + span * SPAN
    number = tl.load(rollout + ROLLOUT_SPAN_END) - span
    last = span + find(of_rollout + SPAN_BEGIN, number, end - 1, SPAN)
    span += find(of_rollout + SPAN_END, number, begin, SPAN)
    pooled = tl.zeros((T,), tl.float32)
    covering = tl.zeros((T,), tl.float32)
    while span <= last:
        covers = token >= tl.load(spans + span * SPAN + SPAN_BEGIN)
        covers &= token < tl.load(spans + span * SPAN + SPAN_END)
        d = tl.where(covers, tl.load(distance + span), 0.0)
        if MAXIMUM:
            pooled = tl.where((d <= pooled) | (pooled != pooled), pooled, d)  # keeps NaN
        else:
            pooled += d
            covering += covers.to(tl.float32)
        span += 1
    if not MAXIMUM:
        pooled = pooled / tl.maximum(covering, 1.0)
    tl.store(weights + token, tl.where(pooled == 0, 0.0, pooled / norm), mask=there)
