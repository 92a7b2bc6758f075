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

from . import backends, build_info, cpu_isa
from .config import CHOICES, SpanConfig
from .report import html_report
from .rollouts import Rollouts, check_output, load_rollouts, save_scores, shipped_rollouts
from .summary import Scores, reference_check, score_rollouts, shown_rollout, summarize
from .terminal import print_summary

EXTRAS = ("click", "rich", "safetensors", "matplotlib", "pot")
NUMBERS = {"span": int, "stride": int, "reg": float, "n_iters": int, "tol": float}
DEFAULTS = SpanConfig()

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
@click.option("--report", type=click.Path(path_type=Path), help="HTML report to write.")
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

    It holds hidden (N, d) and cu_seqlens (B + 1), or hidden (B, T, d) and mask (B, T);
    group_ids (B); labels (B): 1 correct, 0 incorrect, -1 ignored. Optional: tokens,
    first_wrong (position of the first wrong token in each rollout, -1 if unknown), and the
    metadata vocabulary (JSON list of strings).

    Example: shear-ops score rollouts.safetensors --report report.html
    """
    out = out or file.with_suffix(".weights.safetensors")
    if out.resolve() == file.resolve():
        raise click.UsageError(f"--out is the input file {file}")
    check_output(out)
    rollouts = load_rollouts(file)
    scores = _run(rollouts, options, report, reference, {"weights": str(out)})
    save_scores(out, rollouts, scores.weights, scores.found)


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
    written: dict[str, str] | None = None,
) -> Scores:
    as_json, backend = options.pop("as_json"), options.pop("backend")
    shown = shown_rollout(rollouts, options.pop("rollout"))
    config = SpanConfig(**options)
    if report is not None:
        check_output(report)
    written = dict(written or {})
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
    summary["written"] = written
    if as_json:
        click.echo(json.dumps(summary, indent=1))
    else:
        print_summary(Console(), scores, summary, shown)
    return scores


def _progress(quiet: bool) -> Progress:
    console = Console(stderr=True, quiet=quiet)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
