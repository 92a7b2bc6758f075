"""Int8 rows of states, by the rule of csrc/rounding.h: bit by bit the same on every instruction set,
and distances that do not carry their rounding."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import shear_ops
from shear_ops import _C, SpanConfig, reference

# sets that differ in the product alone, which is exact
SAME = [("avx2", "avx_vnni"), ("avx512", "avx512_vnni", "amx")]
SETS = [name for name, supported in _C.build_info()["instruction_sets"].items() if supported]
DIMS = (65, 130, 200, 640, 896)

COMPUTE = """
import sys, numpy as np, torch, shear_ops
from shear_ops import _C
sys.path.insert(0, sys.argv[2])
from test_rounding import DIMS, group, states
out = {}
for dim in DIMS:
    rows, scale, center = _C.int8_rows(states(dim).numpy())
    out.update({f"rows{dim}": rows, f"scale{dim}": scale, f"center{dim}": center})
    found = shear_ops.span_distances(**group(dim))
    out.update({f"distance{dim}": found.distance.numpy(), f"nearest{dim}": found.nearest.numpy()})
np.savez(sys.argv[1], **out)
"""


def states(dim: int) -> Tensor:
    """180 tokens with what is hard to round: outliers, a common mean, sinks, zeros, the center."""
    g = torch.Generator().manual_seed(dim)
    x = torch.randn(180, dim, generator=g)
    x[:, 5] *= 40
    x[:, 7] += 30
    x[::37] *= 300
    x[11] = 0
    x[100:140] = x[20:60] + 0.05 * torch.randn(40, dim, generator=g)
    x[13] = torch.from_numpy(_C.int8_rows(x.numpy())[2])  # moves the center by little
    return x


def group(dim: int) -> dict[str, object]:
    return {
        "hidden": states(dim),
        "cu_seqlens": torch.tensor([0, 50, 100, 130, 180]),
        "group_ids": torch.zeros(4, dtype=torch.int64),
        "labels": torch.tensor([1, 0, 1, 0]),
        "config": SpanConfig(span=16, stride=5),
    }


@pytest.fixture(scope="module")
def by_set(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, np.ndarray]]:
    folder = tmp_path_factory.mktemp("sets")
    found = {}
    for name in SETS:
        path = folder / f"{name}.npz"
        subprocess.run(
            [sys.executable, "-c", COMPUTE, str(path), str(Path(__file__).parent)],
            env={**os.environ, "SHEAR_ISA": name, "OMP_NUM_THREADS": "1"}, check=True,
        )  # fmt: skip
        found[name] = dict(np.load(path))
    return found


@pytest.mark.parametrize("dim", DIMS)
def test_rows_are_equal_on_every_instruction_set(
    by_set: dict[str, dict[str, np.ndarray]], dim: int
) -> None:
    assert len(by_set) > 1
    first, *others = by_set.values()
    assert first[f"rows{dim}"].any()
    for other in others:
        for what in ("rows", "scale", "center"):
            np.testing.assert_array_equal(first[what + str(dim)], other[what + str(dim)])


def test_products_are_equal_on_every_instruction_set(
    by_set: dict[str, dict[str, np.ndarray]],
) -> None:
    compared = 0
    for names in SAME:
        same = [by_set[name] for name in names if name in by_set]
        for other in same[1:]:
            compared += 1
            for name, values in same[0].items():
                np.testing.assert_array_equal(values, other[name], err_msg=name)
    if not compared:
        pytest.skip(f"this machine has no two sets that differ in the product: {', '.join(SETS)}")


@pytest.mark.parametrize("dim", DIMS)
def test_rows_are_the_states(dim: int) -> None:
    """Rotated rows keep inner products, to the error of half a step in every dimension."""
    x = states(dim)
    rows, scale, center = (torch.from_numpy(a).double() for a in _C.int8_rows(x.numpy()))
    assert rows.shape == (len(x), -(-dim // 64) * 64)
    assert rows.abs().max() == 127
    y, rounded = x.double() - center, rows * scale[:, None]
    norm = y.norm(dim=1)
    half = scale / 2 * rows.shape[1] ** 0.5  # the length of an error
    error = (rounded @ rounded.T - y @ y.T).abs()
    bound = norm[:, None] * half + half[:, None] * norm + half[:, None] * half
    assert (error <= bound + 1e-6 * norm[:, None] * norm).all()
    # the errors of dimensions are independent: next to nothing of that bound is left
    some = bound > 0
    assert (error[some] / bound[some]).mean() < 0.1


@pytest.mark.parametrize("dim", DIMS)
def test_center_is_the_mean_without_sinks(dim: int) -> None:
    x = states(dim)
    ordinary = x.norm(dim=1) < 1000  # the others are sinks
    assert 0.9 < ordinary.float().mean() < 1
    expected = x[ordinary].double().mean(0)
    center = torch.from_numpy(_C.int8_rows(x.numpy())[2])
    norm = x[ordinary].norm(dim=1).median()
    assert (center - expected).norm() < 0.2 * norm
    assert (x.double().mean(0) - expected).norm() > norm  # what the plain mean would be


def test_state_at_the_center_has_no_row() -> None:
    x = torch.ones(9, 100)
    x[0], x[1] = 2, 0  # the center is 1
    rows, scale, center = _C.int8_rows(x.numpy())
    np.testing.assert_array_equal(center, 1)
    assert not rows[2:].any()
    assert not scale[2:].any()
    assert (np.abs(rows[:2]).max(1) == 127).all()


@pytest.mark.parametrize("shape", [(1, 100), (5, 64), (7,)])
def test_rows_name_what_they_take(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="states must be"):
        _C.int8_rows(np.zeros(shape, np.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [65, 640])
def test_distances_carry_no_rounding(dim: int, dtype: torch.dtype) -> None:
    """The distance to the nearest span is that of the float64 solution for the same two spans."""
    call = {**group(dim), "hidden": states(dim).to(dtype)}
    found = shear_ops.span_distances(**call)
    exact = shear_ops.span_distances(**call, backend="reference")
    config = call["config"]
    x = call["hidden"]
    ends = [(int(b), int(e)) for b, e in zip(found.begin, found.end, strict=True)]
    eps = config.reg * float(x.double().norm(dim=1).mean())
    for s in range(0, len(ends), 4):
        (begin, end), (b, e) = ends[s], ends[int(found.nearest[s])]
        cost = reference.token_cost(x[begin:end].double(), x[b:e].double())
        value = float(reference.sinkhorn(cost, reg=eps).value)
        assert abs(float(found.distance[s]) - value) <= 2e-3 * max(value, eps)
    assert (found.distance >= exact.distance - 2e-3 * exact.distance.clamp(min=eps)).all()


@pytest.mark.parametrize("dim", [65, 128, 384])
def test_rounding_that_shows_is_noticed(dim: int) -> None:
    """Spans of one token: no average hides the error of a cost, 1e-2 without the check."""
    labels = torch.arange(48) % 2
    for seed in range(6):
        g = torch.Generator().manual_seed(seed)
        words = torch.randn(3, dim, generator=g)
        x = words[torch.randint(3, (48,), generator=g)] + 0.3 * torch.randn(48, dim, generator=g)
        found = shear_ops.span_distances(
            x, cu_seqlens=torch.arange(49), group_ids=0 * labels, labels=labels
        )
        cost = reference.token_cost(x.double(), x.double())
        cost[labels[:, None] == labels] = float("inf")
        least = cost.amin(1)
        eps = 0.03 * float(x.double().norm(dim=1).mean())
        assert ((found.distance - least).abs() <= 2e-3 * least.clamp(min=eps)).all()
