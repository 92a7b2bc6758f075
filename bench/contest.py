"""Equal accuracy: us and the alternatives at their cheapest settings that are accurate enough."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from .peers import Ladder, Peer, Setting, Solve, chunks

OURS = "shear_ops"
N_ITERS = (100, 300, 1000, 3000)  # our ladder, from the default on
TOLERANCE = 2e-3

Entry = dict[str, Any]


class Job(Protocol):
    """Problems that a batch solver solves, and their judge (see problems.py)."""

    def warm_up(self, solve: Solve, chunk: int) -> None:
        """Solve one batch."""

    def run(self, solve: Solve, chunk: int) -> Tensor:
        """Solve all, so many problems per call."""

    def judge(self, value: Tensor) -> float:
        """Worst error of what run returned."""


def worst_error(value: Tensor, truth: Tensor, eps: float) -> float:
    """Largest error, relative to the larger of the true value and eps; NaN counts as infinite."""
    error = (value.double() - truth).abs() / truth.clamp(min=eps)
    return float(error.nan_to_num(torch.inf).max())


def own_setting(values: Callable[[int], Tensor], judge: Callable[[Tensor], float]) -> Entry:
    """Return our cheapest n_iters whose values are accurate enough, and their error."""
    for n_iters in N_ITERS:
        error = judge(values(n_iters))
        if error <= TOLERANCE:
            return {"n_iters": n_iters, "error": error}
    raise ArithmeticError(f"our values are off by {error:.1e} even with {n_iters} iterations")


@dataclass(frozen=True)
class Choice:
    """A setting of a peer that is accurate enough, and how it was found."""

    setting: Setting
    solve: Solve
    error: float
    seconds: float
    first_call_s: float  # of one batch, with what is compiled then
    rest: Ladder  # settings more accurate than this one
    tried: list[Entry]  # all that was tried for it, in order


class NoneAccurateError(Exception):
    """No setting of the ladders is accurate enough (or none was within the time to try)."""

    def __init__(self, tried: list[Entry]) -> None:
        super().__init__("no setting of its ladders is within the tolerance")
        self.tried = tried


def _climb(
    ladder: Ladder, peer: Peer, job: Job, give_up_s: float, tried: list[Entry]
) -> Choice | None:
    """Return the first setting of a ladder that passes, None if one takes over give_up_s."""
    for k, setting in enumerate(ladder):
        solve = peer.build(setting)
        begin = time.perf_counter()
        job.warm_up(solve, setting["chunk"])
        ready = time.perf_counter()
        values = job.run(solve, setting["chunk"])
        seconds, error = time.perf_counter() - ready, job.judge(values)
        known = error if math.isfinite(error) else None  # JSON has no infinity
        tried.append({**setting, "error": known, "seconds": seconds})
        if error <= TOLERANCE:
            return Choice(setting, solve, error, seconds, ready - begin, ladder[k + 1 :], tried)
        if seconds > give_up_s:
            return None
    return None


def cheapest(peer: Peer, job: Job, give_up_s: float) -> Choice:
    """Return the fastest of the settings that pass, over all ladders and batch sizes of a peer."""
    tried: list[Entry] = []
    best: Choice | None = None

    def attempt(ladder: Ladder) -> None:
        nonlocal best
        found = _climb(ladder, peer, job, give_up_s if best is None else best.seconds, tried)
        if found and (best is None or found.seconds < best.seconds):
            best = found

    for ladder in peer.ladders:
        attempt(ladder)
    if best is None:
        raise NoneAccurateError(tried)
    for chunk in chunks():
        if chunk != best.setting["chunk"]:
            attempt(tuple({**s, "chunk": chunk} for s in (best.setting, *best.rest)))
    return best


def _confirmed(choice: Choice, peer: Peer, job: Job) -> Choice:
    """Return the first setting, from a choice made on a sample on, that passes on the whole job."""
    ladder = (choice.setting, *choice.rest)
    found = _climb(ladder, peer, job, math.inf, choice.tried)
    if found is None:
        raise NoneAccurateError(choice.tried)
    return found


def qualify(
    peers: list[Peer], sample: Job, job: Job, give_up_s: float
) -> tuple[dict[str, Callable[[], Tensor]], dict[str, Entry]]:
    """Find the setting of every peer on a sample, then confirm it on the whole job.

    Returns:
        calls: the job done by each peer that is installed and accurate enough;
        facts: per peer its setting, error and what was tried, or why it takes no part.
    """
    calls: dict[str, Callable[[], Tensor]] = {}
    facts: dict[str, Entry] = {}
    for peer in peers:
        if peer.missing:
            facts[peer.name] = {"missing": peer.needs}
            continue
        try:
            choice = cheapest(peer, sample, give_up_s)
            if sample is not job:  # a harder problem may be among the others
                choice = _confirmed(choice, peer, job)
        except NoneAccurateError as error:
            facts[peer.name] = {"inaccurate": True, "tried": error.tried}
            continue
        facts[peer.name] = {
            "setting": choice.setting,
            "error": choice.error,
            "first_call_s": choice.first_call_s,
            "tried": choice.tried,
        }
        calls[peer.name] = partial(job.run, choice.solve, choice.setting["chunk"])
    return calls, facts
