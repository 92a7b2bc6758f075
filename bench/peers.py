"""The alternatives: other libraries and hand-written loops, each with a ladder of settings.

A peer solves a batch of costs (b, n, m) and returns its sharp transport costs <P, C> (b,), the
number that shear_ops returns. Its ladders run from cheap to accurate settings; contest.py climbs
them. All of them compute in float32 on torch's or XLA's threads.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

Setting = dict[str, Any]
Ladder = tuple[Setting, ...]
Solve = Callable[[Tensor, float], Tensor]  # costs (b, n, m), eps -> (b,)

ITERATIONS = (20, 50, 100, 150, 200, 300, 500, 1000, 2000)


def chunks() -> tuple[int, int, int]:
    """Problems per call that are tried; ladders are climbed with the one in the middle."""
    return (8, 40, 200) if torch.get_default_device().type == "cpu" else (200, 1000, 4000)


@dataclass(frozen=True)
class Peer:
    """An alternative: `build` makes its batch solver for a setting out of one of its ladders."""

    name: str
    ladders: tuple[Ladder, ...]
    build: Callable[[Setting], Solve]
    needs: str | None = None  # the module it imports

    @property
    def missing(self) -> bool:
        """Whether the module it needs is not installed."""
        return self.needs is not None and find_spec(self.needs) is None


def _ladder(name: str, values: tuple[float, ...], **fixed: Any) -> Ladder:
    return tuple({name: value, "chunk": chunks()[1], **fixed} for value in values)


def _pot(setting: Setting) -> Solve:
    from ot.batch import solve_batch

    own = {name: value for name, value in setting.items() if name != "chunk"}

    def solve(cost: Tensor, eps: float) -> Tensor:
        value: Tensor = solve_batch(cost, eps, grad="detach", **own).value_linear
        return value

    return solve


def _pot_ladders(method: str) -> tuple[Ladder, Ladder]:
    # tol is an L2 error of the worst row marginal in the batch, looked at every 10 iterations
    return (
        _ladder("tol", (1e-3, 3e-4, 1e-4, 3e-5, 1e-5, 1e-6), method=method, max_iter=5000),
        _ladder("max_iter", ITERATIONS, method=method, tol=0.0),
    )


def _geomloss(setting: Setting) -> Solve:
    from geomloss import SamplesLoss

    def solve(cost: Tensor, eps: float) -> Tensor:
        batch, n, m = cost.shape

        def given(x: Tensor, y: Tensor) -> Tensor:  # its hook for a cost of one's own
            return cost if bool(x[0, 0, 0] == 0) else cost.mT

        loss = SamplesLoss(
            "sinkhorn", p=1, blur=eps, scaling=setting["scaling"], diameter=float(cost.max()),
            debias=False, potentials=True, backend="tensorized", cost=given,
        )  # fmt: skip
        f, g = loss(cost.new_zeros(batch, n, 1), cost.new_ones(batch, m, 1))
        plan: Tensor = ((f[:, :, None] + g[:, None] - cost) / eps).exp()  # times n m
        return (plan * cost).mean((1, 2))

    return solve


def _ott(setting: Setting) -> Solve:
    import jax
    import jax.numpy as jnp
    import numpy as np
    from ott.geometry.geometry import Geometry
    from ott.problems.linear.linear_problem import LinearProblem
    from ott.solvers.linear.acceleration import Momentum
    from ott.solvers.linear.sinkhorn import Sinkhorn

    solver = Sinkhorn(
        lse_mode=setting["lse_mode"], threshold=setting["threshold"], max_iterations=5000,
        momentum=Momentum(start=20, value=setting["momentum"]), implicit_diff=None,
    )  # fmt: skip

    def one(cost: Any, eps: Any) -> Any:
        return solver(LinearProblem(Geometry(cost_matrix=cost, epsilon=eps))).primal_cost

    many = jax.jit(jax.vmap(one, in_axes=(0, None)))
    return lambda cost, eps: torch.from_numpy(np.array(many(jnp.asarray(cost.numpy()), eps)))


def _log_step(scaled: Tensor, u: Tensor, v: Tensor, omega: Tensor) -> tuple[Tensor, Tensor]:
    """One iteration on log scalings u (b, n), v (b, m) of the plan exp(scaled + u + v)."""
    n, m = scaled.shape[1:]
    u = u - omega * (u + math.log(n) + torch.logsumexp(scaled + v[:, None, :], 2))
    v = v - omega * (v + math.log(m) + torch.logsumexp(scaled + u[:, :, None], 1))
    return u, v


def _kernel_step(kernel: Tensor, u: Tensor, v: Tensor, omega: Tensor) -> tuple[Tensor, Tensor]:
    """One iteration on scalings u (b, n), v (b, m) of the plan u kernel v: no exponentials."""
    n, m = kernel.shape[1:]
    u = u / (n * u * (kernel * v[:, None, :]).sum(2)) ** omega
    v = v / (m * v * (kernel * u[:, :, None]).sum(1)) ** omega
    return u, v


@cache
def _step(domain: str, compiled: bool) -> Callable[..., tuple[Tensor, Tensor]]:
    step = {"log": _log_step, "kernel": _kernel_step}[domain]
    return torch.compile(step) if compiled else step


def _loop(setting: Setting) -> Solve:
    """A fixed number of over-relaxed iterations, the first and the last one plain."""
    step, log_domain = _step(setting["domain"], setting["compiled"]), setting["domain"] == "log"
    iterations, relaxed = setting["iterations"], torch.tensor(setting["omega"])

    def solve(cost: Tensor, eps: float) -> Tensor:
        matrix = cost / -eps if log_domain else (cost / -eps).exp()
        start = torch.zeros if log_domain else torch.ones
        u, v = start(cost.shape[:2]), start(cost.shape[0], cost.shape[2])
        for tensor in (matrix, u, v):
            torch._dynamo.maybe_mark_dynamic(tensor, 0)  # the last batch is smaller
        for k in range(iterations):
            plain = k in (0, iterations - 1)
            u, v = step(matrix, u, v, torch.ones(()) if plain else relaxed)
        if log_domain:
            plan = (matrix + u[:, :, None] + v[:, None, :]).exp()
        else:
            plan = u[:, :, None] * matrix * v[:, None, :]
        return (plan * cost).sum((1, 2))

    return solve


def _loop_ladders(domain: str, compiled: bool) -> tuple[Ladder, Ladder]:
    fixed = {"domain": domain, "compiled": compiled}
    return (
        _ladder("iterations", ITERATIONS, omega=1.5, **fixed),
        _ladder("iterations", ITERATIONS, omega=1.0, **fixed),
    )


def libraries() -> list[Peer]:
    """POT in both of its domains, GeomLoss and OTT-JAX."""
    pot = [
        Peer(f"POT {method}", _pot_ladders(method), _pot, "ot")
        for method in ("sinkhorn", "log_sinkhorn")
    ]
    scalings = (0.5, 0.7, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998)
    geomloss = Peer("GeomLoss", (_ladder("scaling", scalings),), _geomloss, "geomloss")
    thresholds = (1e-2, 3e-3, 1e-3, 3e-4, 1e-4)
    ott = tuple(
        _ladder("threshold", thresholds, lse_mode=lse_mode, momentum=momentum)
        # over-relaxed scalings (not their logarithms) turn negative: NaN
        for lse_mode, momentum in ((False, 1.0), (True, 1.5), (True, 1.0))
    )
    on_cpu = torch.get_default_device().type == "cpu"  # arrays of XLA's own on a GPU
    return [*pot, geomloss, *([Peer("OTT-JAX", ott, _ott, "ott")] if on_cpu else [])]


def loops(*, compiled: bool) -> list[Peer]:
    """The loop that one would write by hand, on logarithms and on the kernel exp(-C / eps)."""
    compiled = compiled and shutil.which(os.environ.get("CXX", "g++")) is not None
    return [
        Peer(f"{domain} loop", _loop_ladders(domain, compiled), _loop)
        for domain in ("kernel", "log")
    ]


def any_of(name: str, peers: list[Peer]) -> Peer:
    """Return one peer with the ladders of several, which are built alike: the fastest one wins."""
    first = peers[0]
    return Peer(name, tuple(x for p in peers for x in p.ladders), first.build, first.needs)
