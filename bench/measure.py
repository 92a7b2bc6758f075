"""The entries of a record: each function measures one thing and returns what goes into it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import torch
from torch import Tensor

import shear_ops
from shear_ops import SpanConfig, SpanDistances
from shear_ops.cli.rollouts import load_rollouts, shipped_rollouts

from .contest import OURS, Entry, own_setting, qualify
from .peers import any_of, libraries, loops
from .problems import (
    CONFIG,
    SETTINGS,
    Group,
    NearestSpans,
    Problems,
    real_span_pairs,
    synthetic_group,
)
from .record import ROOT
from .rounding import ENCODER, encoder, rounding
from .sizes import Sizes
from .timing import alternate, ratio, stage_seconds, summary
from .training_step import overhead


def paper_bf16(sizes: Sizes) -> Entry:
    """Paper group in bfloat16: its matrix product, its stages, and the alternatives on a slice."""
    return _paper(torch.bfloat16, sizes, alternatives=True)


def paper_fp32(sizes: Sizes) -> Entry:
    """Paper group in float32: its matrix product and its stages."""
    return _paper(torch.float32, sizes, alternatives=False)


def _paper(dtype: torch.dtype, sizes: Sizes, *, alternatives: bool) -> Entry:
    calls: dict[str, Callable[[], object]] = {}
    settings: dict[str, Entry] = {}
    for setting, about in SETTINGS.items():
        job = _paper_job(setting, sizes)
        group = job.group.to(dtype)
        settings[setting] = {"about": about, **_profiled(job, group, sizes.backend)}
        config = replace(CONFIG, n_iters=settings[setting]["n_iters"])
        calls[f"{OURS}, {setting}"] = partial(
            shear_ops.span_weights, **group.arguments(), config=config, backend=sizes.backend
        )
        if alternatives:
            solvers, facts = qualify(_alternatives(sizes), job, job, sizes.give_up_s)
            settings[setting]["alternatives"] = facts
            calls |= {f"{name}, {setting}, slice": call for name, call in solvers.items()}
    x, y = (torch.cat([group.states(i) for i in some]) for some in (group.correct, group.incorrect))
    # half-precision results are of no use here; torch has float32 ones on CUDA only
    wide = x.is_cuda and dtype != torch.float32
    calls["torch.mm"] = (
        partial(torch.mm, x, y.T, torch.float32) if wide else partial(torch.mm, x, y.T)
    )
    if alternatives:
        calls["torch.cdist, two rollouts"] = lambda: job.token_costs(0, 1)
    samples = alternate(calls, sizes.repeats, sizes.limit_s)
    for setting, entry in settings.items():
        ours = samples[f"{OURS}, {setting}"]
        entry["over torch.mm"] = ratio(ours, samples["torch.mm"])
        for name in entry.get("alternatives", {}):
            if (solving := samples.get(f"{name}, {setting}, slice")) is not None:
                scaled = _scaled(samples["torch.cdist, two rollouts"], solving, job)
                entry["alternatives"][name] |= {
                    "scaled_s": summary(scaled), "over ours": ratio(scaled, ours),
                }  # fmt: skip
    return {
        "sizes": _sizes(group),
        "slice_pairs": job.pairs,
        "times": {name: summary(seconds) for name, seconds in samples.items()},
        "settings": settings,
        "peak": _peak(sizes, dtype),
    }


@cache
def _paper_job(setting: str, sizes: Sizes) -> NearestSpans:
    """Some spans of the paper group; its states are the same numbers in both dtypes."""
    group = synthetic_group(setting, sizes.tokens, sizes.dim)
    spans, some = len(group.windows), sizes.slice_spans
    return NearestSpans(group, [spans * (2 * k + 1) // (2 * some) for k in range(some)])


def _profiled(job: NearestSpans, group: Group, backend: str | None) -> Entry:
    """Our setting, error, counts and stages. Not timed: what the profiler costs is in here."""
    found: list[tuple[SpanDistances, dict[str, float]]] = []
    before: list[int] = []

    def values(n_iters: int) -> Tensor:
        config, results = replace(CONFIG, n_iters=n_iters), []
        call = partial(
            shear_ops.span_distances, **group.arguments(), config=config, backend=backend
        )
        if group.hidden.is_cuda:
            call()  # compiles
            torch.cuda.reset_peak_memory_stats()
            before.append(torch.cuda.memory_allocated())
        stages = stage_seconds(lambda: results.append(call()))
        found.append((results[0], stages))
        return job.spans(results[0].distance)

    setting = own_setting(values, job.judge)
    distances, stages = found[-1]
    return {
        **setting,
        "pairs": distances.pairs._asdict(),
        "mean_iterations": float(distances.iterations.float().mean()),
        "stages": stages,
        **({"workspace_bytes": torch.cuda.max_memory_allocated() - before[-1]} if before else {}),
    }


def _scaled(two_rollouts: list[float], piece: list[float], job: NearestSpans) -> list[float]:
    """What the whole group would take: all token costs, and all pairs at the slice's rate."""
    group = job.group
    blocks = len(group.correct) * len(group.incorrect)
    return [
        blocks * costs + group.pairs / job.pairs * solving
        for costs, solving in zip(two_rollouts, piece, strict=False)
    ]


def _alternatives(sizes: Sizes) -> list[Any]:
    pot = [peer for peer in libraries() if peer.needs == "ot"]
    return [any_of("POT", pot), any_of("loop", loops(compiled=sizes.compiled))]


def _peak(sizes: Sizes, dtype: torch.dtype) -> Entry:
    """The practical ceilings here: a square torch.mm, in the dtype or in float32 where that is
    faster, and a copy that fits no cache.
    """
    n = sizes.peak
    squares = {
        str(d).removeprefix("torch."): torch.rand(n, n).to(d) for d in (dtype, torch.float32)
    }
    large = torch.rand(16 * n * n)
    target = torch.empty_like(large)
    calls: dict[str, Callable[[], object]] = {
        name: partial(torch.mm, square, square) for name, square in squares.items()
    }
    seconds = alternate({**calls, "copy": lambda: target.copy_(large)}, 15, 10.0)
    fastest = min(squares, key=lambda name: min(seconds[name]))
    return {
        "mm": fastest,
        "fma_per_s": n**3 / min(seconds[fastest]),
        "float32_fma_per_s": n**3 / min(seconds["float32"]),
        "bytes_per_s": 2 * 4 * len(large) / min(seconds["copy"]),
    }


def _sizes(group: Group) -> Entry:
    return {
        "rollouts": group.rollouts,
        "tokens": group.tokens,
        "dim": group.hidden.shape[1],
        "dtype": str(group.hidden.dtype).removeprefix("torch."),
        "span_pairs": group.pairs,
        **asdict(CONFIG),
    }


def small(sizes: Sizes) -> Entry:
    """Small group in float32: span_weights over the alternatives, all of it."""
    settings: dict[str, Entry] = {}
    for setting, about in SETTINGS.items():
        group = synthetic_group(setting, *sizes.small)
        job = NearestSpans(group)
        sample = NearestSpans(group, list(range(len(group.windows))))

        def values(n_iters: int, group: Group = group, job: NearestSpans = job) -> Tensor:
            config = replace(CONFIG, n_iters=n_iters)
            found = shear_ops.span_distances(
                **group.arguments(), config=config, backend=sizes.backend
            )
            return job.spans(found.distance)

        own = own_setting(values, job.judge)
        config = replace(CONFIG, n_iters=own["n_iters"])
        calls, facts = qualify(_alternatives(sizes), sample, job, sizes.give_up_s)
        given = {**group.arguments(), "config": config, "backend": sizes.backend}
        ours = partial(shear_ops.span_weights, **given)
        settings[setting] = {
            "about": about,
            **own,
            "pairs": shear_ops.span_distances(**given).pairs._asdict(),
            **_race(ours, calls, facts, sizes),
        }
    return {"sizes": _sizes(group), "settings": settings}


def sinkhorn(sizes: Sizes) -> Entry:
    """Real span pairs, their costs given: sinkhorn over POT, GeomLoss, OTT-JAX and loops."""
    cost, eps = real_span_pairs(sizes.problems)
    job = Problems(cost, eps)
    sample = Problems(cost[: sizes.sample], eps)
    solve = partial(shear_ops.sinkhorn, cost, reg=eps, backend=sizes.backend)
    own = own_setting(lambda n: solve(n_iters=n).value, job.judge)
    ours = partial(solve, n_iters=own["n_iters"])
    peers = [*libraries(), *loops(compiled=sizes.compiled)]
    calls, facts = qualify(peers, sample, job, sizes.give_up_s)
    return {
        "sizes": {"problems": len(cost), "n": cost.shape[1], "m": cost.shape[2], "eps": eps},
        **own,
        "mean_iterations": float(ours().iterations.float().mean()),
        **_race(ours, calls, facts, sizes),
    }


def _race(
    ours: Callable[[], object], calls: dict[str, Any], facts: dict[str, Entry], sizes: Sizes
) -> Entry:
    """Time us and the alternatives in turns; facts gain the ratios."""
    samples = alternate({OURS: ours, **calls}, sizes.repeats, sizes.limit_s / 2)
    for name in calls:
        facts[name]["over ours"] = ratio(samples[name], samples[OURS])
    return {
        "times": {name: summary(seconds) for name, seconds in samples.items()},
        "alternatives": facts,
    }


def threads(sizes: Sizes) -> Entry:
    """One thread over two, on half the paper's length in bfloat16."""
    before = torch.get_num_threads()
    if hasattr(os, "sched_getaffinity") and len(os.sched_getaffinity(0)) < 2:
        return {"missing": "two cores"}
    group = synthetic_group("clustered", *sizes.threads).to(torch.bfloat16)

    def run(count: int) -> None:
        torch.set_num_threads(count)
        shear_ops.span_weights(**group.arguments(), config=CONFIG)

    try:
        calls = {"1 thread": partial(run, 1), "2 threads": partial(run, 2)}
        samples = alternate(calls, min(sizes.repeats, 3), sizes.limit_s)
    finally:
        torch.set_num_threads(before)
    return {
        "sizes": _sizes(group),
        "times": {name: summary(seconds) for name, seconds in samples.items()},
        "speedup": ratio(samples["1 thread"], samples["2 threads"]),
    }


def growth(sizes: Sizes) -> Entry:
    """Time over the length T and the dimension d (on a GPU the rollouts too), clustered states."""
    series = {
        "tokens": [(tokens, sizes.growth_dim, 8) for tokens in sizes.growth_tokens],
        "dim": [(sizes.growth_length, dim, 8) for dim in sizes.growth_dims],
        "rollouts": [(sizes.growth_length, sizes.growth_dim, n) for n in sizes.growth_rollouts],
    }
    dtype = str(sizes.growth_dtype).removeprefix("torch.")
    out: Entry = {"setting": "clustered", "dtype": dtype}
    for name, points in series.items():
        if not points:
            continue
        calls = {
            f"T={tokens}, d={dim}, G={count}": partial(
                shear_ops.span_weights, config=CONFIG, backend=sizes.backend,
                **synthetic_group("clustered", tokens, dim, rollouts=count)
                .to(sizes.growth_dtype).arguments(),
            )
            for tokens, dim, count in points
        }  # fmt: skip
        for call in calls.values():
            if sizes.growth_dtype != torch.float32:
                call()  # compiles
        samples = list(alternate(calls, min(sizes.repeats, 3), sizes.limit_s / 2).values())
        times = [summary(seconds) for seconds in samples]
        units = [
            time["median"] / ((tokens * count / 8) ** 2 * dim)
            for time, (tokens, dim, count) in zip(times, points, strict=True)
        ]
        fit = geometric_mean(units)  # least squares of the logarithms
        out[name] = {
            "points": [
                {"tokens": tokens, "dim": dim, "rollouts": count, "time": time}
                for (tokens, dim, count), time in zip(points, times, strict=True)
            ],
            "seconds_per_t2d": fit,
            "worst_deviation": max(abs(unit / fit - 1) for unit in units),
        }
    return out


def survivors(sizes: Sizes) -> Entry:
    """Span pairs bounded away, abandoned and solved on real rollouts and an encoder's texts."""
    rollouts = load_rollouts(sizes.rollouts or shipped_rollouts())
    configs = [SpanConfig(reg=reg) for reg in (0.01, 0.02, 0.03, 0.05, 0.1)] + [
        SpanConfig(span=span, stride=stride) for span in (80, 100, 120) for stride in (25, 50, 75)
    ]
    rows = []
    given = rollouts.arguments()
    given["hidden"] = given["hidden"].to(torch.get_default_device())
    for config in dict.fromkeys(configs):
        found = shear_ops.span_distances(**given, config=config, backend=sizes.backend)
        rows.append(
            {
                "span": config.span, "stride": config.stride, "reg": config.reg,
                **found.pairs._asdict(),
                "mean_iterations": float(found.iterations.float().mean()),
            }
        )  # fmt: skip
    tokens, dim = rollouts.hidden.shape
    entry: Entry = {"rollouts": len(rollouts), "tokens": tokens, "dim": dim, "rows": rows}
    texts = encoder(1000)
    if texts is None:
        return entry | {"missing": ENCODER}
    found = shear_ops.span_distances(
        torch.cat(texts).to(torch.get_default_device()), cu_seqlens=1000 * torch.arange(5),
        group_ids=torch.zeros(4, dtype=torch.int64), labels=torch.tensor([1, 1, 0, 0]),
        backend=sizes.backend,
    )  # fmt: skip
    return entry | {"encoder": found.pairs._asdict()}


def micro(sizes: Sizes) -> Entry:
    """Small problems under pytest-benchmark: sinkhorn and span_weights over the alternatives."""
    if find_spec("pytest_benchmark") is None:
        return {"missing": "pytest-benchmark"}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "benchmark.json")
        subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *sizes.micro,
             f"--benchmark-json={out}", "bench/test_micro.py"],
            cwd=ROOT, check=True,
        )  # fmt: skip
        benchmarks = json.loads(out.read_text())["benchmarks"]
    functions: dict[str, dict[str, Entry]] = {}
    for each in benchmarks:
        about = each["extra_info"]
        functions.setdefault(each["group"], {})[about.pop("who")] = {
            **about, "time": summary(each["stats"]["data"])
        }  # fmt: skip
    return {"functions": functions}


SOLVER_ITERATIONS = 17, 31  # both with four dual checks: after 4, 8, 16 and the last


def solver(sizes: Sizes) -> Entry:
    """Time of one Sinkhorn iteration of one full span pair, from all pairs of two rollouts."""
    group = synthetic_group("unpruned", sizes.solver_tokens, 64, rollouts=2)
    x, y = group.states(0), group.states(1)
    config = {n: replace(CONFIG, tol=0.0, n_iters=n) for n in SOLVER_ITERATIONS}
    calls = {
        f"{n} iterations": partial(
            shear_ops.pair_distances, x, y, config=config[n], backend=sizes.backend
        )
        for n in SOLVER_ITERATIONS
    }
    for call in calls.values():
        call()  # compiles
    samples = alternate(calls, max(sizes.repeats, 5), sizes.limit_s)
    pairs = next(iter(calls.values()))().numel()
    few, many = (min(seconds) for seconds in samples.values())
    iteration = (many - few) / (pairs * (SOLVER_ITERATIONS[1] - SOLVER_ITERATIONS[0]))
    return {
        "sizes": {"tokens": sizes.solver_tokens, "pairs": pairs, "span": CONFIG.span},
        "times": {name: summary(seconds) for name, seconds in samples.items()},
        "iteration_s": iteration,
        # two products of the kernel with a vector; what else an iteration does is not counted
        "multiply_adds_per_s": 2 * CONFIG.span**2 / iteration,
    }


def ceilings(sizes: Sizes) -> Entry:
    """Rates of float32 multiply-adds and exponentials of a GPU, and of copies and products."""
    from .ceilings import measure  # needs Triton

    return measure(sizes)


ENTRIES: dict[str, Callable[[Sizes], Entry]] = {
    "sinkhorn": sinkhorn,
    "small": small,
    "paper-fp32": paper_fp32,
    "paper-bf16": paper_bf16,
    "threads": threads,
    "growth": growth,
    "solver": solver,
    "micro": micro,
    "ceilings": ceilings,
    "overhead": overhead,
    "survivors": survivors,
    "rounding": rounding,
}
