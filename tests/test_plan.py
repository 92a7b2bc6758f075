"""The plan of a call: what it counts, and that memory stays within it."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import accumulate
from typing import Any

import pytest
import torch

from shear_ops import _C, SpanConfig, plan

GIB = 2**30


def group(rollouts: int, tokens: int, dim: int, **config: object) -> tuple[int, ...]:
    return plan(
        [i * tokens for i in range(rollouts + 1)],
        group_ids=[0] * rollouts,
        labels=[i % 2 for i in range(rollouts)],
        dim=dim,
        config=SpanConfig(**config),  # type: ignore[arg-type]
        threads=2,
    )


def test_paper_group() -> None:
    seen = group(8, 3000, 3584)
    assert (seen.spans, seen.mixed_groups, seen.pairs) == (8 * 117, 1, 219_024)
    assert (seen.token_pairs, seen.chunks) == (12_000**2, 4)
    assert 0.2 * GIB < seen.workspace_bytes < 0.5 * GIB


@pytest.mark.parametrize("tokens", [1, 99, 100, 101, 3000, 8000, 32_768])
@pytest.mark.parametrize("rollouts", [2, 8, 16])
def test_workspace_is_bounded(tokens: int, rollouts: int) -> None:
    seen = group(rollouts, tokens, 8192)
    assert seen.workspace_bytes <= GIB
    spans = 1 if tokens <= 100 else -(-(tokens - 100) // 25) + 1
    assert seen.pairs == (rollouts // 2) ** 2 * spans**2
    assert seen.token_pairs >= (rollouts // 2) ** 2 * tokens**2


@pytest.mark.parametrize("stride", [1, 7, 100])
def test_workspace_is_bounded_at_any_stride(stride: int) -> None:
    seen = group(4, 8000, 64, stride=stride)
    assert seen.workspace_bytes <= GIB
    assert seen.chunks > 1


def test_uniform_and_ignored_groups_cost_nothing() -> None:
    seen = plan([0, 50, 99, 120, 150], group_ids=[1, 1, 2, 2], labels=[1, 1, 0, -1], dim=64)
    assert (seen.mixed_groups, seen.pairs, seen.token_pairs, seen.chunks) == (0, 0, 0, 0)
    assert seen.workspace_bytes < 4096
    assert plan([0], group_ids=[], labels=[], dim=1).spans == 0


def test_many_groups_share_chunks() -> None:
    groups, tokens = 1000, 120
    seen = plan(
        [i * tokens for i in range(2 * groups + 1)],
        group_ids=[i // 2 for i in range(2 * groups)],
        labels=[1, 0] * groups,
        dim=256,
    )
    assert (seen.mixed_groups, seen.pairs, seen.chunks) == (groups, 4 * groups, 1)


def test_memory_of_a_training_step() -> None:
    """Of the groups with both labels the largest at a time; ignored rollouts are not stored."""
    lengths = [300, 200, 50, 400, 700, 150, 0, 80, 20]
    given: dict[str, Any] = {
        "cu_seqlens": [0, *accumulate(lengths)], "group_ids": [1, 1, 1, 2, 2, 3, 3, 4, 4],
        "labels": [1, 0, -1, 0, 1, 1, 0, 1, 1], "dim": 64, "threads": 2,
    }  # fmt: skip
    seen = plan(**given, dtype=torch.bfloat16)
    assert seen.states_bytes == (sum(lengths) - 50) * 64 * 2
    assert seen.regrouping_bytes == 1100 * 64 * 2
    alone = [
        plan([0, *accumulate(own)], group_ids=[0, 0], labels=[1, 0], dim=64, threads=2)
        for own in ((300, 200), (700, 400))
    ]
    assert seen.group_workspace_bytes == max(one.workspace_bytes for one in alone)
    assert seen.workspace_bytes > seen.group_workspace_bytes
    wide = plan(**given)
    assert wide[6:8] == (2 * seen.states_bytes, 2 * seen.regrouping_bytes)
    assert wide[:6] == seen[:6]
    one_label = plan([0, 9, 20], group_ids=[1, 1], labels=[0, 0], dim=64)
    assert one_label[6:] == (20 * 64 * 4, 0, 0)
    with pytest.raises(TypeError, match="dtype must be float32, float16 or bfloat16, got"):
        plan(**given, dtype=torch.float64)


MEASURE = """
import json, sys, torch, shear_ops
tokens, rollouts, stride = map(int, sys.argv[1:])
def resident(field):
    with open("/proc/self/status") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith(field))
def call(tokens):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens * rollouts, 16, generator=generator)
    given = dict(group_ids=[0] * rollouts, labels=[i % 2 for i in range(rollouts)])
    cu_seqlens = torch.arange(rollouts + 1) * tokens
    config = shear_ops.SpanConfig(stride=stride, distance="chamfer")
    with open("/proc/self/clear_refs", "w") as reset:
        reset.write("5")  # the peak starts again from here
    before = resident("VmRSS")
    shear_ops.span_weights(hidden, cu_seqlens=cu_seqlens, config=config, **given)
    after = resident("VmHWM")
    plan = shear_ops.plan(cu_seqlens, dim=16, config=config, **given)
    return {"bytes": after - before, **plan._asdict()}
call(200)  # threads and lazy imports
print(json.dumps(call(tokens)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("tokens", "rollouts", "stride"), [(8000, 4, 25), (8000, 2, 50), (3000, 2, 1)]
)
def test_memory_of_a_call_stays_within_the_plan(tokens: int, rollouts: int, stride: int) -> None:
    """A fresh process: its peak resident memory grows by no more than the plan's figure."""
    out = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tokens), str(rollouts), str(stride)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    seen = json.loads(out.stdout)
    slack = 16 * 2**20  # allocator and thread stacks
    assert seen["bytes"] <= seen["workspace_bytes"] + slack
    assert seen["bytes"] >= 0.5 * seen["workspace_bytes"], "the plan should not overstate either"


H100 = {"processors": 132, "shared_bytes": 232_448 - 256}  # less what is static


def device_group(rollouts: int, tokens: int, *, groups: int = 1, dim: int = 64, span: int = 100,
                 stride: int = 25, distance: int = 0) -> dict[str, Any]:  # fmt: skip
    batch = rollouts * groups
    return _C.device_plan(
        [i * tokens for i in range(batch + 1)],
        [i // rollouts for i in range(batch)],
        [i % 2 for i in range(batch)],
        dim=dim, span=span, stride=stride, distance=distance, tokens=batch * tokens, **H100,
    )  # fmt: skip


@pytest.mark.parametrize("dim", [64, 8192])
@pytest.mark.parametrize("tokens", [1, 100, 101, 3000, 32_768, 131_072])
def test_device_plan_is_bounded(tokens: int, dim: int) -> None:
    seen = device_group(2 if tokens > 32_768 else 8, tokens, dim=dim)
    assert seen["workspace_bytes"] <= 1.125 * GIB
    assert seen["solver_shared_bytes"] <= H100["shared_bytes"]
    assert 1 <= seen["solver_grid"] <= 4 * H100["processors"]
    for chunk in seen["chunks"]:
        assert chunk["pairs"] < 2**32
        assert max(chunk["cost_tiles"], chunk["strips"], chunk["bound_rows"]) < 2**31
        assert (chunk["places"] > 0) == (dim > 64)
    spans = 1 if tokens <= 100 else -(-(tokens - 100) // 25) + 1
    blocks = 1 if tokens > 32_768 else 16
    assert sum(chunk["pairs"] for chunk in seen["chunks"]) == blocks * spans**2


@pytest.mark.parametrize("groups", [1, 100, 10_000])
def test_device_plan_of_many_groups(groups: int) -> None:
    """Small groups share launches: as many as fit a chunk, with small tiles."""
    seen = device_group(2, 120, groups=groups)
    assert len(seen["chunks"]) <= 1 + groups // 8000
    assert not seen["large_tiles"]
    assert sum(chunk["cost_tiles"] for chunk in seen["chunks"]) == groups
    assert sum(chunk["bound_rows"] for chunk in seen["chunks"]) == 2 * groups
    assert seen["table_bytes"] < 300 * groups + 2048


def test_device_plan_of_a_second_look() -> None:
    """Of every span; as many at a time as fit a chunk."""
    seen = device_group(8, 3000, dim=3584)
    (chunk,) = seen["chunks"]
    assert chunk["places"] == 8 * 3000
    assert (seen["second_look"], seen["second_look_batch"]) == (8 * 117, 8 * 117)
    assert seen["workspace_bytes"] < 0.8 * GIB
    many = device_group(2, 120, groups=10_000, dim=128)
    pair_bytes = 4 * (100 * 112 + 100 + 4 * 112) + 16
    assert many["second_look"] == 40_000
    assert 0.99 < many["second_look_batch"] * pair_bytes / (128 * 2**20) < 1
    for exact in (
        device_group(8, 3000, dim=64),
        device_group(8, 3000, dim=3584, distance=1),
    ):
        assert exact["second_look"] == exact["chunks"][0]["places"] == 0


def test_int8_rows_count_among_the_blocks_of_a_plan() -> None:
    """Rows of so many dimensions cut it into 2.5 million blocks; its costs alone ask for 80,000."""
    with pytest.raises(
        ValueError, match="cu_seqlens must give fewer or shorter rollouts to a call"
    ):
        device_group(2, 4_000_000, dim=2**17, stride=100)


def test_device_plan_of_the_paper_group() -> None:
    seen = device_group(8, 3000)
    (chunk,) = seen["chunks"]
    assert seen["large_tiles"]
    assert chunk["cost_tiles"] == 16 * -(-3000 // 256) * -(-3000 // 128)
    assert chunk["strips"] == 16 * 120
    assert seen["workspace_bytes"] < 0.7 * GIB


@pytest.mark.parametrize(
    ("span", "solver"),
    [(1, 0), (32, 0), (33, 1), (64, 1), (65, 2), (100, 2), (101, 3), (128, 3), (129, 4), (238, 4), (239, 4), (4096, 4)],
)  # fmt: skip
def test_device_solver_follows_the_span(span: int, solver: int) -> None:
    """Not the lengths of the rollouts at hand: distances must not depend on others in the call."""
    for tokens in (10, 300, 5000):
        seen = device_group(2, tokens, span=span, stride=span)
        assert seen["solver"] == solver
        assert seen["solver_shared_bytes"] <= H100["shared_bytes"]
        assert seen["scratch_bytes"] <= 96 * 2**20
        assert (seen["scratch_bytes"] > 0) == (min(span, tokens) > 238)


def test_device_refuses_longer_spans() -> None:
    with pytest.raises(ValueError, match="span must be at most 4096 for backend 'cuda'"):
        device_group(2, 5000, span=5000, stride=100)
    assert device_group(2, 100, span=5000, stride=100)["solver"] == 4
    assert device_group(2, 5000, span=5000, stride=100, distance=1)["chunks"]


NOTHING_ALLOCATED = """
import resource, sys, torch, shear_ops
from shear_ops import _C, SpanConfig
torch.ones(2, 2) @ torch.ones(2, 2)  # threads
with open("/proc/self/statm") as statm:
    used = int(statm.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20),) * 2)
hidden, ids, labels = torch.randn(40, 8), [0, 0], [1, 0]
integers = torch.tensor(ids), torch.tensor(labels)
options = dict(span=100, stride=25, distance=0)
def wide(offsets):
    return shear_ops.plan(offsets, group_ids=ids, labels=labels, dim=8, config=SpanConfig(span=2**30))
def python(backend):
    return lambda offsets: shear_ops.span_weights(
        hidden, cu_seqlens=offsets, group_ids=ids, labels=labels, backend=backend)
calls = {
    "op": lambda offsets: torch.ops.shear.span_weights(hidden, torch.tensor(offsets), *integers),
    "distances": lambda offsets: torch.ops.shear.span_distances(hidden, torch.tensor(offsets), *integers),
    "python": python(None),
    "float64": python("reference"),
    "reference": lambda offsets: shear_ops.reference.span_weights(hidden, torch.tensor(offsets), *integers),
    "plan": lambda offsets: shear_ops.plan(offsets, group_ids=ids, labels=labels, dim=8),
    "wide": wide,
    "make_plan": lambda offsets: _C.make_plan(
        offsets, ids, labels, **options, dim=8, aggregation=0, every_pair=False,
        tokens=offsets[-1], bytes_per_pair=40),
    "device_plan": lambda offsets: _C.device_plan(
        offsets, ids, labels, **options, dim=128, tokens=offsets[-1], processors=132, shared_bytes=232192),
}
failed = 0
def refused(name, offsets, wanted="cu_seqlens must"):
    global failed
    try:
        seen = calls[name](offsets)
    except ValueError as error:
        seen = str(error)
        if wanted in seen:
            return
    except MemoryError as error:
        seen = f"MemoryError {error}"
    failed += 1
    print(name, offsets, seen, file=sys.stderr)
for bad in (50, 10**9, 2**31, 2**40, 2**62, 2**63 - 1, -1, -(2**63)):
    for name in calls:
        refused(name, [0, bad, 40])
        refused(name, [bad, 20, 40])
for end in (2**31 - 1, 2**31, 2**32, 2**33, 2**40, 2**62, 2**63 - 1):
    for name in ("plan", "make_plan", "device_plan"):
        refused(name, [0, end // 2, end])
        refused(name, [0, 0, end])
    refused("wide", [0, end // 2, end], " must ")
for size in (2**20, 2**40):  # no problem, so no room for one
    assert shear_ops.sinkhorn(torch.empty(0, 2**20, size), reg=1.0).value.shape == (0,)
try:
    shear_ops.sinkhorn(torch.zeros(1, 1, 2**21).expand(1, 2**4, 2**21), reg=1.0)
    failed += 1
except (MemoryError, RuntimeError) as error:
    print(error)
assert python(None)([0, 20, 40]).shape == (40,)
sys.exit(failed)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_integers_are_checked_before_anything_is_allocated_from_them() -> None:
    """With 64 MiB to spare, every caller refuses by name what would fill the memory."""
    out = subprocess.run([sys.executable, "-c", NOTHING_ALLOCATED], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr


@pytest.mark.parametrize("threads", [0, 65_537])
def test_threads_of_a_plan(threads: int) -> None:
    with pytest.raises(ValueError, match="threads must be in"):
        plan([0, 4, 8], group_ids=[0, 0], labels=[1, 0], dim=8, threads=threads)


@pytest.mark.parametrize("distance", ["sinkhorn", "chamfer", "mmd", "cosine"])
def test_sizes_of_the_largest_plans_do_not_overflow(distance: str) -> None:
    tokens, span = 2**21, 2**20
    config = SpanConfig(span=span, stride=span, distance=distance)
    seen = plan([0, tokens, 2 * tokens], group_ids=[0, 0], labels=[1, 0], dim=2**31 - 1,
                threads=65_536, config=config)  # fmt: skip
    assert (seen.spans, seen.pairs) == (4, 4)
    assert seen.token_pairs == tokens**2
    assert seen.workspace_bytes > 0
    if distance in ("sinkhorn", "mmd"):
        assert seen.workspace_bytes > 4 * 65_536 * span**2
    if distance == "cosine":
        assert seen.workspace_bytes > 4 * 4 * (2**31 - 1)
