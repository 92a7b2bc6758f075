"""What a GPU can do at most, and how near to that the solver's iterations are."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch

import shear_ops

from .contest import Entry
from .problems import CONFIG, synthetic_group
from .sizes import Sizes
from .timing import alternate, summary

DIM = 64  # the solver sees costs only
ITERATIONS = 17, 31  # both with four dual checks: after 4, 8, 16 and the last


def ceilings(sizes: Sizes) -> Entry:
    """Rates of float32 multiply-adds and exponentials of a GPU, and of copies and products."""
    from . import rates  # needs Triton

    device = torch.get_default_device()
    n = sizes.peak
    square = torch.randn(n, n).bfloat16()
    large = torch.empty(16 * n * n)
    target = torch.empty_like(large)
    product: Any = partial(torch.mm, square, square.T)
    if device.type == "cuda":
        product = partial(torch.mm, square, square.T, torch.float32)
    calls = {
        "multiply-adds": partial(rates.multiply_adds, *sizes.rates, device),
        "exponentials": partial(rates.exponentials, *sizes.rates, device),
        "product, bf16 to fp32": product,
        "copy": lambda: target.copy_(large),
    }
    for call in calls.values():
        call()  # compiles
    samples = alternate(calls, 15, sizes.limit_s)
    operations = {
        "multiply-adds": rates.operations(*sizes.rates),
        "exponentials": rates.operations(*sizes.rates),
        "product, bf16 to fp32": n**3,
        "copy": 2 * 4 * len(large),
    }
    return {
        "sizes": {"product": n, "copy_bytes": operations["copy"]},
        "times": {name: summary(seconds) for name, seconds in samples.items()},
        "per_s": {name: operations[name] / min(samples[name]) for name in calls},
    }


def solver(sizes: Sizes) -> Entry:
    """Time of one Sinkhorn iteration of one full span pair, from all pairs of two rollouts."""
    group = synthetic_group("unpruned", sizes.solver_tokens, DIM, rollouts=2)
    x, y = group.states(0), group.states(1)
    config = {n: replace(CONFIG, tol=0.0, n_iters=n) for n in ITERATIONS}
    calls = {
        f"{n} iterations": partial(
            shear_ops.pair_distances, x, y, config=config[n], backend=sizes.backend
        )
        for n in ITERATIONS
    }
    for call in calls.values():
        call()  # compiles
    samples = alternate(calls, max(sizes.repeats, 5), sizes.limit_s)
    pairs = next(iter(calls.values()))().numel()
    few, many = (min(seconds) for seconds in samples.values())
    iteration = (many - few) / (pairs * (ITERATIONS[1] - ITERATIONS[0]))
    return {
        "sizes": {"tokens": sizes.solver_tokens, "pairs": pairs, "span": CONFIG.span},
        "times": {name: summary(seconds) for name, seconds in samples.items()},
        "iteration_s": iteration,
        # two products of the kernel with a vector; what else an iteration does is not counted
        "multiply_adds_per_s": 2 * CONFIG.span**2 / iteration,
    }
