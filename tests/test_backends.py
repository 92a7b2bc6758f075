"""Every backend x dtype x problem against the float64 reference on the same rounded states."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from problems import PROBLEMS, Problem

import shear_ops
from shear_ops import SpanConfig, backends, reference

# Relative error of a weight; below `floor`, in units of the weight that eps stands for, absolute.
TOLERANCES: dict[str, dict[torch.dtype, float]] = {
    "sinkhorn": {torch.float32: 2e-3, torch.bfloat16: 2e-3, torch.float16: 2e-3},
    "chamfer": {torch.float32: 1e-4, torch.bfloat16: 1e-4, torch.float16: 1e-4},
    "mmd": {torch.float32: 1e-3, torch.bfloat16: 1e-3, torch.float16: 1e-3},
    "cosine": {torch.float32: 1e-4, torch.bfloat16: 1e-4, torch.float16: 1e-4},
}
DTYPES = tuple(TOLERANCES["sinkhorn"])
BY_NAME = {p.name: p for p in PROBLEMS}
COMPILED = [name for name, why in backends.status().items() if why is None and name != "reference"]


@functools.lru_cache(maxsize=None)
def converged(name: str, dtype: torch.dtype) -> reference.Distances:
    problem = BY_NAME[name]
    return reference.span_distances(*problem.arguments(dtype).values(), **spans_config(problem))


def spans_config(problem: Problem) -> dict[str, Any]:
    return {k: v for k, v in problem.config.items() if k not in ("normalization", "pooling")}


def test_table_is_large_and_not_vacuous() -> None:
    assert len(PROBLEMS) >= 40
    assert len(BY_NAME) == len(PROBLEMS)
    varied = [p for p in PROBLEMS if converged(p.name, torch.float32).distance.isfinite().sum() > 1]
    assert len(varied) >= 45


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", BY_NAME)
@pytest.mark.parametrize("backend", COMPILED)
def test_weights(backend: str, name: str, dtype: torch.dtype) -> None:
    problem = BY_NAME[name]
    if not problem.fits(dtype):
        pytest.skip(f"states are out of {dtype}'s range")
    config = SpanConfig(**problem.config)
    given = problem.arguments(dtype)
    found = shear_ops.span_distances(**given, config=config, backend=backend)
    seen = shear_ops.span_weights(**given, config=config, backend=backend)
    wanted = converged(name, dtype)
    _check_same_spans(found, wanted)

    some = wanted.distance.isfinite()
    stopped = found.iterations >= config.n_iters
    if not problem.slow_mixing:
        assert not stopped.any(), "only problems that mix slowly may stop at n_iters"
    else:
        assert stopped.any(), "a problem that mixes slowly must say that it was stopped"
        assert found.pairs.stopped > 0
    eps = config.reg * (wanted.mean_norm[wanted.rollout] if config.reg_unit == "mean_norm" else 1)
    rtol = TOLERANCES[config.distance][dtype]
    allowed = rtol * torch.maximum(wanted.distance, eps * torch.ones_like(wanted.distance))
    error = (found.distance.double() - wanted.distance).abs()
    assert (error <= allowed)[some & ~stopped].all(), (error / allowed)[some & ~stopped].max()

    exact = reference.span_weights(*given.values(), **problem.config)
    assert seen.dtype == torch.float32
    tokens_ok = ~_touched_by(stopped & some, found, len(seen))
    scale = eps.max().item() / wanted.mean_norm.nan_to_num(1).clamp(min=1e-30).max().item() \
        if len(wanted.distance) else 0.0
    floor = rtol * torch.maximum(exact, torch.full_like(exact, scale))
    assert ((seen.double() - exact).abs() <= floor)[tokens_ok].all()


def _check_same_spans(found: Any, wanted: reference.Distances) -> None:
    for field in ("rollout", "begin", "end"):
        assert torch.equal(getattr(found, field), getattr(wanted, field)), field
    assert torch.equal(found.distance.isfinite(), wanted.distance.isfinite())
    assert torch.equal(found.nearest < 0, wanted.nearest < 0)
    assert found.pairs.total == wanted.pairs[0]


def _touched_by(spans: torch.Tensor, found: Any, tokens: int) -> torch.Tensor:
    out = torch.zeros(tokens, dtype=torch.bool)
    for begin, end in zip(found.begin[spans].tolist(), found.end[spans].tolist(), strict=True):
        out[begin:end] = True
    return out


@pytest.mark.parametrize("name", BY_NAME)
@pytest.mark.parametrize("backend", COMPILED)
def test_pruned_equals_unpruned_bitwise(backend: str, name: str, two_threads: None) -> None:
    problem = BY_NAME[name]
    given = problem.arguments(torch.float32)
    config = SpanConfig(**problem.config)
    pruned = shear_ops.span_distances(**given, config=config, backend=backend)
    whole = shear_ops.span_distances(**given, config=config, backend=backend, prune=False)
    torch.set_num_threads(1)
    single = shear_ops.span_distances(**given, config=config, backend=backend)
    for other in (whole, single):
        for field in ("distance", "nearest", "residual", "iterations"):
            assert torch.equal(getattr(pruned, field), getattr(other, field)), field


@pytest.mark.parametrize("name", [n for n in BY_NAME if BY_NAME[n].config.get("distance") is None])
def test_distance_is_within_its_bounds(name: str) -> None:
    """max(R, Q) <= D, and D <= W1 + eps log(n) where it converged; W1 from linear programming."""
    problem = BY_NAME[name]
    if problem.config.get("aggregation") == "mean":
        pytest.skip("a mean of distances is not one distance")
    pytest.importorskip("ot", reason="W1 needs POT")
    given = problem.arguments(torch.float32)
    config = SpanConfig(**problem.config)
    found = shear_ops.span_distances(**given, config=config)
    for k in range(0, len(found.distance), 3):
        if found.nearest[k] < 0:
            continue
        other = int(found.nearest[k])
        rows = given["hidden"][found.begin[k] : found.end[k]]
        columns = given["hidden"][found.begin[other] : found.end[other]]
        cost = reference.token_cost(rows, columns)[None]
        slack = 1e-4 * float(cost.max()) + 1e-30
        distance = float(found.distance[k])
        assert distance >= float(reference.lower_bound(cost)) - slack
        if found.iterations[k] < config.n_iters:
            w1 = float(reference.exact(cost))
            n_bar = float(converged(name, torch.float32).mean_norm[found.rollout[k]])
            eps = config.reg * (n_bar if config.reg_unit == "mean_norm" else 1)
            slack += 2e-3 * max(distance, eps)
            size = min(cost.shape[1:])
            assert w1 - slack <= distance <= w1 + eps * torch.tensor(size).log().item() + slack
