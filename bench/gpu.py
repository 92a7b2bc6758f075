"""A short table of what a record of a GPU says: python -m bench.gpu RECORD."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click

from .contest import Entry
from .record import Record, load


def rows(record: Record) -> Iterator[tuple[str, str, str]]:
    """What was measured, the number, and what it is a number of."""
    for name, entry in record["entries"].items():
        if name.startswith("paper-bf16"):
            yield from _paper(name, entry)
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


def _paper(name: str, entry: Entry) -> Iterator[tuple[str, str, str]]:
    product = 1e3 * entry["times"]["torch.mm"]["median"]
    yield name, f"{product:.2f}", "ms, torch.mm of the same product"
    for setting, part in entry["settings"].items():
        label, pairs, stages = f"{name} {setting}", part["pairs"], part["stages"]
        ours = 1e3 * entry["times"][f"shear_ops, {setting}"]["median"]
        yield label, f"{ours:.2f}", "ms, span_weights"
        yield (
            label,
            f"{part['over torch.mm']['value']:.2f}",
            "times torch.mm (Triton's target: 4)",
        )
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


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("record", type=click.Path(path_type=Path, exists=True, dir_okay=False))
def main(record: Path) -> None:
    """Print the measurements of a GPU that a RECORD of bench.run holds.

    Example: python -m bench.gpu bench/results/nvidia-h200.json
    """
    content = load(record)
    click.echo(content["device"]["name"])
    for entry, measured, what in rows(content):
        click.echo(f"{entry}: {measured} {what}")


if __name__ == "__main__":
    main()
