"""Command line that measures and records: python -m bench.run --help."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import click
import torch
from rich.console import Console
from rich.table import Table

from shear_ops.ops import backends

from .contest import Entry
from .measure import ENTRIES
from .record import RESULTS, ROOT, device_facts, run_facts, save, slug
from .sizes import GPU, GPU_QUICK, QUICK, Sizes

# What is measured has to be right: all of `sinkhorn`, and the group operators against float64 in
# the dtypes that are measured.
TESTS = (
    "tests/test_sinkhorn.py", "tests/test_backends.py",
    "-k", "test_sinkhorn or (against_float64 and (float32 or bfloat16))",
)  # fmt: skip
NOT_ON_GPU = {"paper-fp32", "threads", "micro"}
ON_GPU_ONLY = {"ceilings", "overhead"}
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
@click.option(
    "--device",
    type=click.Choice(["cpu", "cuda"]),
    default="cpu",
    show_default=True,
    help="Where to measure; on cuda, without --only, what makes sense on a GPU.",
)
@click.option(
    "--backend",
    type=click.Choice(["cpu", "cuda", "triton"]),
    help="Backend to measure; entries of one that is not the default of the device are recorded as "
    "NAME-BACKEND.  [default: that of the device]",
)
@click.option(
    "--rollouts",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Rollout file of the entry survivors, which is recorded as survivors-FILE.  "
    "[default: the file that comes with the package]",
)
@click.option("--no-tests", is_flag=True, help="They have just passed.")
def main(
    only: tuple[str, ...],
    quick: bool,
    out: Path | None,
    device: str,
    backend: str | None,
    rollouts: Path | None,
    no_tests: bool,
) -> None:
    """Measure shear_ops on this machine and write the record.

    Runs the correctness tests first, and measures nothing if one fails. Measures the installed
    package: `make bench` installs the checkout, runs this and then python -m bench.report. The
    number of threads is torch's (OMP_NUM_THREADS); leave the machine alone meanwhile.

    Example: python -m bench.run --only sinkhorn --only growth
    """
    where = torch.device(device)
    facts_of_device = device_facts(where)
    if quick and out is not None and out.resolve().is_relative_to(RESULTS.resolve()):
        raise click.UsageError("--quick measures nothing worth keeping: give an --out elsewhere")
    if not quick and out is None:
        out = RESULTS / f"{slug(facts_of_device)}.json"
    tests = "before this command" if no_tests else check_tests(QUICK_TESTS if quick else TESTS)
    facts = run_facts(tests) | {"quick": quick}
    console.print(f"{facts_of_device['name']}, {torch.get_num_threads()} threads; {facts['tests']}")
    on_gpu = device != "cpu" or backend == "triton"
    sizes = (GPU_QUICK if quick else GPU) if on_gpu else (QUICK if quick else Sizes())
    sizes = replace(sizes, backend=backend, rollouts=rollouts)
    torch.set_default_device(where)
    own = backend in (None, "cpu" if device == "cpu" else backends.on_gpu())
    left_out = NOT_ON_GPU if on_gpu else ON_GPU_ONLY
    for name in only or (name for name in ENTRIES if name not in left_out):
        begin = time.perf_counter()
        entry = {"run": facts, **ENTRIES[name](sizes)}
        console.print(f"[bold]{name}[/bold], {time.perf_counter() - begin:.0f} s")
        show(entry)
        if rollouts is not None and name == "survivors":
            name = f"{name}-{rollouts.stem}"
        if out is not None:
            save(out, facts_of_device, name if own else f"{name}-{backend}", entry)
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
