"""The plots of a record, as SVG files next to it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from .contest import OURS, Entry
from .record import Record

# the same record gives the same file
mpl.rcParams |= {"svg.hashsalt": "shear_ops", "svg.fonttype": "none", "font.size": 9}


def draw(name: str, record: Record, folder: Path) -> list[Path]:
    """Write the plots that the entries of a record allow; returns their paths."""
    written = []
    for plot, make in PLOTS.items():
        figure = make(record["entries"])
        if figure is not None:
            path = folder / f"{name}-{plot}.svg"
            figure.savefig(path, metadata={"Date": None}, bbox_inches="tight")
            written.append(path)
    return written


def _growth(entries: dict[str, Entry]) -> Figure | None:
    """Time over T and over d, with the line of T^2 d."""
    if "growth" not in entries:
        return None
    figure = Figure(figsize=(7, 2.8), layout="constrained")
    for axes, series, label in zip(
        figure.subplots(1, 2), ("tokens", "dim"), ("tokens per rollout T", "dimension d"),
        strict=True,
    ):  # fmt: skip
        part = entries["growth"][series]
        x = [point[series] for point in part["points"]]
        times = [point["time"] for point in part["points"]]
        line = [part["seconds_per_t2d"] * p["tokens"] ** 2 * p["dim"] for p in part["points"]]
        axes.plot(x, line, color="gray", lw=1, label="T² d")
        median = [t["median"] for t in times]
        spread = [[t["median"] - t["min"] for t in times], [t["max"] - t["median"] for t in times]]
        axes.errorbar(x, median, spread, fmt="o", ms=4, capsize=2, label="measured")
        other = "d" if series == "tokens" else "T"
        fixed = part["points"][0]["dim" if series == "tokens" else "tokens"]
        axes.set(xscale="log", yscale="log", xlabel=f"{label} ({other} = {fixed})")
        axes.set(ylabel="seconds", xticks=x, xticklabels=[f"{v:,}" for v in x])
        axes.minorticks_off()
        axes.legend(frameon=False)
    return figure


def _stages(entries: dict[str, Entry]) -> Figure | None:
    """Seconds per stage of the paper group."""
    bars = {
        f"{name}, {setting}": part["stages"]
        for name in ("paper-bf16", "paper-fp32")
        for setting, part in entries.get(name, {}).get("settings", {}).items()
    }
    if not bars:
        return None
    figure = Figure(figsize=(7, 0.6 + 0.4 * len(bars)), layout="constrained")
    axes = figure.subplots()
    names = list(dict.fromkeys(stage for b in bars.values() for stage in b if stage != "total"))
    left = [0.0] * len(bars)
    for stage in names:
        seconds = [b.get(stage, 0.0) for b in bars.values()]
        axes.barh(list(bars), seconds, left=left, label=stage.replace("_", " "))
        left = [a + b for a, b in zip(left, seconds, strict=True)]
    axes.invert_yaxis()
    axes.set(xlabel="seconds, under the profiler")
    axes.legend(frameon=False, ncols=len(names), loc="lower center", bbox_to_anchor=(0.5, 1))
    return figure


def _speedups(entries: dict[str, Entry]) -> Figure | None:
    """How many times as long as ours each alternative takes at equal accuracy."""
    bars = {}
    for name in ("sinkhorn", "small", "paper-bf16"):
        for setting, part in [("", entries.get(name, {})), *_settings(entries, name)]:
            for peer, facts in part.get("alternatives", {}).items():
                if "over ours" in facts:
                    where = f"{name}, {setting}" if setting else name
                    bars[f"{where}: {peer}"] = facts["over ours"]["value"]
    if not bars:
        return None
    figure = Figure(figsize=(7, 0.6 + 0.25 * len(bars)), layout="constrained")
    axes = figure.subplots()
    drawn = axes.barh(list(bars), list(bars.values()))
    axes.bar_label(drawn, fmt=lambda value: f"{value:,.0f}", padding=3)
    axes.invert_yaxis()
    axes.set(xscale="log", xlabel=f"time over that of {OURS}, at equal accuracy", xlim=(1, None))
    return figure


def _settings(entries: dict[str, Entry], name: str) -> list[tuple[str, Entry]]:
    return list(entries.get(name, {}).get("settings", {}).items())


PLOTS: dict[str, Callable[[dict[str, Entry]], Figure | None]] = {
    "speedups": _speedups,
    "stages": _stages,
    "growth": _growth,
}
