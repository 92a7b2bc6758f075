"""The HTML report: one self-contained file with token heat-maps and the span-by-span matrix."""

from __future__ import annotations

import base64
import html
import io
from typing import Any

from torch import Tensor

from .api import pair_distances
from .rollouts import Rollouts
from .summary import Scores, verdict

_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: .2rem .7rem; text-align: right; border-bottom: 1px solid #8884; }
.figures { display: flex; flex-wrap: wrap; gap: 2rem; margin: 1.5rem 0; }
.figures b { display: block; font-size: 1.7rem; }
.rollout { font: 14px/1.9 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere;
  background: #fff; color: #111; border: 1px solid #8884; padding: .7rem; border-radius: .4rem; }
.rollout span { padding: .15rem 0; }
.rollout .wrong { outline: 2px solid #06c; outline-offset: 1px; }
.scale { display: inline-block; width: 12rem; height: .9rem; vertical-align: middle;
  background: linear-gradient(90deg, rgb(255 255 255), rgb(214 40 40)); border: 1px solid #8884; }
img { max-width: 100%; background: #fff; border-radius: .4rem; }
"""


def html_report(scores: Scores, summary: dict[str, Any], rollout: int) -> str:
    """Return the report as text: figures, groups, the rollouts of one group, and one matrix."""
    rollouts = scores.rollouts
    own = rollouts.group_ids[rollout]
    members = [i for i in range(len(rollouts)) if rollouts.group_ids[i] == own]
    pooled = summary["auc"]["weights"]["pooled"]
    pairs = summary["pairs"]
    figures = {
        "AUC of the first wrong step": "none" if pooled is None else f"{pooled:.3f}",
        "with uniform weights": "none" if pooled is None else "0.500",
        "time of span_weights": f"{1000 * summary['seconds']:.0f} ms",
        "span pairs": f"{pairs['total']:,}",
        "never solved": f"{100 * (1 - pairs['solved'] / max(1, pairs['total'])):.0f} %",
    }
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
        f"<title>shear_ops report</title><style>{_STYLE}</style></head>",
        "<body><h1>Token weights</h1>",
        f"<p>{html.escape(summary['source'])}</p><div class='figures'>",
        *(f"<div><b>{html.escape(v)}</b>{html.escape(k)}</div>" for k, v in figures.items()),
        f"</div><p>{html.escape(verdict(summary))}</p><h2>Groups</h2>",
        _table(summary["groups"]),
        f"<h2>Group {int(own)}</h2>",
        "<p>Background: token weight, 0 <span class='scale'></span> "
        f"{_top(scores):.2f} (hover for the value). Outlined: first wrong step.</p>",
        *(_heat_map(scores, i) for i in sorted(members, key=lambda i: i != rollout)),
        _matrix(scores, rollout, members),
        "</body></html>",
    ]
    return "\n".join(parts)


def _top(scores: Scores) -> float:
    return max(float(scores.weights.max()), 1e-9) if len(scores.weights) else 1.0


def _table(rows: list[dict[str, Any]]) -> str:
    def cell(value: object) -> str:
        return "–" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)

    if not rows:
        return "<p>No rollouts.</p>"
    head = "".join(f"<th>{name}</th>" for name in rows[0])
    body = "".join(
        "<tr>" + "".join(f"<td>{cell(v)}</td>" for v in row.values()) + "</tr>" for row in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>"


def _heat_map(scores: Scores, rollout: int) -> str:
    rollouts = scores.rollouts
    label = {1: "correct", 0: "incorrect", -1: "ignored"}[int(rollouts.labels[rollout])]
    first = -1 if rollouts.first_wrong is None else int(rollouts.first_wrong[rollout])
    weights = scores.weights[rollouts.tokens_of(rollout)].tolist()
    spans = []
    for t, (text, weight) in enumerate(zip(rollouts.text_of(rollout), weights, strict=True)):
        share = min(1.0, weight / _top(scores))
        color = f"rgb({255 - 41 * share:.0f} {255 - 215 * share:.0f} {255 - 215 * share:.0f})"
        wrong = " class='wrong'" if t == first else ""
        spans.append(
            f"<span{wrong} style='background:{color}' title='token {t}: {weight:.4f}'>"
            f"{html.escape(text)}</span>"
        )
    prompts = rollouts.prompts
    prompt = f": {html.escape(prompts[rollout])}" if rollout < len(prompts) else ""
    return f"<h3>Rollout {rollout}, {label}{prompt}</h3><div class='rollout'>{''.join(spans)}</div>"


def _matrix(scores: Scores, rollout: int, members: list[int]) -> str:
    """The span-by-span matrix of a rollout and one of its opposing set (the paper's Fig. 11)."""
    rollouts = scores.rollouts
    label = int(rollouts.labels[rollout])
    opposing = [
        i for i in members if int(rollouts.labels[i]) == 1 - label and _states(rollouts, i).numel()
    ]
    if label < 0 or not opposing or not _states(rollouts, rollout).numel():
        return ""
    matrix = pair_distances(
        _states(rollouts, rollout), _states(rollouts, opposing[0]), config=scores.config
    )
    return (
        f"<h2>Span distances</h2><p>Spans of rollout {rollout} (rows) against spans of rollout "
        f"{opposing[0]} (columns), {html.escape(scores.config.distance)}, in units of a token "
        f"cost.</p><img alt='span-by-span matrix' src='data:image/png;base64,{_png(matrix)}'>"
    )


def _states(rollouts: Rollouts, rollout: int) -> Tensor:
    return rollouts.hidden[rollouts.tokens_of(rollout)]


def _png(matrix: Tensor) -> str:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 6), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(matrix.numpy(), cmap="magma", aspect="auto")
    axes.set_xlabel("span of the opposing rollout")
    axes.set_ylabel("span")
    figure.colorbar(image, label="span distance")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return base64.b64encode(buffer.getvalue()).decode()
