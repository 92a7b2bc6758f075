"""The batched sinkhorn against POT, linear programming and itself."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

import shear_ops
from shear_ops import reference
from test_backends import COMPILED, device_of

ot = pytest.importorskip("ot", reason="POT is the judge here")


def points(seed: int, batch: int, n: int, m: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    words = torch.randn(12, dim, generator=generator)
    x, y = (words[torch.randint(12, (batch, k), generator=generator)] for k in (n, m))
    noise = 0.3 * torch.randn(batch, n + m, dim, generator=generator)
    return x + noise[:, :n], y + noise[:, n:]


def pot(cost: torch.Tensor, reg: float) -> float:
    plan = ot.sinkhorn([], [], cost.double().numpy(), reg, method="sinkhorn_log",
                       numItermax=20_000, stopThr=1e-9, warn=False)  # fmt: skip
    return float((torch.from_numpy(plan) * cost).sum())


@pytest.mark.parametrize("reg", [0.1, 0.3, 1.0])
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1), (20, 20), (33, 17), (100, 75)])
def test_against_pot(size: tuple[int, int], reg: float) -> None:
    x, y = points(1, 3, *size, dim=8)
    seen = shear_ops.sinkhorn(x=x, y=y, reg=reg, n_iters=2000)
    assert seen.converged.all()
    for k in range(3):
        assert float(seen.value[k]) == pytest.approx(pot(torch.cdist(x[k], y[k]), reg), rel=2e-3)


def test_tends_to_w1() -> None:
    x, y = points(2, 4, 25, 25, dim=6)
    cost = torch.cdist(x, y)
    w1 = torch.tensor([ot.emd2([], [], c.double().numpy()) for c in cost])
    errors = []
    for reg in (1.0, 0.1, 0.01):
        value = shear_ops.sinkhorn(cost, reg=reg, n_iters=5000, tol=1e-4).value
        errors.append(float(((value - w1) / w1).max()))
    assert errors[0] > 10 * errors[2]
    assert 0 <= errors[2] < 2e-3


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6), n=st.integers(1, 40), m=st.integers(1, 40),
    reg=st.floats(0.01, 3.0), n_iters=st.sampled_from([1, 2, 3, 10, 100, 101]),
)  # fmt: skip
def test_value_is_never_below_w1_by_more_than_its_bound(
    seed: int, n: int, m: int, reg: float, n_iters: int
) -> None:
    """Stopped anywhere, the value is above the bounds; converged, it is within eps log(n) of W1."""
    x, y = points(seed, 1, n, m, dim=3)
    cost = torch.cdist(x, y)
    seen = shear_ops.sinkhorn(cost, reg=reg, n_iters=n_iters)
    assert float(seen.value) >= float(max(reference.bounds(cost.double()))) - 1e-5
    if seen.converged:
        w1 = ot.emd2([], [], cost[0].double().numpy())
        slack = 2e-3 * max(w1, reg) + 1e-5
        assert w1 - slack <= float(seen.value) <= w1 + reg * math.log(min(n, m)) + slack


def test_each_problem_stops_by_itself() -> None:
    """A problem solved alone equals the same problem next to a slow one, and ragged batches work."""
    x, y = points(3, 3, 30, 20, dim=4)
    cost = torch.cdist(x, y)
    cost[1, :15, :8] += 50  # two clusters of unequal mass: slow
    rows, columns = torch.tensor([30, 30, 7]), torch.tensor([20, 20, 13])
    cost[2, 7:] = 1e9  # outside the rows in use
    batch = shear_ops.sinkhorn(cost, reg=0.3, n_rows=rows, n_cols=columns)
    for k in range(3):
        alone = shear_ops.sinkhorn(cost[k, : rows[k], : columns[k]].contiguous(), reg=0.3)
        for seen, wanted in zip(batch, alone, strict=True):
            assert torch.equal(seen[k], wanted)
    assert batch.iterations[1] > batch.iterations[0]


# Found by a search for the worst: each stopped more than 2e-3 of max(value, reg) off.
FEW_TOKENS = (
    [[0, 101, 10.75, 52], [70.25, 35.25, 37.75, 3], [30.5, 44.25, 0, 3.25], [5, 0.75, 31.25, 32.75]],
    [[1.75, 0.5, 71.5], [106.25, 0.25, 177.25], [9.75, 17.5, 1]],
)  # fmt: skip


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("cost", FEW_TOKENS, ids=lambda rows: f"{len(rows)} tokens")
def test_few_tokens_whose_potentials_have_far_to_go(backend: str, cost: list[list[float]]) -> None:
    given = torch.tensor(cost)
    wanted = reference.sinkhorn(given.double()[None], 1.0, n_iters=100_000, tol=1e-9).value
    seen = shear_ops.sinkhorn(given.to(device_of(backend)), reg=1.0, backend=backend)
    assert seen.converged
    assert float(seen.value) == pytest.approx(float(wanted), abs=2e-3 * max(1, float(wanted)))


def test_signs_scale_and_layout() -> None:
    x, y = points(4, 2, 12, 15, dim=4)
    cost = torch.cdist(x, y)
    wanted = shear_ops.sinkhorn(cost, reg=0.2, tol=1e-4).value
    assert wanted.std() > 1e-3
    close = {"rtol": 1e-3, "atol": 1e-4}
    shifted = shear_ops.sinkhorn(cost - 20, reg=0.2, tol=1e-4).value
    torch.testing.assert_close(shifted, wanted - 20, **close)
    scaled = shear_ops.sinkhorn(cost * 1e4, reg=0.2e4, tol=1e-4).value
    torch.testing.assert_close(scaled, wanted * 1e4, rtol=1e-5, atol=0)
    transposed = shear_ops.sinkhorn(cost.transpose(1, 2), reg=0.2, tol=1e-4).value
    torch.testing.assert_close(transposed, wanted, **close)
    half = shear_ops.sinkhorn(cost.half(), reg=0.2, tol=1e-4).value
    again = shear_ops.sinkhorn(cost.half().float(), reg=0.2, tol=1e-4).value
    assert torch.equal(half, again)


def test_more_iterations_never_hurt() -> None:
    """The stop test has the right direction, and odd counts are as good as even ones."""
    x, y = points(5, 1, 40, 30, dim=4)
    cost = torch.cdist(x, y)
    wanted = float(reference.sinkhorn(cost.double(), 0.05).value)
    errors, residuals = [], []
    for n_iters in (1, 5, 6, 25, 26, 400):
        seen = shear_ops.sinkhorn(cost, reg=0.05, n_iters=n_iters, tol=0.0)
        assert int(seen.iterations) == n_iters
        assert not seen.converged
        errors.append(abs(float(seen.value) - wanted) / wanted)
        residuals.append(float(seen.residual))
    assert errors[-1] < 1e-4
    assert max(errors[3:5]) < 0.1
    assert residuals[0] > 10 * residuals[3] > 100 * residuals[5]


def test_empty_batch() -> None:
    assert shear_ops.sinkhorn(torch.zeros(0, 3, 4), reg=1.0).value.shape == (0,)
