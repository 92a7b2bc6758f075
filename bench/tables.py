"""Tables out of records, in Markdown and for a terminal: every number in them was measured."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from .contest import OURS, Entry
from .record import Record
from .targets import TARGETS, Target

NOT_YET = "not measured yet"
KINDS = {"cpu": "CPU", "gpu": "GPU"}


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a Markdown table; all columns but the first are right-aligned."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def number(value: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:#.3g}".rstrip(".")


def targets(records: dict[str, Record], *, in_readme: bool = False) -> str:
    """One table per kind of device: targets against the record of every device of that kind.

    in_readme: only those that the README shows.
    """
    parts = []
    for kind, title in KINDS.items():
        of_kind = [r for r in records.values() if r["device"]["kind"] == kind]
        names = [r["device"]["name"] for r in of_kind] or ["measured"]
        rows = [
            [t.what, _wanted(t), *([_cell(t, r) for r in of_kind] or [NOT_YET])]
            for t in TARGETS
            if t.kind == kind and t.in_readme >= in_readme
        ]
        parts.append(table([f"on a {title}", "target", *names], rows))
    return "\n\n".join(parts)


def _wanted(target: Target) -> str:
    if target.wanted is None:
        return "–"
    return ("≤ " if target.at_most else "≥ ") + f"{target.wanted:g}"


def _cell(target: Target, record: Record) -> str:
    if target.entry not in record["entries"]:
        return NOT_YET
    found = target.read(record["entries"][target.entry])
    cells = []
    for label, value, low, high in found:
        spread = "" if low == high else f" ({number(low)}–{number(high)})"
        missed = "" if target.met(value) else " **missed**"
        cells.append(f"{label} {number(value)}{spread}{missed}".strip())
    return "<br>".join(cells) or NOT_YET


def details(record: Record) -> str:
    """Everything else that a record says, section by section."""
    entries = record["entries"]
    parts = [_device(record), _runs(entries)]
    for name in ("paper-bf16", "paper-fp32"):
        if name in entries:
            parts += [_paper(name, entries[name]), roofline(entries[name])]
    parts += [_alternatives(name, entry) for name, entry in entries.items()]
    if record["device"]["kind"] == "cpu":
        parts.append(f"#### Equal accuracy: single functions\n\n{_micro(entries.get('micro', {}))}")
    for name, entry in entries.items():
        kind = name.partition("-")[0]
        if kind in OTHERS:
            parts.append(f"#### {name}\n\n{OTHERS[kind](entry)}")
    return "\n\n".join(part for part in parts if part)


def _device(record: Record) -> str:
    device = record["device"]
    facts = "; ".join(f"{k} {v}" for k, v in device.items() if k not in ("name", "flags"))
    return f"### {device['name']}\n\n{facts}. Vector instructions: {', '.join(device['flags'])}."


def _runs(entries: dict[str, Entry]) -> str:
    rows = []
    for name, entry in entries.items():
        run = entry["run"]
        commit = run["commit"][:10] + (" with changes" if run["dirty"] else "")
        versions = ", ".join(f"{k} {v or 'missing'}" for k, v in run["versions"].items())
        rows.append([name, commit, run["date"], run["threads"], run["tests"].strip("= "), versions])
    return table(["entry", "commit", "date", "threads", "tests before it", "versions"], rows)


def _paper(name: str, entry: Entry) -> str:
    rows = []
    for setting, part in entry["settings"].items():
        pairs, stages = part["pairs"], part["stages"]
        total = pairs["total"]
        counts = [f"{100 * pairs[k] / total:.1f} %" for k in ("bounded", "abandoned", "solved")]
        seconds = entry["times"][f"shear_ops, {setting}"]
        shares = ", ".join(
            f"{stage} {100 * t / stages['total']:.0f} %"
            for stage, t in stages.items() if stage != "total"
        )  # fmt: skip
        rows.append(
            [setting, _seconds(seconds), *counts, pairs["stopped"],
             f"{part['mean_iterations']:.0f}", f"{part['error']:.1e}", part["n_iters"], shares]
        )  # fmt: skip
    header = [
        "states", "seconds: median (min–max; runs)", "bounded away", "abandoned", "solved",
        "stopped", "iterations", "worst error", "n_iters", "share of the time per stage",
    ]  # fmt: skip
    size = entry["sizes"]
    title = f"#### {name}: {size['rollouts']} x {size['tokens']} x {size['dim']} {size['dtype']}"
    about = "\n".join(f"- {k}: {part['about']}." for k, part in entry["settings"].items())
    product = f"`torch.mm` of the same product: {_seconds(entry['times']['torch.mm'])} s."
    return f"{title}\n\n{about}\n\n{table(header, rows)}\n\n{product}"


def _seconds(time: Entry) -> str:
    spread = f"{number(time['min'])}–{number(time['max'])}; {time['repeats']}"
    return f"{number(time['median'])} ({spread})"


def roofline(entry: Entry) -> str:
    """Work of the product and of the solver of a paper group against the machine's peak."""
    if "peak" not in entry:
        return "Roofline: the ceilings of this device were not measured."
    size, peak = entry["sizes"], entry["peak"]
    tokens, dim, n = size["tokens"], size["dim"], size["span"]
    blocks = (size["rollouts"] // 2) * ((size["rollouts"] + 1) // 2)
    fma = blocks * tokens**2 * dim
    state_bytes = size["rollouts"] * tokens * dim * {"float32": 4}.get(size["dtype"], 2)
    cost_bytes = 4 * blocks * tokens**2
    floor = (state_bytes + cost_bytes) / peak["bytes_per_s"]
    rows = []
    for setting, part in entry["settings"].items():
        stages, solved = part["stages"], part["pairs"]["solved"]
        solver = 2 * n * n * part["mean_iterations"] * solved
        for stage, work, exps in (("token_costs", fma, 0), ("solve", solver, n * n * solved)):
            if seconds := stages.get(stage):
                rate = work / seconds
                best = peak["fma_per_s" if stage == "token_costs" else "float32_fma_per_s"]
                rows.append(
                    [f"{stage}, {setting}", number(work / 1e9), number(exps / 1e9),
                     number(seconds), number(rate / 1e9), f"{100 * rate / best:.0f} %"]
                )  # fmt: skip
    if not rows:
        return "Roofline: this build does not announce its stages."
    text = (
        f"Roofline: the product takes {2 * fma / 1e12:.2f} TFLOP ({blocks} blocks x {tokens} x "
        f"{tokens} x {dim} x 2), reads {state_bytes / 1e6:.0f} MB of states and writes "
        f"{cost_bytes / 1e6:.0f} MB of token costs. Ceilings here: "
        f"{number(peak['fma_per_s'] / 1e9)} GFMA/s (best {peak['mm']} `torch.mm`) and "
        f"{number(peak['bytes_per_s'] / 1e9)} GB/s (best copy): the product cannot take less than "
        f"{number(fma / peak['fma_per_s'])} s for its FMAs and {number(floor)} s for its bytes."
    )
    header = ["stage", "10^9 FMA", "10^9 exp, at least", "seconds", "GFMA/s", "of the peak"]
    return f"{text}\n\n{table(header, rows)}"


def _alternatives(name: str, entry: Entry) -> str:
    rows = []
    for label, part in [("", entry), *entry.get("settings", {}).items()]:
        if "alternatives" not in part:
            continue
        times = part.get("times", {})
        if "shear_ops" in times:
            own = f"n_iters={part['n_iters']}"
            rows.append([label, "shear_ops", own, f"{part['error']:.1e}",
                         _seconds(times["shear_ops"]), "1", "–"])  # fmt: skip
        for peer, facts in part["alternatives"].items():
            rows.append([label, peer, *_alternative(facts, times.get(peer))])
    if not rows:
        return ""
    header = ["states", "who", "setting", "worst error", "seconds: median (min–max; runs)",
              "over ours", "first call, s"]  # fmt: skip
    return f"#### Equal accuracy: {name}\n\n{table(header, rows)}"


def _alternative(facts: Entry, time: Entry | None) -> list[str]:
    if "missing" in facts:
        return [f"not installed ({facts['missing']})", "–", "–", "–", "–"]
    if "inaccurate" in facts:
        last = facts["tried"][-1]
        error = "not a number" if last["error"] is None else f"{last['error']:.1e}"
        why = f"none within the tolerance; the last one tried: {setting_text(last)}"
        return [why, error, f"{number(last['seconds'])} on the sample", "–", "–"]
    ratio = facts["over ours"]
    spread = f"{number(ratio['value'])} ({number(ratio['low'])}–{number(ratio['high'])})"
    seconds = _seconds(time or facts["scaled_s"])
    first = number(facts["first_call_s"])
    return [setting_text(facts["setting"]), f"{facts['error']:.1e}", seconds, spread, first]


def _micro(entry: Entry) -> str:
    rows = []
    for function, benchmarks in entry.get("functions", {}).items():
        ours = benchmarks[OURS]["time"]
        for who, facts in benchmarks.items():
            time = facts["time"]
            over = number(time["median"] / ours["median"])
            rows.append([f"`{function}`", who, setting_text(facts["setting"]),
                         f"{facts['error']:.1e}", _seconds(time), over])  # fmt: skip
    if not rows:
        return NOT_YET
    header = ["function", "who", "setting", "worst error", "seconds: median (min–max; runs)",
              "over ours"]  # fmt: skip
    return table(header, rows)


def setting_text(setting: dict[str, Any]) -> str:
    """Return a setting as arguments: max_iter=300, chunk=40."""
    shown = {k: v for k, v in setting.items() if k not in ("error", "seconds")}
    return ", ".join(f"{name}={value}" for name, value in shown.items())


def _survivors(entry: Entry) -> str:
    rows = []
    for row in entry["rows"]:
        shares = [
            f"{row[k]:,} ({100 * row[k] / max(row['total'], 1):.0f} %)"
            for k in ("bounded", "abandoned", "solved", "stopped")
        ]
        rows.append([row["span"], row["stride"], row["reg"], f"{row['total']:,}", *shares,
                     f"{row['mean_iterations']:.0f}"])  # fmt: skip
    header = ["span", "stride", "reg", "span pairs", "bounded away", "abandoned",
              "solved to the end", "of these stopped at n_iters", "iterations"]  # fmt: skip
    dim = f", d = {entry['dim']}" if "dim" in entry else ""
    about = f"{entry['rollouts']} recorded real rollouts, {entry['tokens']:,} tokens{dim}."
    if "encoder" in entry:
        pairs = entry["encoder"]
        parts = (f"{100 * pairs[k] / pairs['total']:.0f} % {k}" for k in pairs if k != "total")
        about += (
            f" States of a real encoder over text: {pairs['total']:,} span pairs, "
            f"{', '.join(parts)}."
        )
    return f"{about}\n\n{table(header, rows)}"


def rounding(entry: Entry) -> str:
    """Errors of span distances that rounding to int8 makes, by kind of states."""
    rows = [
        [row["states"], row["dim"], f"{row['worst']:.1e}", f"{row['mean']:.1e}",
         f"{100 * row['recomputed']:.2f} %", f"{row['after']:.1e}"]
        for row in entry["rows"]
    ]  # fmt: skip
    header = ["states", "d", "int8: worst", "mean", "entries recomputed", "after the second look"]
    about = (
        f"Errors of span distances relative to max(D, eps); {entry['pairs']} span pairs a group."
    )
    missing = "".join(f" Not installed: {name}." for name in entry["missing"])
    return f"{about}{missing}\n\n{table(header, rows)}"


def _solver(entry: Entry) -> str:
    return (
        f"One Sinkhorn iteration of one pair of spans of {entry['sizes']['span']} tokens takes "
        f"{number(1e9 * entry['iteration_s'])} ns where all of the device works on "
        f"{entry['sizes']['pairs']:,} pairs: {number(entry['multiply_adds_per_s'] / 1e9)} GFMA/s."
    )


def _ceilings(entry: Entry) -> str:
    rows = [[name, number(rate / 1e9)] for name, rate in entry["per_s"].items()]
    return table(["ceiling", "10^9 per second"], rows)


def _overhead(entry: Entry) -> str:
    size = entry["sizes"]
    share = number(100 * entry["share"]["value"])
    return (
        f"{size['groups']} groups of {size['rollouts']} x {size['tokens']} tokens take "
        f"{_seconds(entry['times']['shear_ops'])} s, {share} % of forward and backward of "
        f"{size['layers']} layers, of which one was measured: {_seconds(entry['step_s'])} s."
    )


OTHERS = {
    "survivors": _survivors, "rounding": rounding, "solver": _solver, "ceilings": _ceilings,
    "overhead": _overhead,
}  # fmt: skip


def short(record: Record) -> Iterator[tuple[str, str, str]]:
    """Lines of a short table for a terminal: what was measured, the number, and what it is."""
    for name, entry in record["entries"].items():
        if name.startswith("paper-bf16"):
            yield from _short_paper(name, entry)
        elif name.startswith("growth"):
            for series in ("tokens", "dim", "rollouts"):
                for point in entry.get(series, {}).get("points", []):
                    what = f"T={point['tokens']}, d={point['dim']}, G={point['rollouts']}"
                    yield name, f"{1e3 * point['time']['median']:.2f}", f"ms, {what}"
        elif name.startswith("ceilings"):
            for what, rate in entry["per_s"].items():
                yield name, f"{rate / 1e12:.2f}", f"10^12 per second, {what}"
        elif name.startswith("solver"):
            yield name, f"{1e9 * entry['iteration_s']:.2f}", "ns, one iteration of one span pair"
            rate = f"{entry['multiply_adds_per_s'] / 1e12:.2f}"
            yield name, rate, "10^12 multiply-adds per second, solver"
        elif name.startswith("overhead"):
            yield name, f"{100 * entry['share']['value']:.3f}", "% of a training step"
        elif name.startswith("survivors"):
            for row in entry["rows"]:
                what = f"% solved, span {row['span']}, stride {row['stride']}, reg {row['reg']}"
                yield name, f"{100 * row['solved'] / max(row['total'], 1):.2f}", what
        for setting, part in [("", entry), *entry.get("settings", {}).items()]:
            for peer, facts in part.get("alternatives", {}).items():
                if "over ours" in facts:
                    times = f"{facts['over ours']['value']:,.0f}"
                    yield f"{name} {setting}".strip(), times, f"times faster than {peer}"


def _short_paper(name: str, entry: Entry) -> Iterator[tuple[str, str, str]]:
    product = 1e3 * entry["times"]["torch.mm"]["median"]
    yield name, f"{product:.2f}", "ms, torch.mm of the same product"
    for setting, part in entry["settings"].items():
        label, pairs, stages = f"{name} {setting}", part["pairs"], part["stages"]
        ours = 1e3 * entry["times"][f"shear_ops, {setting}"]["median"]
        yield label, f"{ours:.2f}", "ms, span_weights"
        yield label, f"{part['over torch.mm']['value']:.2f}", "times torch.mm"
        for stage, seconds in stages.items():
            yield label, f"{1e3 * seconds:.3f}", f"ms, {stage}"
        if stages.get("solve"):
            rate = pairs["total"] / stages["solve"] / 1e6
            yield label, f"{rate:.1f}", "pairs per microsecond of the solver's stage"
        for kind in ("bounded", "abandoned", "solved", "stopped"):
            yield label, f"{100 * pairs[kind] / pairs['total']:.2f}", f"% of the pairs {kind}"
        if "workspace_bytes" in part:
            yield label, f"{part['workspace_bytes'] / 2**20:.0f}", "MiB, peak beyond the inputs"
        yield label, f"{part['error']:.1e}", "worst error against float64"
