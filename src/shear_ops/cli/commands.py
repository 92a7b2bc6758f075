"""The commands demo, score and info."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from .. import build_info, cpu_isa
from ..config import CHOICES, SpanConfig
from ..ops import backends
from .report import html_report
from .rollouts import Rollouts, check_output, load_rollouts, save_scores, shipped_rollouts
from .summary import reference_check, score_rollouts, shown_rollout, summarize
from .terminal import print_summary

EXTRAS = ("click", "rich", "safetensors", "matplotlib", "pot")
NUMBERS = {"span": int, "stride": int, "reg": float, "n_iters": int, "tol": float}
DEFAULTS = SpanConfig()
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
    return click.option("--json", "as_json", is_flag=True, help="Print JSON only.")(command)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(build_info()["version"], prog_name="shear-ops")
def commands() -> None:
    """Token-level credit for GRPO from hidden states (SHEAR, arXiv 2604.23318)."""


@commands.command()
@method_options
@click.option(
    "--report",
    type=click.Path(path_type=Path),
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
    _run(load_rollouts(shipped_rollouts()), options, report, reference)


@commands.command()
@click.argument("file", type=click.Path(path_type=Path))
@method_options
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Weights to write.  [default: FILE with .weights.safetensors]",
)
@click.option(
    "--report",
    type=click.Path(path_type=Path),
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
    out = out or file.with_suffix(".weights.safetensors")
    if out.resolve() == file.resolve():
        raise click.UsageError(f"--out is the input file {file}")
    if report is not None and report.resolve() in (file.resolve(), out.resolve()):
        raise click.UsageError(f"--report is the input file, or --out: {report}")
    check_output(out)
    _run(load_rollouts(file), options, report, reference, out)


@commands.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON only.")
def info(as_json: bool) -> None:
    """Show versions, instruction sets and backends, and why one is missing.

    Example: shear-ops info --json
    """
    facts = _facts()
    if as_json:
        click.echo(json.dumps(facts, indent=1))
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
    rollouts: Rollouts,
    options: dict[str, Any],
    report: Path | None,
    reference: bool,
    out: Path | None = None,
) -> None:
    """Score, write what was asked for, and print last: a closed pipe loses nothing."""
    as_json, backend = options.pop("as_json"), options.pop("backend")
    shown = shown_rollout(rollouts, options.pop("rollout"))
    config = SpanConfig(**options)
    if report is not None:
        check_output(report)
    written = {}
    with _progress(quiet=as_json) as bar:
        task = bar.add_task("scoring", total=2 + reference)
        scores = score_rollouts(rollouts, config, backend)
        bar.update(task, advance=1, description="float64 reference on one group")
        check = reference_check(scores) if reference else None
        bar.update(task, advance=int(reference), description="report")
        summary = summarize(scores, check)
        if report is not None and len(rollouts):
            report.write_text(html_report(scores, summary, shown), encoding="utf-8")
            written["report"] = str(report)
        if out is not None:
            save_scores(out, rollouts, scores.weights, scores.found)
            written["weights"] = str(out)
    summary["written"] = written
    if as_json:
        click.echo(json.dumps(summary, indent=1))
    else:
        print_summary(Console(), scores, summary, shown)


def _progress(quiet: bool) -> Progress:
    console = Console(stderr=True, quiet=quiet)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
