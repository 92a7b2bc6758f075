"""Times of several calls, taken in turns so that a noisy machine hits all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import torch

STAGES = ("shear::token_costs", "shear::bounds", "shear::solve", "shear::nearest_spans")


def seconds_of(call: Callable[[], object]) -> float:
    """Wall time of one call, work on a GPU included."""
    _finish()
    begin = time.perf_counter()
    call()
    _finish()
    return time.perf_counter() - begin


def _finish() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def alternate(
    calls: Mapping[str, Callable[[], object]], repeats: int, limit_s: float
) -> dict[str, list[float]]:
    """Seconds of every call, round by round; one that has taken over limit_s sits out the rest."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            if sum(samples[name]) <= limit_s:
                samples[name].append(seconds_of(call))
    return samples


def summary(samples: list[float]) -> dict[str, Any]:
    """Return min, median, max and number of the samples, and all of them, in seconds."""
    return {
        "min": min(samples),
        "median": median(samples),
        "max": max(samples),
        "repeats": len(samples),
        "samples": samples,
    }


def ratio(numerator: list[float], denominator: list[float]) -> dict[str, Any]:
    """Ratio of the medians, and the lowest and the highest one of any two samples."""
    return {
        "value": median(numerator) / median(denominator),
        "low": min(numerator) / max(denominator),
        "high": max(numerator) / min(denominator),
        "repeats": [len(numerator), len(denominator)],
    }


def stage_seconds(call: Callable[[], object]) -> dict[str, float]:
    """Seconds of every stage of one call of an operator, from torch's profiler.

    On the CPU a stage lasts as long as its calling thread is in it, so the stages add up to the
    wall time; on a GPU as long as its kernels run. "other" is what is left. Stages that the build
    does not announce are absent.
    """
    activities, operator = [torch.profiler.ProfilerActivity.CPU], "bench::call"
    on_gpu = torch.get_default_device().type != "cpu"
    if on_gpu:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with (
        torch.profiler.profile(activities=activities) as profile,
        torch.profiler.record_function(operator),
    ):
        call()
        _finish()
    times = {
        event.key: (event.device_time_total if on_gpu else event.cpu_time_total) / 1e6
        for event in profile.key_averages()
        if event.device_type.name == "CPU"  # not its echo on the GPU
    }
    stages = {name.removeprefix("shear::"): times[name] for name in STAGES if name in times}
    return {**stages, "other": times[operator] - sum(stages.values()), "total": times[operator]}
