"""Equal accuracy: the cheapest setting of a peer whose values are within TOLERANCE of the truth."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .peers import Ladder, Peer, Setting, Solve, chunks

TOLERANCE = 2e-3


def worst_error(value: Tensor, truth: Tensor, eps: float) -> float:
    """Largest error, relative to the larger of the true value and eps; NaN counts as infinite."""
    error = (value.double() - truth).abs() / truth.clamp(min=eps)
    return float(error.nan_to_num(torch.inf).max())


@dataclass
class Choice:
    """A setting of a peer that is accurate enough, and how it was found."""

    setting: Setting
    solve: Solve
    error: float
    seconds: float
    first_call_s: float  # of one batch, with what is compiled then
    rest: Ladder  # settings more accurate than this one
    tried: list[dict[str, Any]] = field(default_factory=list)


class NoneAccurateError(Exception):
    """No setting of the ladders is accurate enough (or none was within the time to try)."""

    def __init__(self, tried: list[dict[str, Any]]) -> None:
        super().__init__("no setting of its ladders is within the tolerance")
        self.tried = tried


Job = Callable[[Solve, int], Tensor]  # solves problems, so many per call -> values (K,)


def climb(
    ladder: Ladder,
    build: Callable[[Setting], Solve],
    warm_up: Callable[[Solve, int], object],
    job: Job,
    judge: Callable[[Tensor], float],
    *,
    give_up_s: float,
    tried: list[dict[str, Any]],
) -> Choice | None:
    """Return the first setting of a ladder that judge passes, None if one takes over give_up_s."""
    for k, setting in enumerate(ladder):
        solve = build(setting)
        begin = time.perf_counter()
        warm_up(solve, setting["chunk"])
        ready = time.perf_counter()
        values = job(solve, setting["chunk"])
        seconds, error = time.perf_counter() - ready, judge(values)
        known = error if math.isfinite(error) else None  # JSON has no infinity
        tried.append({**setting, "error": known, "seconds": seconds})
        if error <= TOLERANCE:
            return Choice(setting, solve, error, seconds, ready - begin, ladder[k + 1 :])
        if seconds > give_up_s:
            return None
    return None


def cheapest(
    peer: Peer,
    warm_up: Callable[[Solve, int], object],
    job: Job,
    judge: Callable[[Tensor], float],
    *,
    give_up_s: float,
) -> Choice:
    """Return the fastest of the settings that pass, over all ladders and batch sizes of a peer."""
    tried: list[dict[str, Any]] = []
    best: Choice | None = None

    def attempt(ladder: Ladder) -> None:
        nonlocal best
        limit = give_up_s if best is None else best.seconds
        found = climb(ladder, peer.build, warm_up, job, judge, give_up_s=limit, tried=tried)
        if found and (best is None or found.seconds < best.seconds):
            best = found

    for ladder in peer.ladders:
        attempt(ladder)
    if best is None:
        raise NoneAccurateError(tried)
    for chunk in chunks():
        if chunk != best.setting["chunk"]:
            attempt(tuple({**s, "chunk": chunk} for s in (best.setting, *best.rest)))
    best.tried = tried
    return best
