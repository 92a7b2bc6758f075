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
from shear_ops import HiddenBank, HiddenCapture, SpanConfig, Weighting
from shear_ops.ops import backends
from shear_ops.training.round import Rollouts, Round, lay_back, weigh
from shear_ops.training.settings import Settings

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


def add_and_finalize(*parts: dict[str, Any]) -> Any:
    bank = HiddenBank()
    sample = 0
    for part in parts:
        count = len(part["labels"])
        bank.add(**part, sample_ids=range(sample, sample + count))
        sample += count
    return bank.finalize(config=CONFIGURED, weighting=WEIGHTING, step=1)


def rounds(rewards: Tensor, lengths: list[int]) -> Any:
    places = range(len(rewards))
    rollouts = Rollouts.scored(rewards, 0.5, sample_ids=places, group_ids=[3 for _ in places])
    hidden, settings = PACKED["hidden"][: sum(lengths)], Settings(spans=CONFIGURED)
    if not lengths:
        hidden = torch.empty(0, 1, device="cpu")  # of the default dtype
    made = Round(settings)
    made.add(hidden, lengths, rollouts)
    found = weigh(settings, hidden, lengths, rollouts, 0)
    laid = lay_back([found.weights], torch.ones_like(hidden[:, 0], dtype=torch.int8))
    return tuple(made.finish(0).weights.values()), tuple(found), laid


def recorded(rows: int) -> Any:
    mask = torch.ones_like(POINTS[:rows, :3, 0], dtype=torch.int8)
    with HiddenCapture(BODY, backbone=BODY).recording(mask) as recording:
        if rows:
            BODY(POINTS)
    return recording.hidden, recording.cu_seqlens


BODY = torch.nn.Identity()
WEIGHTING = Weighting(mean_one=True, clip=(0.1, 3.0), warmup_steps=2)
FLOAT64 = {**EMPTY, "hidden": torch.zeros(0, 1, dtype=torch.float64)}
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
    "distributed": lambda b: shear_ops.distributed.span_weights(
        **PADDED, config=CONFIGURED, weighting=WEIGHTING, step=1, backend=b),
    "no rollouts": lambda b: shear_ops.distributed.span_weights(**EMPTY, backend=b),
    "no rollouts in float64": lambda b: shear_ops.distributed.span_weights(**FLOAT64, backend=b),
    "mixed": lambda b: shear_ops.distributed.mixed_groups([1, 1, 2], [0, 1, 1]),
    "bank": lambda b: add_and_finalize(EMPTY, PADDED, FLOAT64, PACKED),
    "empty bank": lambda b: add_and_finalize(),
    "bank of nothing": lambda b: add_and_finalize(FLOAT64),
    "round": lambda b: rounds(REWARDS, PACKED["cu_seqlens"][:3].diff().tolist()),
    "empty round": lambda b: rounds(REWARDS[:0], []),
    "recording": lambda b: recorded(2),
    "empty recording": lambda b: recorded(0),
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
    if isinstance(wanted, dict):
        return list(seen) == list(wanted) and all(same(seen[key], wanted[key]) for key in wanted)
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
