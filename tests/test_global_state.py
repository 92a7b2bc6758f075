"""What torch has as global state changes no bit of any function's result, on any backend."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import shear_ops
from rollouts_for_tests import CONFIG, arguments, padded
from shear_ops import SpanConfig
from shear_ops.ops import backends

CONFIGURED = SpanConfig(**CONFIG)
PACKED = arguments()
PADDED = padded(PACKED, holes=True)
LISTS = {k: v if k == "hidden" else v.tolist() for k, v in PACKED.items()}
X, Y = PACKED["hidden"][:30], PACKED["hidden"][30:]
COST, POINTS, REWARDS = torch.rand(2, 3, 4), torch.rand(2, 6, 5), torch.tensor([0.2, 0.9])
EMPTY: dict[str, Any] = {
    "hidden": torch.zeros(0, 4),
    "cu_seqlens": [0],
    "group_ids": [],
    "labels": [],
}
BACKENDS = ("cpu", "reference", *(["triton"] if backends.interpreted() else []))


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def not_deterministic() -> Iterator[None]:  # the tests are, by conftest.py
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(True)


@contextmanager
def matmul_precision() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


STATES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "on meta": lambda: torch.device("meta"),
    "inference": torch.inference_mode,
    "no gradients": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "autocast float16": lambda: torch.autocast("cpu", dtype=torch.float16),
    "not deterministic": not_deterministic,
    "matmul precision": matmul_precision,
}
CALLS: dict[str, Callable[[str], Any]] = {
    "packed": lambda b: shear_ops.span_weights(**PACKED, config=CONFIGURED, backend=b),
    "lists": lambda b: shear_ops.span_weights(**LISTS, config=CONFIGURED, backend=b),
    "padded": lambda b: shear_ops.span_weights(**PADDED, config=CONFIGURED, backend=b),
    "half": lambda b: shear_ops.span_weights(
        **{**PACKED, "hidden": PACKED["hidden"].bfloat16()}, config=CONFIGURED, backend=b
    ),
    "empty": lambda b: shear_ops.span_weights(**EMPTY, backend=b),
    **{
        distance: lambda b, d=distance: shear_ops.span_weights(  # type: ignore[misc]
            **PACKED, config=SpanConfig(**CONFIG, distance=d, normalization="rollout",
                                        pooling="mean", aggregation="mean"), backend=b)
        for distance in ("sinkhorn", "chamfer", "mmd", "cosine")
    },
    "advantages": lambda b: shear_ops.weighted_advantages(
        REWARDS.repeat(3)[:5], **PADDED, config=CONFIGURED, backend=b),
    "distances": lambda b: shear_ops.span_distances(**PACKED, config=CONFIGURED, backend=b),
    "pair": lambda b: shear_ops.pair_distances(X, Y, config=CONFIGURED, backend=b),
    "sinkhorn": lambda b: None if b == "reference" else shear_ops.sinkhorn(
        COST, reg=0.1, n_rows=[1, 3], n_cols=[4, 2], backend=b),
    "points": lambda b: None if b == "reference" else shear_ops.sinkhorn(
        x=POINTS, y=POINTS * 2, reg=0.1, backend=b),
    "float64": lambda b: shear_ops.reference.sinkhorn(COST.double(), 0.1),
    "labels": lambda b: shear_ops.labels_from_rewards(REWARDS),
    "ids": lambda b: shear_ops.group_ids_from_uids(["a", "b", "a"]),
    "plan": lambda b: shear_ops.plan(
        LISTS["cu_seqlens"], group_ids=LISTS["group_ids"], labels=LISTS["labels"], dim=9, threads=2),
}  # fmt: skip
WANTED = {(name, b): call(b) for name, call in CALLS.items() for b in BACKENDS}


def same(seen: Any, wanted: Any) -> bool:
    if isinstance(wanted, Tensor):
        return (
            seen.dtype == wanted.dtype
            and seen.device == wanted.device
            and torch.equal(seen, wanted)
        )
    if isinstance(wanted, tuple):
        return len(seen) == len(wanted) and all(map(same, seen, wanted))
    return seen == wanted


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("call", CALLS)
def test_no_bit_depends_on_global_state(call: str, backend: str, state: str) -> None:
    with STATES[state]():
        seen = CALLS[call](backend)
    assert same(seen, WANTED[call, backend])


@pytest.mark.parametrize("state", STATES)
def test_operators_called_directly(state: str) -> None:
    ops = torch.ops.shear
    calls = (
        lambda: ops.span_weights(*PACKED.values(), **CONFIG),
        lambda: ops.span_distances(*PACKED.values(), **CONFIG),
        lambda: ops.pair_distances(X, Y, **CONFIG),
        lambda: ops.sinkhorn(COST, reg=0.1),
    )
    wanted = [call() for call in calls]
    with STATES[state]():
        seen = [call() for call in calls]
    assert all(map(same, seen, wanted))
