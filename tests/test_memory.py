"""Memory of a training step, as the system measures it: beside what is stored, one group at a time."""

from __future__ import annotations

import ctypes
import sys
import weakref
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist

import ranks
from shear_ops import _C, HiddenBank, Plan, SpanConfig, distributed, plan
from shear_ops.ops import api

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

GROUPS, SIZE, TOKENS, DIM = 64, 8, 60, 1024
GROUP_BYTES = SIZE * TOKENS * DIM * 4
SLACK = 12 * 2**20  # allocator, threads, buffers of torch.distributed
CONFIG = SpanConfig(distance="chamfer")


class Seen(NamedTuple):
    stored: int  # bytes of this process's states
    grown: int  # resident bytes at the peak of the call over those before it
    whole: int  # the same over those before there were states


def resident(field: str) -> int:
    with open("/proc/self/status") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith(field))


M_MMAP_THRESHOLD = -3  # of glibc's malloc.h


def blocks_of_their_own() -> None:
    """Take large blocks from the system, and give them back to it, so that what is resident is in
    use: the heap can keep as much again in holes between them."""
    with suppress(AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**16)


def restart() -> int:
    with open("/proc/self/clear_refs", "w") as reset:
        reset.write("5")  # the peak starts again from here
    return resident("VmRSS")


def growth(call: Callable[[], object]) -> int:
    before = restart()
    call()
    return resident("VmHWM") - before


def planned(groups: int) -> Plan:
    rollouts = groups * SIZE
    return plan(
        [i * TOKENS for i in range(rollouts + 1)], group_ids=[i // SIZE for i in range(rollouts)],
        labels=[i % 2 for i in range(rollouts)], dim=DIM, config=CONFIG, threads=1,
    )  # fmt: skip


def peak(told: Plan) -> int:
    return told.states_bytes + told.regrouping_bytes + told.group_workspace_bytes


def workspace() -> int:
    return planned(1).workspace_bytes


def states(rollouts: int) -> torch.Tensor:
    return torch.rand(rollouts * TOKENS, DIM)


def step(rank: int, how: str, groups: int) -> Seen:
    """Rollouts of every group lie on all ranks in turn; one warm-up group first."""
    size = dist.get_world_size()
    blocks_of_their_own()
    for count in (size, groups):
        mine = [i for i in range(count * SIZE) if (i // 2) % size == rank]
        given = {
            "group_ids": [i // SIZE for i in mine], "labels": [i % 2 for i in mine],
            "sample_ids": mine,
        }  # fmt: skip
        before = restart()
        if how != "all at once":
            early = how == "group_size"
            bank = HiddenBank(group_size=SIZE if early else None, config=CONFIG)
            for place, i in enumerate(mine):
                offsets = torch.tensor([0, TOKENS])
                one = {name: [values[place]] for name, values in given.items()}
                bank.add(states(1), cu_seqlens=offsets, **one)
                assert one["sample_ids"] == [i]
            stored = bank.nbytes
            # not restarted where groups were computed before
            grown = 0 if early else growth(bank.finalize)
        else:
            hidden, offsets = states(len(mine)), torch.arange(len(mine) + 1) * TOKENS
            stored = hidden.numel() * 4
            grown = growth(
                partial(
                    distributed.span_weights, hidden, cu_seqlens=offsets, config=CONFIG, **given
                )
            )
    return Seen(stored, grown, resident("VmHWM") - before)


@pytest.mark.parametrize("how", ["bank", "all at once"])
@pytest.mark.parametrize("size", [1, 2])
def test_a_step_needs_one_group_beside_the_states(size: int, how: str) -> None:
    for seen in ranks.run(size, step, how, GROUPS):
        assert seen.stored == GROUPS * GROUP_BYTES // size
        assert seen.stored > 5 * (3 * GROUP_BYTES + SLACK) / size  # else this would show nothing
        # with ranks, what comes from and goes to others is there for a moment, too
        assert seen.grown <= size * GROUP_BYTES + workspace() + SLACK
        if size == 1:
            assert seen.whole == pytest.approx(peak(planned(GROUPS)), rel=0.1)


def test_complete_groups_are_never_there_together() -> None:
    """With group_size: one being completed and one being computed."""
    (seen,) = ranks.run(1, step, "group_size", GROUPS)
    assert seen.stored == 0
    assert seen.whole <= 2 * GROUP_BYTES + workspace() + SLACK


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("group_size", [SIZE, None])
def test_a_step_on_a_gpu(group_size: int | None) -> None:
    """As torch counts; the workspace is that of the GPU's own plan."""
    tokens, device = 20 * TOKENS, torch.cuda.get_device_properties(0)
    offsets = [i * tokens for i in range(SIZE + 1)]
    workspace = _C.device_plan(
        offsets, [0] * SIZE, [0, 1] * (SIZE // 2), dim=DIM, span=CONFIG.span, stride=CONFIG.stride,
        distance=1, tokens=offsets[-1], processors=device.multi_processor_count,
        shared_bytes=device.shared_memory_per_block_optin - _C.STATIC_SHARED_BYTES,
    )["workspace_bytes"]  # fmt: skip
    for count in (1, GROUPS):  # one warm-up group first
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        bank = HiddenBank(group_size=group_size, config=CONFIG)
        for i in range(count * SIZE):
            hidden = torch.rand(tokens, DIM, dtype=torch.bfloat16, device="cuda")
            one = {"sample_ids": [i], "group_ids": [i // SIZE], "labels": [i % 2]}
            bank.add(hidden, cu_seqlens=torch.tensor([0, tokens]), **one)
        bank.finalize()
        grown = torch.cuda.max_memory_allocated() - before
    group = SIZE * tokens * DIM * 2
    stored = group if group_size else GROUPS * group
    assert grown <= 1.1 * (stored + group + workspace)
    assert grown >= 0.9 * stored


def test_the_states_of_a_group_go_when_it_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    bank, groups = HiddenBank(), 3
    for i in range(groups * SIZE):
        one = {"sample_ids": [i], "group_ids": [i // SIZE], "labels": [i % 2]}
        bank.add(states(1), cu_seqlens=torch.tensor([0, TOKENS]), **one)
    stored = [weakref.ref(held) for held in bank._states.values()]
    alive = []

    def span_weights(*args: Any, **options: Any) -> Any:
        alive.append(sum(held() is not None for held in stored))
        return api.span_weights(*args, **options)

    watched = SimpleNamespace(span_weights=span_weights, PairCounts=api.PairCounts)
    monkeypatch.setattr(distributed, "api", watched)
    bank.finalize(config=CONFIG)
    assert alive == [2 * SIZE, SIZE, 0]
