"""What the project wants to reach, and where in a record the measured number is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .contest import Entry

# label (such as a setting of the states), value, and the lowest and highest it may be
Value = tuple[str, float, float, float]


@dataclass(frozen=True)
class Target:
    """A row of the table: at most or at least `wanted`, None if it is only reported."""

    what: str
    kind: str  # of the device: cpu or gpu
    entry: str
    read: Callable[[Entry], list[Value]]
    wanted: float | None = None
    at_most: bool = False
    in_readme: bool = False

    def met(self, value: float) -> bool:
        """Whether a value reaches the target."""
        return self.wanted is None or (
            value <= self.wanted if self.at_most else value >= self.wanted
        )


def _value(label: str, ratio: Entry) -> Value:
    return label, ratio["value"], ratio["low"], ratio["high"]


def _over_product(*settings: str) -> Callable[[Entry], list[Value]]:
    """Read the ratios of the groups of these settings, or of all."""

    def read(entry: Entry) -> list[Value]:
        return [
            _value(name, part["over torch.mm"])
            for name, part in entry["settings"].items()
            if name in settings or not settings
        ]

    return read


def _over(peer: str) -> Callable[[Entry], list[Value]]:
    def read(entry: Entry) -> list[Value]:
        parts = [(n, p["alternatives"].get(peer, {})) for n, p in entry["settings"].items()]
        return [_value(name, facts["over ours"]) for name, facts in parts if "over ours" in facts]

    return read


def _best(names: Callable[[str], bool]) -> Callable[[Entry], list[Value]]:
    """Read the ratio of the fastest alternative of those named so."""

    def read(entry: Entry) -> list[Value]:
        found = [
            _value(name, facts["over ours"])
            for name, facts in entry["alternatives"].items()
            if names(name) and "over ours" in facts
        ]
        return [min(found, key=lambda value: value[1])] if found else []

    return read


def _solver_share(entry: Entry) -> list[Value]:
    return [
        (name, share := part["stages"]["solve"] / part["stages"]["total"], share, share)
        for name, part in entry["settings"].items()
        if "solve" in part["stages"]
    ]


def _growth(entry: Entry) -> list[Value]:
    return [(f"over {n}", *[entry[n]["worst_deviation"]] * 3) for n in ("tokens", "dim")]


def _speedup(entry: Entry) -> list[Value]:
    return [_value("", entry["speedup"])] if "speedup" in entry else []


def _share(entry: Entry) -> list[Value]:
    return [_value("", entry["share"])]


def _is_loop(name: str) -> bool:
    return name.endswith("loop")


TARGETS = (
    Target("paper group, bf16: time over bf16 `torch.mm` of its product", "cpu",
           "paper-bf16", _over_product("clustered"), 1.0, at_most=True, in_readme=True),
    Target("the same, where little can be pruned", "cpu",
           "paper-bf16", _over_product("unpruned"), 1.15, at_most=True, in_readme=True),
    Target("paper group, fp32: time over fp32 `torch.mm` of its product", "cpu",
           "paper-fp32", _over_product(), 0.35, at_most=True, in_readme=True),
    Target("paper group, bf16: times faster than `torch.cdist` + POT (scaled from a slice)", "cpu",
           "paper-bf16", _over("POT"), 25, in_readme=True),
    Target("the same, than a hand-written loop", "cpu", "paper-bf16", _over("loop"), 10),
    Target("small group, fp32: times faster than `torch.cdist` + POT", "cpu",
           "small", _over("POT"), 50),
    Target("the same, than a hand-written loop", "cpu", "small", _over("loop"), 10),
    Target("`sinkhorn`, real span pairs: times faster than the best of POT, GeomLoss, OTT-JAX",
           "cpu", "sinkhorn", _best(lambda name: not _is_loop(name)), 50, in_readme=True),
    Target("the same, than a hand-written loop", "cpu", "sinkhorn", _best(_is_loop), 10),
    Target("paper group, bf16: share of the solver", "cpu",
           "paper-bf16", _solver_share, 0.25, at_most=True),
    Target("two threads: times faster than one", "cpu", "threads", _speedup, 1.8),
    Target("time over T^2 d: largest deviation from proportional", "cpu",
           "growth", _growth, 0.15, at_most=True),
    Target("paper group, bf16: time over bf16 `torch.matmul` of its product", "gpu",
           "paper-bf16", _over_product(), 1.5, at_most=True, in_readme=True),
    Target("paper group, bf16: times faster than a compiled loop", "gpu",
           "paper-bf16", _over("loop"), 100),
    Target("paper group, bf16: times faster than POT", "gpu", "paper-bf16", _over("POT"), 300),
    Target("64 groups per GPU: time over forward and backward of 28 layers at 7B shapes (one layer "
           "measured)", "gpu", "overhead", _share, 0.005, at_most=True),
)  # fmt: skip
