"""Bring us and the alternatives to equal accuracy on a job, ready to be timed."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

from torch import Tensor

from .peers import Peer, Solve
from .tune import TOLERANCE, NoneAccurateError, cheapest, climb

OURS = "shear_ops"
N_ITERS = (100, 300, 1000, 3000)  # our ladder, from the default on

Entry = dict[str, Any]


class Job(Protocol):
    """Problems that a batch solver solves, and their judge (see jobs.py)."""

    def warm_up(self, solve: Solve, chunk: int) -> None:
        """Solve one batch."""

    def run(self, solve: Solve, chunk: int) -> Tensor:
        """Solve all, so many problems per call."""

    def judge(self, value: Tensor) -> float:
        """Worst error of what run returned."""


def own_setting(values: Callable[[int], Tensor], judge: Callable[[Tensor], float]) -> Entry:
    """Return our cheapest n_iters whose values are accurate enough, and their error."""
    for n_iters in N_ITERS:
        error = judge(values(n_iters))
        if error <= TOLERANCE:
            return {"n_iters": n_iters, "error": error}
    raise ArithmeticError(f"our values are off by {error:.1e} even with {n_iters} iterations")


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
            choice = cheapest(peer, sample.warm_up, sample.run, sample.judge, give_up_s=give_up_s)
            tried = choice.tried
            if sample is not job:  # a harder problem may be among the others
                ladder = (choice.setting, *choice.rest)
                confirmed = climb(
                    ladder, peer.build, job.warm_up, job.run, job.judge,
                    give_up_s=math.inf, tried=tried,
                )  # fmt: skip
                if confirmed is None:
                    raise NoneAccurateError(tried)
                choice = confirmed
        except NoneAccurateError as error:
            facts[peer.name] = {"inaccurate": True, "tried": error.tried}
            continue
        facts[peer.name] = {
            "setting": choice.setting,
            "error": choice.error,
            "first_call_s": choice.first_call_s,
            "tried": tried,
        }
        calls[peer.name] = partial(job.run, choice.solve, choice.setting["chunk"])
    return calls, facts
