"""Command line that measures and records: python -m bench.run --help."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import click
import torch
from rich.console import Console
from rich.table import Table

from .contest import Entry
from .measure import ENTRIES, QUICK, Sizes
from .record import RESULTS, ROOT, device_facts, run_facts, save, slug

# What is measured has to be right: all of `sinkhorn`, and the group operators against float64 in
# the dtypes that are measured.
TESTS = (
    "tests/test_sinkhorn.py", "tests/test_backends.py",
    "-k", "test_sinkhorn or (against_float64 and (float32 or bfloat16))",
)  # fmt: skip
QUICK_TESTS = ("tests/test_sinkhorn.py", "-k", "not pot")

console = Console()


@click.command(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Entries: " + "; ".join(f"{name}: {f.__doc__}" for name, f in ENTRIES.items()),
)
@click.option(
    "--only",
    multiple=True,
    metavar="NAME",
    type=click.Choice(list(ENTRIES)),
    help="Measure this entry only; may be given more than once.  [default: all]",
)
@click.option(
    "--quick",
    is_flag=True,
    help="Tiny sizes, to see that everything runs: the numbers mean nothing and are kept out of "
    "bench/results/.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Record to write; its entries are replaced one by one.  "
    "[default: bench/results/DEVICE.json; with --quick none]",
)
def main(only: tuple[str, ...], quick: bool, out: Path | None) -> None:
    """Measure shear_ops on this machine and write the record.

    Runs the correctness tests first, and measures nothing if one fails. Measures the installed
    package: `make bench` installs the checkout, runs this and then python -m bench.report. The
    number of threads is torch's (OMP_NUM_THREADS); leave the machine alone meanwhile.

    Example: python -m bench.run --only sinkhorn --only growth
    """
    device = device_facts()
    if quick and out is not None and out.resolve().is_relative_to(RESULTS.resolve()):
        raise click.UsageError("--quick measures nothing worth keeping: give an --out elsewhere")
    if not quick and out is None:
        out = RESULTS / f"{slug(device)}.json"
    facts = run_facts(check_tests(QUICK_TESTS if quick else TESTS)) | {"quick": quick}
    console.print(f"{device['name']}, {torch.get_num_threads()} threads; {facts['tests']}")
    for name in only or ENTRIES:
        begin = time.perf_counter()
        entry = {"run": facts, **ENTRIES[name](QUICK if quick else Sizes())}
        console.print(f"[bold]{name}[/bold], {time.perf_counter() - begin:.0f} s")
        show(entry)
        if out is not None:
            save(out, device, name, entry)
    if out is not None:
        console.print(f"written: {out}", soft_wrap=True)


def check_tests(selection: tuple[str, ...]) -> str:
    """Run these tests and return pytest's last line; end the program if they are not green."""
    with console.status("running the tests of what is measured"):
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", *selection],
            cwd=ROOT, capture_output=True, text=True,
        )  # fmt: skip
    if done.returncode != 0:
        console.print(done.stdout[-3000:] + done.stderr[-1000:], markup=False, highlight=False)
        raise click.ClickException("the tests fail, so nothing is measured")
    return done.stdout.strip().splitlines()[-1]


def show(entry: Entry) -> None:
    """Print the times of an entry, those of its settings included."""
    table = Table("", "min s", "median s", "max s", "runs", box=None, padding=(0, 2, 0, 0))
    for part, label in [(entry, ""), *((v, k) for k, v in entry.get("settings", {}).items())]:
        for name, s in part.get("times", {}).items():
            numbers = [f"{s[key]:.4g}" for key in ("min", "median", "max", "repeats")]
            table.add_row(f"{name}, {label}" if label else name, *numbers)
    if table.row_count:
        console.print(table)


if __name__ == "__main__":
    main()
