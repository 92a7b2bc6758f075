"""The commands demo, score, plan and info."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from .. import build_info, cpu_isa, plan
from ..config import CHOICES, SpanConfig, check_count
from ..ops import backends
from .output import check_output, escaped, same_file, write_output
from .report import html_report
from .rollouts import load_rollouts, save_scores, shipped_rollouts
from .summary import reference_check, score_rollouts, shown_rollout, summarize
from .terminal import print_summary

EXTRAS = ("click", "rich", "safetensors", "matplotlib", "pot")
NUMBERS = {"span": int, "stride": int, "reg": float, "n_iters": int, "tol": float}
DTYPES = ("float32", "float16", "bfloat16")
DEFAULTS = SpanConfig()
OUTPUT = click.Path(readable=False, path_type=Path)  # nobody needs to read what is there
HELP = {
    "span": "Tokens per span.",
    "stride": "Tokens from one span to the next, at most span.",
    "reg": "Entropic regularisation, in the unit of --reg-unit.",
    "reg_unit": "The mean norm of the group, or the cost itself.",
    "n_iters": "Most Sinkhorn iterations per span pair.",
    "tol": "Marginal error at which a span pair stops.",
    "distance": "Between two spans; exact needs POT and --backend reference.",
    "normalization": "Divide by the mean norm of the group or of the rollout.",
    "pooling": "Of the spans that cover a token.",
    "aggregation": "Over the spans of the rollouts with the opposite outcome.",
}

Command = Callable[..., Any]


def method_options(command: Command) -> Command:
    """Add one option per parameter of the method, and those that demo and score share."""
    for name in reversed([*NUMBERS, *CHOICES]):
        command = click.option(
            f"--{name.replace('_', '-')}",
            name,
            default=getattr(DEFAULTS, name),
            type=NUMBERS.get(name) or click.Choice(CHOICES[name]),
            show_default=True,
            help=HELP[name],
        )(command)
    command = click.option(
        "--backend",
        type=click.Choice(list(backends.status())),
        help="Default: the best one available.",
    )(command)
    command = click.option("--rollout", type=int, help="Index of the rollout to print.")(command)
    help_json = "Print JSON only; a number that is NaN or infinite is null."
    return click.option("--json", "as_json", is_flag=True, help=help_json)(command)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(build_info()["version"], prog_name="shear-ops")
def commands() -> None:
    """Token-level credit for GRPO from hidden states (SHEAR, arXiv 2604.23318)."""


@commands.command()
@method_options
@click.option(
    "--report",
    type=OUTPUT,
    default="shear-report.html",
    show_default=True,
    help="HTML report to write.",
)
@click.option(
    "--reference/--no-reference",
    default=True,
    show_default=True,
    help="Also run the float64 reference on one group (about 20 s).",
)
def demo(report: Path, reference: bool, **options: Any) -> None:
    """Score the recorded arithmetic rollouts that come with the package.

    Example: shear-ops demo --span 25 --stride 10
    """
    _run(shipped_rollouts(), options, report, reference)


@commands.command()
@click.argument("file", type=click.Path(path_type=Path))
@method_options
@click.option(
    "--out",
    type=OUTPUT,
    help="Weights to write.  [default: FILE with .weights.safetensors]",
)
@click.option(
    "--report",
    type=OUTPUT,
    help="HTML report to write: a group's rollouts coloured by token weight, and all tables.",
)
@click.option(
    "--reference/--no-reference",
    default=False,
    show_default=True,
    help="Also run the float64 reference on one group (slow on long rollouts).",
)
def score(
    file: Path, out: Path | None, report: Path | None, reference: bool, **options: Any
) -> None:
    """Score your own rollouts, from a safetensors FILE.

    It holds hidden (N, d) and cu_seqlens (B + 1), or hidden (B, T, d) and mask (B, T) of 0 or 1;
    group_ids (B); labels (B): 1 correct, 0 incorrect, -1 ignored. hidden is float32, float16 or
    bfloat16, the others are integers. Optional: tokens (N) or (B, T), ids of the texts to print;
    first_wrong (B), position of the first wrong token in each rollout, -1 if unknown; and the
    metadata vocabulary and prompts (JSON lists of strings) and source (a line about the file).

    Example: shear-ops score rollouts.safetensors --report report.html
    """
    out = out or file.parent / f"{file.stem}.weights.safetensors"
    _run(file, options, report, reference, out)


@commands.command("plan")
@click.option("--groups", default=64, show_default=True, help="Groups of a training step.")
@click.option("--rollouts", default=8, show_default=True, help="Rollouts of a group.")
@click.option("--tokens", default=3000, show_default=True, help="Tokens of a rollout.")
@click.option("--dim", default=3584, show_default=True, help="Hidden dimension of the model.")
@click.option(
    "--dtype", type=click.Choice(DTYPES), default="bfloat16", show_default=True, help="Of states."
)
@click.option("--span", default=DEFAULTS.span, show_default=True, help=HELP["span"])
@click.option("--stride", default=DEFAULTS.stride, show_default=True, help=HELP["stride"])
@click.option("--json", "as_json", is_flag=True, help="Print JSON only.")
def plan_step(
    groups: int,
    rollouts: int,
    tokens: int,
    dim: int,
    dtype: str,
    span: int,
    stride: int,
    as_json: bool,
) -> None:
    """Say how much memory a training step takes, before it is made.

    For groups whose rollouts are half correct, on one process; on several, those that a rank has.
    The workspace is that of the CPU backend; that of a GPU is at most 1.125 GiB.

    Example: shear-ops plan --groups 64 --tokens 8000 --dim 4096
    """
    for name, count in (("--groups", groups), ("--rollouts", rollouts), ("--tokens", tokens)):
        check_count(name, count)
    total = groups * rollouts
    check_count("--groups times --rollouts times --tokens", total * tokens)
    found = plan(
        range(0, total * tokens + 1, tokens),
        group_ids=[i // rollouts for i in range(total)],
        labels=[i % 2 for i in range(total)],
        dim=dim,
        dtype=getattr(torch, dtype),
        config=SpanConfig(span=span, stride=stride),
    )
    needed = {
        "states": found.states_bytes,
        "regrouping": found.regrouping_bytes,
        "workspace": found.group_workspace_bytes,
    }
    needed["peak"] = sum(needed.values())
    if as_json:
        _print_json({"bytes": needed, "plan": found._asdict()})
        return
    what = {
        "states": "of all groups: HiddenBank; with group_size those of incomplete groups only",
        "regrouping": "one group at a time; several ranks exchange pieces of 64 MiB beside it",
        "workspace": f"of a group, on the CPU with {torch.get_num_threads()} threads",
        "peak": f"of {found.mixed_groups} groups, {found.spans} spans, {found.pairs} span pairs",
    }
    for name, size in needed.items():
        click.echo(f"{name:<10} {size / 2**20:>12,.1f} MiB  {what[name]}")


@commands.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON only.")
def info(as_json: bool) -> None:
    """Show versions, instruction sets and backends, and why one is missing.

    Example: shear-ops info --json
    """
    facts = _facts()
    if as_json:
        _print_json(facts)
        return
    for name, value in facts.items():
        click.echo(f"{name}:" + ("" if isinstance(value, dict) else f" {value}"))
        if isinstance(value, dict):
            for key, text in value.items():
                click.echo(f"  {key}: {text}")


def _facts() -> dict[str, Any]:
    def version(package: str) -> str:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return "not installed"

    build = build_info()
    supported = build.pop("instruction_sets")
    return {
        "shear_ops": build.pop("version"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch CUDA": torch.version.cuda or "CPU build",
        "threads": torch.get_num_threads(),
        "instruction set": cpu_isa(),
        "instruction sets": {
            k: "supported" if v else "not on this CPU" for k, v in supported.items()
        },
        "build": build,
        "backends": {name: why or "available" for name, why in backends.status().items()},
        "extras": {name: version(name) for name in EXTRAS},
    }


def _run(
    file: Path,
    options: dict[str, Any],
    report: Path | None,
    reference: bool,
    out: Path | None = None,
) -> None:
    """Score, write what was asked for, and print last: a closed pipe loses nothing."""
    as_json, backend = options.pop("as_json"), options.pop("backend")
    _check_outputs(file, report, out)
    rollouts = load_rollouts(file)
    shown = shown_rollout(rollouts, options.pop("rollout"))
    config = SpanConfig(**options)
    written = {}
    with _progress(quiet=as_json) as bar:
        task = bar.add_task("scoring", total=2 + reference)
        scores = score_rollouts(rollouts, config, backend)
        bar.update(task, advance=1, description="float64 reference on one group")
        check = reference_check(scores) if reference else None
        bar.update(task, advance=int(reference), description="report")
        summary = summarize(scores, check)
        if report is not None:
            write_output(report, html_report(scores, summary, shown).encode())
            written["report"] = click.format_filename(report)
        if out is not None:
            save_scores(out, rollouts, scores.weights, scores.found)
            written["weights"] = click.format_filename(out)
    summary["written"] = written
    if as_json:
        _print_json(summary)
    else:
        # texts and paths are others' words: no markup
        print_summary(Console(markup=False, emoji=False), scores, summary, shown)


def _check_outputs(file: Path, report: Path | None, out: Path | None) -> None:
    """Raise before any work unless both can be written and overwrite nothing that is needed."""
    seen = {"the input file": file}
    for option, path in (("--out", out), ("--report", report)):
        if path is None:
            continue
        if str(path) == "-":
            raise ValueError(f"{option} must be the path of a file, got '-': stdout has the text")
        for name, other in seen.items():
            if same_file(path, other):
                raise ValueError(f"{option} is {name}: {escaped(path)}")
        check_output(path)
        seen[option] = path


def _print_json(value: dict[str, Any]) -> None:
    click.echo(json.dumps(finite(value), indent=1, allow_nan=False))


def finite(value: Any) -> Any:
    """Return plain data with null for NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(v) for key, v in value.items()}
    if isinstance(value, list):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _progress(quiet: bool) -> Progress:
    console = Console(stderr=True, quiet=quiet)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
