"""Command line that writes tables and plots from the records: python -m bench.report --help."""

from __future__ import annotations

import re
from pathlib import Path

import click

from .plots import draw
from .record import RESULTS, ROOT, Record, load, load_all
from .tables import NOT_YET, details, rounding, short, targets

MARKS = "<!-- bench:begin -->\n", "<!-- bench:end -->"


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--check", is_flag=True, help="Write nothing; fail if a table is out of date.")
@click.option(
    "--short",
    "record",
    metavar="RECORD",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Write nothing; print what this record says, line by line.",
)
def main(check: bool, record: Path | None) -> None:
    """Write the tables in README.md, bench/README.md and docs/numerics.md, and the plots.

    Uses every record in bench/results. What no record holds reads "not measured yet".

    Example: python -m bench.report --short bench/results/nvidia-h200.json
    """
    if record is not None:
        content = load(record)
        click.echo(content["device"]["name"])
        for entry, measured, what in short(content):
            click.echo(f"{entry}: {measured} {what}")
        return
    records = load_all()
    refuse_quick(records)
    for path, block in (
        (ROOT / "README.md", readme_block(records)),
        (ROOT / "bench" / "README.md", details_block(records)),
        (ROOT / "docs" / "numerics.md", rounding_block(records)),
    ):
        old = path.read_text()
        new = put_block(old, block)
        if check and new != old:
            raise click.ClickException(f"{path.name} is out of date: run python -m bench.report")
        if not check:
            path.write_text(new)
    if not check:
        for name, each in records.items():
            draw(name, each, RESULTS)


def refuse_quick(records: dict[str, Record]) -> None:
    """Raise if a record holds an entry of a --quick run."""
    for name, record in records.items():
        for entry, content in record["entries"].items():
            if content["run"]["quick"]:
                raise click.ClickException(f"{name}.json: {entry} was measured with --quick")


def readme_block(records: dict[str, Record]) -> str:
    """Some targets and one plot, for the README."""
    plots = [plot for name, r in records.items() for plot in plot_links(name, r, "bench/results")]
    return "\n\n".join([targets(records, in_readme=True), *plots[:1]])


def plot_links(name: str, record: Record, folder: str) -> list[str]:
    """Return Markdown that shows the plots of a record."""
    device = record["device"]["name"]
    return [f"![{plot} on {device}]({folder}/{name}-{plot}.svg)" for plot in plots_of(record)]


def plots_of(record: Record) -> list[str]:
    """Names of the plots that draw makes of a record."""
    entries = record["entries"]
    needs = {
        "speedups": {"sinkhorn", "small", "paper-bf16"},
        "stages": {"paper-bf16", "paper-fp32"},
        "growth": {"growth"},
    }
    return [plot for plot, any_of in needs.items() if any_of & entries.keys()]


def details_block(records: dict[str, Record]) -> str:
    """All that the records say, for bench/README.md."""
    plots = [" ".join(plot_links(name, record, "results")) for name, record in records.items()]
    parts = [targets(records), *plots, *(details(record) for record in records.values())]
    return "\n\n".join(part for part in parts if part)


def rounding_block(records: dict[str, Record]) -> str:
    """The latest errors of int8 rows, for docs/numerics.md: they depend on no device."""
    found = [r["entries"]["rounding"] for r in records.values() if "rounding" in r["entries"]]
    return rounding(max(found, key=lambda entry: entry["run"]["date"])) if found else NOT_YET


def put_block(text: str, block: str) -> str:
    """Replace what is between the marks; raise if they are not there exactly once."""
    begin, end = MARKS
    new, count = re.subn(
        f"(?s){re.escape(begin)}.*?{re.escape(end)}", lambda _: f"{begin}{block}\n{end}", text
    )
    if count != 1:
        raise click.ClickException(f"the marks {begin.strip()} {end} are there {count} times")
    return new


if __name__ == "__main__":
    main()
