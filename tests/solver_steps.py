"""The rule of the solver step by step: every backend stopped after 1, 2, 3, ... iterations.

csrc/solve.h and src/shear_ops/triton/solve.py write the rule down once each. Where they chose
another omega, heat or order at any step, residuals differ from there on.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import shear_ops

STEPS = range(1, 21)  # further on, rounding decides where the residual stalls
NEVER = 1e-7  # tol: no problem is done within the steps


def problems() -> dict[str, tuple[Tensor, float]]:
    """Costs (1, n, m) and reg: slow ones, ragged ones, ones that are solved at a heat first."""
    generator = torch.Generator().manual_seed(5)

    def points(n: int, m: int) -> tuple[Tensor, Tensor]:
        return tuple(torch.randn(1, k, 3, generator=generator) for k in (n, m))  # type: ignore[return-value]

    plain, ragged, far = points(20, 20), points(17, 12), points(24, 20)
    far[0][0, :3, 0] += 900
    far[1][0, :2, 0] += 900
    return {
        "plain": (torch.cdist(*plain), 0.1),
        "ragged": (torch.cdist(*ragged), 0.03),
        "far": (torch.cdist(*far), 0.5),
        "wide": (torch.cdist(*points(140, 130)), 0.1),  # beyond the tiles of every solver
    }


def assert_same_steps(solve: Callable[..., tuple[Tensor, Tensor, Tensor]], name: str) -> None:
    """Compare value and residual after every number of iterations with the CPU's.

    Residuals are compared while they are above what float32 sums leave; a difference by rounding
    grows with the iterations, another omega changes a residual by tens of per cent.
    """
    cost, reg = problems()[name]
    compared = 0
    for n_iters in STEPS:
        wanted = shear_ops.sinkhorn(cost, reg=reg, n_iters=n_iters, tol=NEVER, backend="cpu")
        value, residual, iterations = solve(cost, reg=reg, n_iters=n_iters, tol=NEVER)
        assert iterations.tolist() == wanted.iterations.tolist() == [n_iters]
        torch.testing.assert_close(value.cpu(), wanted.value, rtol=1e-3, atol=1e-4)
        if wanted.residual.item() > 1e-3:
            torch.testing.assert_close(residual.cpu(), wanted.residual, rtol=2e-2, atol=1e-5)
            compared += 1
    assert compared >= len(STEPS) / 4
    cost = cost[:, :, : cost.shape[2] - 1]  # sizes that hide mass, at the default tolerance
    wanted = shear_ops.sinkhorn(cost, reg=reg, backend="cpu")
    value, _, iterations = solve(cost, reg=reg, n_iters=5000, tol=5e-3)
    # a residual just above or below what is allowed asks for one more round
    assert abs(int(iterations) - int(wanted.iterations)) <= max(8, int(wanted.iterations) // 4)
    torch.testing.assert_close(value.cpu(), wanted.value, rtol=1e-3, atol=1e-4)
