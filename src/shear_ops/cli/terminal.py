"""What demo and score print."""

from __future__ import annotations

from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .output import escaped
from .summary import Scores, cell, shade, top_weight, verdict

MOST_GROUPS = 200  # rows of the table: rich lays out every cell, and nobody reads them


def print_summary(console: Console, scores: Scores, summary: dict[str, Any], shown: int) -> None:
    """Print a rollout as coloured text, the groups, the counts and the AUC."""
    rollouts = scores.rollouts
    if len(rollouts):
        console.print(_colored(scores, shown))
        table = Table(
            box=SIMPLE,
            padding=0,  # the box has a space between columns
            title="groups: token weights, AUC of the first wrong step",
        )
        columns = [name for name in summary["groups"][0] if name != "rollouts"]  # fits 80 columns
        for name in columns:
            table.add_column(name, justify="right", no_wrap=True)
        for row in summary["groups"][:MOST_GROUPS]:
            table.add_row(*(cell(row[name]) for name in columns))
        console.print(table)
        more = len(summary["groups"]) - MOST_GROUPS
        if more > 0:
            console.print(f"... and {more:,} more groups: --json and the report have all")
    else:
        console.print("The file has no rollouts.")
    pairs = summary["pairs"]
    console.print(
        f"{summary['tokens']:,} tokens in {1000 * summary['seconds']:.0f} ms. "
        f"Span pairs: {pairs['total']:,} total, {pairs['bounded']:,} bounded away, "
        f"{pairs['abandoned']:,} abandoned, {pairs['solved']:,} solved "
        f"({pairs['stopped']:,} stopped at n_iters)."
    )
    console.print(verdict(summary))
    weights = summary["auc"]["weights"]
    if weights["rollouts"]:
        console.print(
            f"Mean over {weights['rollouts']} incorrect rollouts: {weights['mean']:.3f}; "
            f"{weights['left_out']} left out (first wrong step unknown or at the start)."
        )
    check = summary["auc"]["reference"]
    if check is not None:
        both = [check["auc"], check["auc_backend"]]
        of_reference, here = ("none" if v is None else f"{v:.3f}" for v in both)
        console.print(
            f"Float64 reference on group {check['group']} ({check['seconds']:.1f} s): AUC "
            f"{of_reference}, here {here}; largest difference of a weight "
            f"{check['largest_difference']:.1e}."
        )
    for what, path in summary["written"].items():
        console.print(f"{what}: {escaped(path)}", soft_wrap=True)


def _colored(scores: Scores, rollout: int) -> Text:
    """A rollout as text on a background from white (weight 0) to red, its first mistake marked."""
    rollouts = scores.rollouts
    own = scores.weights_of(rollout)
    top = top_weight(own)
    first = rollouts.first_wrong_of(rollout)
    group, label = int(rollouts.group_ids[rollout]), rollouts.label_of(rollout)
    out = Text(f"rollout {rollout} of group {group}, {label}; ")
    out.append("weight 0", style="black on rgb(255,255,255)")
    out.append(f" to {top:.2f}", style="black on rgb(214,40,40)")
    out.append("; ▶ marks the first wrong step\n" if first >= 0 else "\n")
    for t, (text, weight) in enumerate(zip(rollouts.text_of(rollout), own.tolist(), strict=True)):
        share = shade(weight, top)
        color = f"rgb({255 - 41 * share:.0f},{255 - 215 * share:.0f},{255 - 215 * share:.0f})"
        if t == first:
            out.append("▶", style="bold white on blue")
        out.append(text, style=f"black on {color}")
    out.append("\n")
    return out
