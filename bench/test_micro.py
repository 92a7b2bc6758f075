"""Single functions under pytest-benchmark: the entry `micro` of bench.run reads what it writes.

Peers run at the cheapest setting that is accurate enough on these very problems.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest

import shear_ops

from .contest import OURS, Job, own_setting, qualify
from .peers import libraries, loops
from .problems import CONFIG, NearestSpans, Problems, real_span_pairs, synthetic_group
from .sizes import Sizes

PEERS = {peer.name: peer for peer in [*libraries(), *loops(compiled=False)]}
OF_GROUPS = ("POT sinkhorn", "kernel loop")


@cache
def span_pairs() -> Problems:
    """40 real pairs of spans."""
    return Problems(*real_span_pairs(40))


@cache
def group() -> NearestSpans:
    """A group 8 x 200 x 64."""
    return NearestSpans(synthetic_group("clustered", tokens=200, dim=64))


def run(
    benchmark: Any, who: str, call: Callable[[], object], setting: dict[str, Any], error: float
) -> None:
    benchmark.extra_info.update(who=who, setting=setting, error=error)
    benchmark(call)


def run_peer(benchmark: Any, who: str, job: Job) -> None:
    calls, facts = qualify([PEERS[who]], job, job, Sizes().give_up_s)
    if who not in calls:
        pytest.skip("not installed" if "missing" in facts[who] else "not accurate enough in time")
    run(benchmark, who, calls[who], facts[who]["setting"], facts[who]["error"])


@pytest.mark.benchmark(group="sinkhorn")
def test_sinkhorn(benchmark: Any) -> None:
    job = span_pairs()
    solve = partial(shear_ops.sinkhorn, job.cost, reg=job.eps)
    own = own_setting(lambda n_iters: solve(n_iters=n_iters).value, job.judge)
    error = own.pop("error")
    run(benchmark, OURS, partial(solve, **own), own, error)


@pytest.mark.benchmark(group="sinkhorn")
@pytest.mark.parametrize("who", PEERS)
def test_sinkhorn_of_peers(benchmark: Any, who: str) -> None:
    run_peer(benchmark, who, span_pairs())


@pytest.mark.benchmark(group="span_weights")
def test_span_weights(benchmark: Any) -> None:
    job = group()
    given = {**job.group.arguments(), "config": CONFIG}
    error = job.judge(job.spans(shear_ops.span_distances(**given).distance))
    assert error <= 2e-3
    run(
        benchmark, OURS, partial(shear_ops.span_weights, **given),
        {"n_iters": CONFIG.n_iters}, error,
    )  # fmt: skip


@pytest.mark.benchmark(group="span_weights")
@pytest.mark.parametrize("who", OF_GROUPS)
def test_span_weights_of_peers(benchmark: Any, who: str) -> None:
    run_peer(benchmark, who, group())
