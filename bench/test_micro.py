"""Single functions under pytest-benchmark: python -m pytest bench/test_micro.py.

Peers run at the cheapest setting that is accurate enough on these very problems.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import pytest

import shear_ops

from .contest import Job, qualify
from .jobs import NearestSpans, Problems
from .peers import libraries, loops
from .problems import real_span_pairs, synthetic_group

PEERS = {peer.name: peer for peer in [*libraries(), *loops(compiled=False)]}


@cache
def span_pairs() -> Problems:
    return Problems(*real_span_pairs(40))


@cache
def group() -> NearestSpans:
    return NearestSpans(synthetic_group("clustered", tokens=200, dim=64))


def run_peer(benchmark: Any, name: str, job: Job) -> None:
    calls, facts = qualify([PEERS[name]], job, job, give_up_s=1.0)
    if name not in calls:
        pytest.skip("not installed" if "missing" in facts[name] else "not accurate within 1 s")
    benchmark.extra_info.update(setting=facts[name]["setting"], error=facts[name]["error"])
    benchmark.pedantic(calls[name], rounds=3)


@pytest.mark.benchmark(group="sinkhorn")
def test_sinkhorn(benchmark: Any) -> None:
    job = span_pairs()
    result = benchmark(partial(shear_ops.sinkhorn, job.cost, reg=job.eps, n_iters=300))
    assert job.judge(result.value) <= 2e-3


@pytest.mark.benchmark(group="sinkhorn")
@pytest.mark.parametrize("name", PEERS)
def test_sinkhorn_of_peers(benchmark: Any, name: str) -> None:
    run_peer(benchmark, name, span_pairs())


@pytest.mark.benchmark(group="span_weights")
def test_span_weights(benchmark: Any) -> None:
    job = group()
    found = shear_ops.span_distances(**job.group.arguments())
    assert job.judge(job.spans(found.distance)) <= 2e-3
    benchmark(partial(shear_ops.span_weights, **job.group.arguments()))


@pytest.mark.benchmark(group="span_weights")
@pytest.mark.parametrize("name", ["POT sinkhorn", "kernel loop"])
def test_span_weights_of_peers(benchmark: Any, name: str) -> None:
    run_peer(benchmark, name, group())
