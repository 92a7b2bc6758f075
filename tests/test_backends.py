"""Every backend x dtype x problem against the float64 reference on the same rounded states."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import shear_ops
from problems import DTYPES, PROBLEMS, Problem
from shear_ops import SpanConfig, SpanDistances, reference
from shear_ops.ops import backends

# Largest error of a span distance or weight, relative to the larger of the value and of `SCALE`
# times the mean norm: near 0 an error is judged against what sets the resolution of the distance.
TOLERANCES: dict[str, dict[torch.dtype, float]] = {
    "sinkhorn": {torch.float32: 2e-3, torch.bfloat16: 2e-3, torch.float16: 2e-3},
    "chamfer": {torch.float32: 1e-4, torch.bfloat16: 1e-4, torch.float16: 1e-4},
    "mmd": {torch.float32: 1e-3, torch.bfloat16: 1e-3, torch.float16: 1e-3},
    "cosine": {torch.float32: 1e-4, torch.bfloat16: 1e-4, torch.float16: 1e-4},
}
SCALE = {"chamfer": 1e-3, "mmd": 0.3, "cosine": 1e-3}  # sinkhorn: reg, or eps / mean norm

BY_NAME = {p.name: p for p in PROBLEMS}
COMPILED = [name for name, why in backends.status().items() if why is None and name != "reference"]
CASES = [(p.name, dtype) for p in PROBLEMS for dtype in DTYPES if dtype in p.dtypes]
# Triton's interpreter takes seconds per problem. These have every feature that its kernels treat in
# their own way: all tiles of the solver, ragged tails, groups with and without an opposing set,
# repaired, centred and zero states, every distance and choice; and each dtype a few times.
INTERPRETED = {
    "ragged tails": DTYPES,
    "rollouts without tokens": DTYPES[:1],
    "rollouts of one token": DTYPES[1:2],
    "spans of one token": DTYPES[2:],
    "spans of 50 every 30": DTYPES[:2],
    "paper spans, odd lengths": DTYPES[1:2],
    "shared prefix, offset": DTYPES[1:2],
    "identical rollouts": DTYPES[2:],
    "rollouts of one repeated token": DTYPES[:1],
    "near-duplicates 1e-3": DTYPES[1:2],
    "offset 1000": DTYPES[:2],
    "all ignored": DTYPES[:1],
    "ignored rollout": DTYPES[1:2],
    "interleaved groups": DTYPES[:1],
    "groups of two": DTYPES[2:],
    "no rollouts": DTYPES[:1],
    "no tokens": DTYPES[:1],
    "reg 0.005": DTYPES[:1],
    "reg 0.5": DTYPES[1:2],
    "reg 4.5 in units of cost": DTYPES[:1],
    "two clusters, reg 0.01": DTYPES[:1],
    "dim 1": DTYPES[:1],
    "dim 129": DTYPES[:2],
    "norms 1e+06": DTYPES[:1],
    "norms 1e-04": DTYPES[:1],
    "all states zero": DTYPES[:1],
    "correct states zero": DTYPES[1:2],
    "outlier dimensions": DTYPES[2:],
    "chamfer": DTYPES,
    "mmd": DTYPES[:1],
    "cosine": DTYPES,
    "normalised by rollout": DTYPES[:1],
    "mean pooling": DTYPES[1:2],
    "every other choice": DTYPES[:1],
    "chamfer, every other choice": DTYPES[:1],
    "mmd, every other choice": DTYPES[1:2],
    "cosine, every other choice": DTYPES[2:],
    "mmd, all states zero": DTYPES[:1],
    "cosine, all states zero": DTYPES[:1],
}
# and of those, a few for what takes four calls
INTERPRETED_BITS = ("ragged tails", "near-duplicates 1e-3", "cosine")


def device_of(backend: str) -> torch.device:
    """Where a backend computes."""
    if backend == "cpu" or (backend == "triton" and backends.interpreted()):
        return torch.device("cpu")
    return torch.device("cuda" if torch.cuda.is_available() else "xpu")


def skip_if_not_computed(backend: str, name: str) -> None:
    distance = BY_NAME[name].config.get("distance", "sinkhorn")
    if distance not in backends.DISTANCES[backend]:
        pytest.skip(f"{backend} does not compute {distance}")


def skip_if_slow(backend: str, name: str, dtype: torch.dtype = torch.float32) -> None:
    if backend == "triton" and backends.interpreted() and dtype not in INTERPRETED.get(name, ()):
        pytest.skip("too slow in Triton's interpreter")


def span_distances(backend: str, given: dict[str, Tensor], **options: Any) -> SpanDistances:
    """Computed where the backend is, returned on the CPU; the integers stay on the CPU."""
    hidden = given["hidden"].to(device_of(backend))
    found = shear_ops.span_distances(**{**given, "hidden": hidden}, backend=backend, **options)
    return SpanDistances(*(t.cpu() if isinstance(t, Tensor) else t for t in found))


@functools.cache
def converged(name: str, dtype: torch.dtype) -> reference.Distances:
    """Span distances to 1e-6; the errors allowed above are a hundred times that and more."""
    problem = BY_NAME[name]
    settings = {"tol": 1e-6, "n_iters": 20_000}
    return reference.span_distances(
        *problem.arguments(dtype).values(), **problem.config, **settings
    )


def mean_norms(given: dict[str, Tensor]) -> Tensor:
    """Per rollout (B,): mean norm of the tokens of its group, over labels 0 and 1."""
    norms = given["hidden"].double().norm(dim=1)
    rollout = torch.arange(len(given["labels"])).repeat_interleave(given["cu_seqlens"].diff())
    taking_part = given["labels"][rollout] >= 0
    groups = given["group_ids"]
    means = [float(norms[taking_part & (groups[rollout] == g)].mean()) for g in groups.tolist()]
    return torch.tensor(means, dtype=torch.float64).nan_to_num(1.0)


def resolution(config: SpanConfig, mean_norm: Tensor) -> Tensor:
    if config.distance != "sinkhorn":
        return SCALE[config.distance] * mean_norm
    eps = config.reg if config.reg_unit == "cost" else config.reg * mean_norm
    return eps * torch.ones_like(mean_norm)


def test_table_is_large_and_varied() -> None:
    assert len(BY_NAME) == len(PROBLEMS) >= 40
    assert sum(shear_ops.plan(
        p.cu_seqlens, group_ids=p.group_ids, labels=p.labels, dim=1,
        config=SpanConfig(**{**p.config}),
    ).pairs > 1 for p in PROBLEMS) >= 40  # fmt: skip


@pytest.mark.parametrize(("name", "dtype"), CASES, ids=lambda v: str(v).removeprefix("torch."))
@pytest.mark.parametrize("backend", COMPILED)
def test_against_float64(
    backend: str, name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    skip_if_not_computed(backend, name)
    skip_if_slow(backend, name, dtype)
    problem = BY_NAME[name]
    config = SpanConfig(**problem.config)
    given = problem.arguments(dtype)
    found = span_distances(backend, given, config=config)
    wanted = converged(name, dtype)
    check_same_spans(found, wanted)

    stopped = check_stops(problem, found, config)
    norms = mean_norms(given)
    rtol = TOLERANCES[config.distance][dtype]
    some = (wanted.nearest >= 0) & ~stopped
    allowed = rtol * torch.maximum(wanted.distance, resolution(config, norms)[wanted.rollout])
    error = (found.distance.double() - wanted.distance).abs()
    assert (error <= allowed)[some].all(), (error / allowed)[some].max()

    # the reference need not solve the same problem twice
    monkeypatch.setattr(reference, "span_distances", lambda *_, **__: wanted)
    moved = {**given, "hidden": given["hidden"].to(device_of(backend))}
    seen = shear_ops.span_weights(**moved, config=config, backend=backend).cpu()
    exact = reference.span_weights(*given.values(), **problem.config)
    assert seen.dtype == torch.float32
    rollout = torch.arange(len(norms)).repeat_interleave(given["cu_seqlens"].diff())
    floor = torch.ones_like(exact) * 1e-30
    if len(norms):
        divisor = norms if config.normalization == "group" else rollout_norms(given)
        floor = (resolution(config, norms) / divisor).nan_to_num(0.0)[rollout]
    sure = ~tokens_of(stopped, found, len(seen))
    error = (seen.double() - exact).abs()
    assert (error <= rtol * torch.maximum(exact, floor))[sure].all()


def rollout_norms(given: dict[str, Tensor]) -> Tensor:
    rows = given["hidden"].double().split(given["cu_seqlens"].diff().tolist())
    return torch.stack([r.norm(dim=1).mean() for r in rows]).nan_to_num(1.0)


def check_same_spans(found: SpanDistances, wanted: reference.Distances) -> None:
    for field in ("rollout", "begin", "end"):
        assert torch.equal(getattr(found, field), getattr(wanted, field)), field
    assert torch.equal(found.distance.isinf(), wanted.distance.isinf())
    assert torch.equal(found.nearest < 0, wanted.nearest < 0)
    assert found.pairs.total == wanted.pairs[0]


def check_stops(problem: Problem, found: SpanDistances, config: SpanConfig) -> Tensor:
    """(K,) the spans stopped at n_iters: none, unless the problem sets n_iters itself."""
    stopped = found.iterations >= config.n_iters
    assert bool(found.pairs.stopped) >= bool(stopped.any())
    if "n_iters" not in problem.config:
        assert not stopped.any()
    return stopped


def tokens_of(spans: Tensor, found: SpanDistances, tokens: int) -> Tensor:
    out = torch.zeros(tokens, dtype=torch.bool)
    for begin, end in zip(found.begin[spans].tolist(), found.end[spans].tolist(), strict=True):
        out[begin:end] = True
    return out


def test_stopped_pairs_are_reported_and_never_below_their_bound() -> None:
    """Under-iterated, <P, C> of this pair is far below W1; the value is not, and says it stopped."""
    problem = BY_NAME["two clusters"]
    config = SpanConfig(**problem.config, n_iters=30)
    found = shear_ops.span_distances(**problem.arguments(), config=config)
    some = found.nearest >= 0
    assert (found.iterations[some] >= config.n_iters).any()
    assert found.pairs.stopped > 0
    wanted = converged(problem.name, torch.float32).distance
    assert (found.distance[some] >= 0.5 * wanted[some]).all()


@pytest.mark.parametrize("name", ["3% sinks of norm 3000", "reg 0.005", "two clusters, reg 0.01"])
@pytest.mark.parametrize("n_iters", [1, 2, 7, 40])
def test_stopped_pairs_prune_nothing(name: str, n_iters: int) -> None:
    """What has not converged is no upper bound: with and without pruning, the same bits."""
    problem = BY_NAME[name]
    config = SpanConfig(**problem.config, n_iters=n_iters)
    pruned = shear_ops.span_distances(**problem.arguments(), config=config)
    whole = shear_ops.span_distances(**problem.arguments(), config=config, prune=False)
    assert whole.pairs.stopped > 0
    for field in ("distance", "nearest", "residual", "iterations"):
        assert torch.equal(getattr(pruned, field), getattr(whole, field)), field


@pytest.mark.parametrize("name", BY_NAME)
@pytest.mark.parametrize("backend", COMPILED)
def test_pruning_and_threads_change_no_bit(backend: str, name: str, two_threads: None) -> None:
    if backend == "triton" and backends.interpreted() and name not in INTERPRETED_BITS:
        pytest.skip("too slow in Triton's interpreter")
    skip_if_not_computed(backend, name)
    problem = BY_NAME[name]
    call: Any = functools.partial(
        span_distances, backend, problem.arguments(), config=SpanConfig(**problem.config)
    )
    pruned, whole = call(), call(prune=False)
    others = [whole]
    if backend != "triton" or not backends.interpreted():  # it has one thread
        torch.set_num_threads(1)
        others += [call(), call(prune=False)]
    for other in others:
        for field in ("distance", "nearest", "residual", "iterations"):
            assert torch.equal(getattr(pruned, field), getattr(other, field)), field


SINKHORN = [p.name for p in PROBLEMS if not {"distance", "aggregation"} & set(p.config)]


@pytest.mark.parametrize("name", SINKHORN)
def test_distance_is_within_its_bounds(name: str) -> None:
    """max(R, Q) <= D always, and W1 <= D <= W1 + eps log(n) where it converged."""
    pytest.importorskip("ot", reason="W1 needs POT")
    problem = BY_NAME[name]
    given = problem.arguments()
    config = SpanConfig(**problem.config)
    found = shear_ops.span_distances(**given, config=config)
    eps = resolution(config, mean_norms(given))
    for k in range(0, len(found.distance), 3):
        other = int(found.nearest[k])
        if other < 0:
            continue
        rows, columns = (
            given["hidden"][found.begin[i] : found.end[i]].double() for i in (k, other)
        )
        cost = reference.token_cost(rows, columns)[None]
        # float32 costs of float32 states, whatever their offset
        slack = 1e-4 * float(cost.max()) + 1e-6 * float(rows.norm(dim=1).max())
        distance, own_eps = float(found.distance[k]), float(eps[found.rollout[k]])
        assert distance >= float(max(reference.bounds(cost))) - slack
        if found.iterations[k] < config.n_iters:
            w1 = float(reference.exact(cost))
            slack += 2e-3 * max(distance, own_eps)
            assert w1 - slack <= distance <= w1 + own_eps * math.log(min(cost.shape[1:])) + slack
