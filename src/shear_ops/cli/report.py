"""The HTML report: one self-contained file with token heat-maps and the span-by-span matrix."""

from __future__ import annotations

import base64
import html
import io
from collections import Counter
from typing import Any

import torch
from torch import Tensor

from ..ops.api import pair_distances
from .summary import Scores, cell, shade, top_weight, verdict

MATRIX_TOKENS = 4096  # of each rollout: the matrix solves all pairs, nothing bounds them away

_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h2 { margin: 2.5rem 0 .5rem; }
h3 { margin: 1.5rem 0 .4rem; font-size: 1rem; }
.muted { opacity: .75; overflow-wrap: anywhere; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(13rem, 1fr));
  gap: 1rem; margin: 1.5rem 0; }
.figures div { border: 1px solid #8886; border-radius: .5rem; padding: .6rem .9rem; }
.figures b { display: block; font-size: 1.6rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .7rem; text-align: right; border-bottom: 1px solid #8884; }
.rollout { font: 14px/1.9 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere;
  border: 1px solid #8886; padding: .7rem; border-radius: .5rem; }
.rollout span { padding: .15rem 0; }
.wrong { outline: 2px solid #29f; outline-offset: 1px; border-radius: 1px; }
.scale { display: inline-block; width: 12rem; height: .9rem; vertical-align: middle;
  background: linear-gradient(90deg, rgb(220 40 40/0), rgb(220 40 40/.8));
  border: 1px solid #8886; }
img { max-width: 100%; }
"""


def html_report(scores: Scores, summary: dict[str, Any], rollout: int) -> str:
    """Return the report as text: figures, groups, the rollouts of one group, and one matrix."""
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
        "<meta name='viewport' content='width=device-width'>",
        f"<title>shear_ops report</title><style>{_STYLE}</style></head>",
        f"<body><h1>Token weights</h1><p class='muted'>{_description(summary)}</p>",
        _figures(summary),
        f"<p>{html.escape(verdict(summary))} {_reference(summary)}</p>",
        *(_groups(scores, summary, rollout) if len(scores.rollouts) else ["<p>No rollouts.</p>"]),
        "</body></html>",
    ]
    return "\n".join(parts)


def _groups(scores: Scores, summary: dict[str, Any], rollout: int) -> list[str]:
    rollouts = scores.rollouts
    own = int(rollouts.group_ids[rollout])
    members = sorted(rollouts.members_of(own), key=lambda i: i != rollout)  # the chosen one first
    top = top_weight(torch.cat([scores.weights_of(i) for i in members]))
    prompts = {rollouts.prompts[i] for i in members} if rollouts.prompts else set()
    common = prompts.pop() if len(prompts) == 1 else ""
    return [
        "<h2>Groups</h2><p class='muted'>mean, p95 and max of the token weights; stopped: spans "
        "whose nearest pair n_iters stopped before it converged; auc: how well weights separate "
        "tokens from the first wrong step on from tokens before it.</p>",
        _table(summary["groups"]),
        f"<h2>Group {own}</h2>",
        f"<p class='muted'>Prompt: {html.escape(common)}</p>" if common else "",
        f"<p>Token weight: 0 <span class='scale'></span> {top:.2f}; point at a token for its "
        "value. <span class='wrong'>Outlined</span>: first wrong step.</p>",
        *(_heat_map(scores, i, top, with_prompt=not common) for i in members),
        _matrix(scores, rollout),
    ]


def _description(summary: dict[str, Any]) -> str:
    shape = (
        f"{summary['rollouts']} rollouts, {summary['tokens']:,} tokens, "
        f"d = {summary['dim']}, {summary['dtype']}"
    )
    config = ", ".join(f"{k} {v}" for k, v in summary["config"].items() if k != "check_finite")
    return "<br>".join(html.escape(line) for line in (summary["source"], shape, config) if line)


def _figures(summary: dict[str, Any]) -> str:
    weights, uniform, pairs = summary["auc"]["weights"], summary["auc"]["uniform"], summary["pairs"]
    skipped = pairs["bounded"] + pairs["abandoned"]
    figures = {
        "AUC, all tokens pooled": cell(weights["pooled"]),
        f"AUC, mean of {weights['rollouts']} rollouts": cell(weights["mean"]),
        "AUC of uniform weights": cell(uniform["pooled"]),
        "time of span_weights": f"{1000 * summary['seconds']:,.0f} ms",
        "span pairs": f"{pairs['total']:,}",
        "of them bounded away or abandoned": f"{100 * skipped / max(1, pairs['total']):.1f} %",
        "solved": f"{pairs['solved']:,}",
        "of those stopped at n_iters": f"{pairs['stopped']:,}",
    }
    cells = (f"<div><b>{html.escape(v)}</b>{html.escape(k)}</div>" for k, v in figures.items())
    return f"<div class='figures'>{''.join(cells)}</div>"


def _reference(summary: dict[str, Any]) -> str:
    check = summary["auc"]["reference"]
    if check is None:
        return ""
    return (
        f"On group {check['group']} alone: float64 reference {cell(check['auc'])}, these "
        f"weights {cell(check['auc_backend'])}."
    )


def _table(rows: list[dict[str, Any]]) -> str:
    head = "".join(f"<th>{name}</th>" for name in rows[0])
    body = "".join(
        "<tr>" + "".join(f"<td>{cell(v)}</td>" for v in row.values()) + "</tr>" for row in rows
    )
    return f"<div class='wide'><table><tr>{head}</tr>{body}</table></div>"


def _heat_map(scores: Scores, rollout: int, top: float, with_prompt: bool) -> str:
    rollouts = scores.rollouts
    first, weights = rollouts.first_wrong_of(rollout), scores.weights_of(rollout).tolist()
    spans = []
    for t, (text, weight) in enumerate(zip(rollouts.text_of(rollout), weights, strict=True)):
        wrong = " class='wrong'" if t == first else ""
        shown = html.escape(text).replace("\n", "↵\n")  # a bare line break has no background
        # at most 0.8: text stays readable on it, dark on light as well as light on dark
        spans.append(
            f"<span{wrong} style='background:rgb(220 40 40/{0.8 * shade(weight, top):.3f})' "
            f"title='token {t}: {weight:.4f}'>{shown}</span>"
        )
    prompt = html.escape(rollouts.prompts[rollout]) if with_prompt and rollouts.prompts else ""
    return (
        f"<h3>Rollout {rollout}, {rollouts.label_of(rollout)}</h3>"
        + (f"<p class='muted'>Prompt: {prompt}</p>" if prompt else "")
        + f"<div class='rollout'>{''.join(spans)}</div>"
    )


def _matrix(scores: Scores, rollout: int) -> str:
    """The span-by-span matrix of a rollout and the opposing one nearest to it (paper's Fig. 11)."""
    rollouts, found = scores.rollouts, scores.found
    own = found.rollout == rollout
    near = found.rollout[found.nearest[own & (found.nearest >= 0)]]
    if not len(near):
        return ""
    other = Counter(near.tolist()).most_common(1)[0][0]
    states = [rollouts.hidden[rollouts.tokens_of(i)][:MATRIX_TOKENS] for i in (rollout, other)]
    matrix = pair_distances(*states, config=scores.config)
    cut = any(len(scores.weights_of(i)) > MATRIX_TOKENS for i in (rollout, other))
    part = f" Of both rollouts, the first {MATRIX_TOKENS} tokens." if cut else ""
    return (
        f"<h2>Span distances</h2><p>Rows: spans of rollout {rollout} "
        f"({rollouts.label_of(rollout)}); columns: spans of rollout {other}, the one of "
        f"its opposing set that holds most of its nearest spans. Numbered by first token. "
        f"{html.escape(scores.config.distance)} distance in units of a token cost, eps from the "
        f"mean norm of these two rollouts. Dots: smallest in the row.{part}</p>"
        "<img alt='span-by-span matrix of distances' "
        f"src='data:image/png;base64,{_png(matrix, scores.config.stride)}'>"
    )


def _png(matrix: Tensor, stride: int) -> str:
    from matplotlib.figure import Figure

    gray = "#777777"  # readable on a light and on a dark page: the background is transparent
    figure = Figure(figsize=(7, 5.6), layout="constrained", facecolor="none")
    axes = figure.subplots()
    image = axes.imshow(matrix.numpy(), cmap="viridis", aspect="auto")
    bar = figure.colorbar(image)
    bar.set_label("span distance", color=gray)
    axes.plot(matrix.argmin(1).numpy(), torch.arange(len(matrix)).numpy(), "o", color="white",
              markeredgecolor="black", markersize=4)  # fmt: skip
    for axis, size in ((axes.yaxis, len(matrix)), (axes.xaxis, matrix.shape[1])):
        shown = range(0, size, -(-size // 12))
        axis.set_ticks(shown, [str(k * stride) for k in shown])
    axes.set_xlabel("opposing rollout: first token of the span", color=gray)
    axes.set_ylabel("first token of the span", color=gray)
    for part in (axes, bar.ax):
        part.tick_params(colors=gray)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return base64.b64encode(buffer.getvalue()).decode()
