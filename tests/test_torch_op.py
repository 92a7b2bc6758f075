"""torch.ops.shear as a torch operator: schema, fake kernels, no gradients, one graph."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch.library import opcheck

import shear_ops
from rollouts_for_tests import CONFIG, arguments, padded
from shear_ops import SpanConfig, reference
from shear_ops.ops.torch_op import NAMES, span_count

OPS = torch.ops.shear


def op_arguments(**changes: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple({**arguments(), **changes}.values())


def permuted(hidden: torch.Tensor) -> torch.Tensor:
    return hidden.t().contiguous().t()


CASES: dict[str, dict[str, torch.Tensor]] = {
    "fp32": {},
    "bf16": {"hidden": arguments()["hidden"].bfloat16()},
    "fp16": {"hidden": arguments()["hidden"].half()},
    "permuted": {"hidden": permuted(arguments()["hidden"])},
    "int32": {"cu_seqlens": arguments()["cu_seqlens"].int()},
    "bool labels": {"labels": arguments()["labels"].bool()},
    "one class": {"labels": torch.ones(5, dtype=torch.int64)},
    "no tokens": {"hidden": torch.zeros(0, 4), "cu_seqlens": torch.zeros(6, dtype=torch.int64)},
    "no rollouts": {
        "hidden": torch.zeros(0, 4),
        "cu_seqlens": torch.zeros(1, dtype=torch.int64),
        "group_ids": torch.zeros(0, dtype=torch.int64),
        "labels": torch.zeros(0, dtype=torch.int64),
    },
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["span_weights", "span_weights_and_pairs", "span_distances"])
def test_opcheck(name: str, case: str) -> None:
    opcheck(getattr(OPS, name).default, op_arguments(**CASES[case]), CONFIG)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [0, 1, 16, 17, 40])
def test_opcheck_pair_distances(dtype: torch.dtype, tokens: int) -> None:
    x, y = torch.randn(tokens, 6).to(dtype), permuted(torch.randn(21, 6)).to(dtype)
    opcheck(OPS.pair_distances.default, (x, y), CONFIG)


LENGTHS = (0, 1, 2, 3, 5, 15, 16, 17, 20, 21, 22, 99, 100, 101, 125, 126, 200, 1000)
SPANS = ((1, 1), (2, 1), (2, 2), (16, 1), (16, 5), (16, 16), (100, 7), (100, 25), (2**30, 2**30))


@pytest.mark.parametrize(("span", "stride"), SPANS)
def test_fake_kernels_count_spans_as_the_others_do(span: int, stride: int) -> None:
    config = SpanConfig(span=span, stride=stride, distance="chamfer")
    wanted = {tokens: len(reference.spans(tokens, span, stride)) for tokens in LENGTHS}
    assert {tokens: span_count(tokens, span, stride) for tokens in LENGTHS} == wanted
    offsets = torch.tensor([0, *LENGTHS]).cumsum(0)
    rollouts = len(LENGTHS)
    found = shear_ops.span_distances(
        torch.zeros(int(offsets[-1]), 2), cu_seqlens=offsets, group_ids=[0] * rollouts,
        labels=[1] * rollouts, config=config,
    )  # fmt: skip
    assert found.rollout.bincount(minlength=rollouts).tolist() == list(wanted.values())
    for rows, columns in product((0, 1, 16, 17, 101), (0, 22)):
        x, y = torch.ones(rows, 2), torch.ones(columns, 2)
        matrix = shear_ops.pair_distances(x, y, config=config)
        assert matrix.shape == (wanted[rows], wanted[columns])
        faked = OPS.pair_distances(x.to("meta"), y.to("meta"), span=span, stride=stride)
        assert faked.shape == matrix.shape


@pytest.mark.parametrize("batch", [0, 3])
def test_opcheck_sinkhorn(batch: int) -> None:
    cost = torch.rand(batch, 5, 7)
    opcheck(OPS.sinkhorn.default, (cost,), {"reg": 0.1})
    opcheck(OPS.sinkhorn.default, (cost.transpose(1, 2), torch.full((batch,), 2)), {"reg": 0.1})


def test_schema_defaults_are_those_of_span_config() -> None:
    wanted = SpanConfig().op_arguments()
    for name in NAMES[:-1]:
        schema = getattr(OPS, name).default._schema
        assert "str" not in {str(a.type) for a in schema.arguments}
        seen = {a.name: a.default_value for a in schema.arguments if a.kwarg_only}
        assert seen == {**wanted, "prune": True}
    seen = {a.name: a.default_value for a in OPS.sinkhorn.default._schema.arguments}
    assert (seen["n_iters"], seen["tol"]) == (wanted["n_iters"], wanted["tol"])


def test_outputs_are_not_differentiable() -> None:
    given = arguments()
    given["hidden"].requires_grad_()
    weights = shear_ops.span_weights(**given, config=SpanConfig(**CONFIG))
    assert not weights.requires_grad
    advantages = torch.ones(5, requires_grad=True)
    shear_ops.weighted_advantages(advantages, **given, config=SpanConfig(**CONFIG)).sum().backward()
    assert given["hidden"].grad is None
    torch.testing.assert_close(
        advantages.grad, torch.stack([w.sum() for w in weights.split(_lengths(given))])
    )
    distances = OPS.span_distances(*given.values(), **CONFIG)
    matrix = OPS.pair_distances(given["hidden"][:30], given["hidden"][30:], **CONFIG)
    solved = OPS.sinkhorn(torch.rand(2, 3, 4, requires_grad=True), reg=0.1)
    assert not any(t.requires_grad for t in (*distances, matrix, *solved))


def _lengths(given: dict[str, torch.Tensor]) -> list[int]:
    return given["cu_seqlens"].diff().tolist()


class CountGraphs:
    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, module: Any, inputs: Any) -> Any:
        self.graphs += 1
        return module.forward


def test_compile_makes_one_graph_for_all_lengths() -> None:
    count = CountGraphs()
    config = SpanConfig(**CONFIG)

    @torch.compile(fullgraph=True, dynamic=True, backend=count)
    def compiled(advantages: torch.Tensor, **given: torch.Tensor) -> torch.Tensor:
        given["hidden"] = given["hidden"] * 2
        return shear_ops.weighted_advantages(advantages, **given, config=config) + 1

    for drop in (0, 7, 13):
        given = arguments()
        given["hidden"] = given["hidden"][: given["hidden"].shape[0] - drop].clone()
        given["cu_seqlens"] = given["cu_seqlens"].clamp(max=given["hidden"].shape[0])
        advantages = torch.linspace(-1, 1, 5)
        wanted = shear_ops.weighted_advantages(advantages, **given, config=config) + 1
        assert wanted.std() > 0.1
        torch.testing.assert_close(compiled(advantages, **given), wanted)
    assert count.graphs == 1


def test_compile_padded_with_inductor() -> None:
    given = padded(arguments(), holes=True)
    config = SpanConfig(**CONFIG)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(
            lambda **k: shear_ops.span_weights(**k, config=config) * 3, fullgraph=True, dynamic=True,
            backend="aot_eager",
        )  # fmt: skip
        torch.testing.assert_close(
            compiled(**given), shear_ops.span_weights(**given, config=config) * 3
        )


def batch_of(*lengths: int) -> tuple[torch.Tensor, ...]:
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    rollouts = torch.arange(len(lengths))
    return torch.randn(int(offsets[-1]), 6), offsets, rollouts // 2, rollouts % 2


def first(*counts: int, of: int) -> list[torch.Tensor]:
    """Masks that keep some of the first: how many is data."""
    return [torch.arange(of) < count for count in counts]


CONFIGURED = SpanConfig(**CONFIG)
BATCHES = [batch_of(30, 20), batch_of(20, 40, 10, 31), batch_of(17, 16, 15, 3, 5, 9)]
PADS = [
    (torch.randn(b, t, 6), torch.rand(b, t) < 0.8, torch.arange(b) // 2, torch.arange(b) % 2)
    for b, t in ((4, 30), (3, 50), (6, 20))
]


def packed(hidden: torch.Tensor, *integers: torch.Tensor) -> dict[str, Any]:
    names = ("cu_seqlens", "group_ids", "labels")
    return {"hidden": hidden, "config": CONFIGURED, **dict(zip(names, integers, strict=True))}


def masked(hidden: torch.Tensor, *rest: torch.Tensor) -> dict[str, Any]:
    names = ("mask", "group_ids", "labels")
    return {"hidden": hidden, "config": CONFIGURED, **dict(zip(names, rest, strict=True))}


# Each with the arguments of several calls, whose lengths differ. In those "of data" a length is
# known only when the graph runs.
COMPILED: dict[str, tuple[Any, list[Any]]] = {
    "span_weights": (lambda *a: shear_ops.span_weights(**packed(*a)), BATCHES),
    "span_weights of data": (
        lambda h, keep, *a: shear_ops.span_weights(**packed(h[keep], *a)),
        [(torch.randn(120, 6), *first(int(a[0][-1]), of=120), *a) for a in (b[1:] for b in BATCHES)],
    ),
    "span_weights padded": (lambda *a: shear_ops.span_weights(**masked(*a)), PADS),
    "span_weights padded, integers": (
        lambda h, m, *a: shear_ops.span_weights(**masked(h, m.long(), *a)), PADS
    ),
    "span_weights padded, of data": (
        lambda keep, *a: shear_ops.span_weights(**masked(*(t[keep] for t in a))),
        [(torch.arange(len(a[0])) > 0, *a) for a in PADS],
    ),
    "weighted_advantages": (
        lambda w, *a: shear_ops.weighted_advantages(w, **packed(*a)),
        [(torch.rand(len(a[2])), *a) for a in BATCHES],
    ),
    "weighted_advantages padded": (
        lambda w, *a: shear_ops.weighted_advantages(w, **masked(*a)),
        [(torch.rand(len(a[0])), *a) for a in PADS],
    ),
    "span_distances": (lambda *a: shear_ops.span_distances(**packed(*a)).distance, BATCHES),
    "span_distances padded": (lambda *a: shear_ops.span_distances(**masked(*a)).nearest, PADS),
    "the operator span_distances": (lambda *a: OPS.span_distances(*a, **CONFIG)[0], BATCHES),
    "pair_distances": (
        lambda x, y: shear_ops.pair_distances(x, y, config=CONFIGURED),
        [(torch.randn(n, 6), torch.randn(m, 6)) for n, m in ((30, 40), (51, 17), (17, 63), (90, 22))],
    ),
    "pair_distances of data": (
        lambda x, y, a, b: shear_ops.pair_distances(x[a], y[b], config=CONFIGURED).amin(1),
        [(torch.randn(60, 6), torch.randn(50, 6), *first(n, of=60), *first(m, of=50))
         for n, m in ((30, 40), (51, 16), (3, 50), (60, 1))],
    ),
    "sinkhorn": (
        lambda cost: shear_ops.sinkhorn(cost, reg=0.1).value,
        [(torch.rand(*shape),) for shape in ((2, 3, 4), (5, 6, 7), (3, 9, 4))],
    ),
    "sinkhorn of one problem": (
        lambda cost: shear_ops.sinkhorn(cost, reg=0.1).value,
        [(torch.rand(*shape),) for shape in ((3, 4), (6, 7), (9, 4))],
    ),
    "sinkhorn of points": (
        lambda x, y: shear_ops.sinkhorn(x=x, y=y, reg=0.1).value,
        [(torch.rand(b, n, 5), torch.rand(b, m, 5)) for b, n, m in ((2, 3, 4), (3, 6, 7))],
    ),
    "sinkhorn ragged": (
        lambda cost, n: shear_ops.sinkhorn(cost, n_rows=n, reg=0.1).value,
        [(torch.rand(b, 4, 6), torch.arange(b) % 4 + 1) for b in (2, 5, 7)],
    ),
    "sinkhorn, batch of data": (
        lambda cost, n, keep: shear_ops.sinkhorn(cost[keep], n_rows=n[keep], reg=0.1).value,
        [(torch.rand(6, 4, 5), torch.arange(6) % 4 + 1, keep) for keep in first(2, 5, 0, of=6)],
    ),
    "sinkhorn, rows and columns of data": (
        lambda cost, a, b: shear_ops.sinkhorn(cost[a][:, b], reg=0.1).value,
        [(torch.rand(9, 8), *first(n, of=9), *first(m, of=8)) for n, m in ((3, 4), (9, 1), (1, 8))],
    ),
    "labels_from_rewards of data": (
        lambda rewards, keep: shear_ops.labels_from_rewards(rewards[keep]),
        [(torch.rand(6), keep) for keep in first(2, 5, 0, of=6)],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", COMPILED)
def test_one_graph_whatever_the_lengths(name: str) -> None:
    """Sizes of 0 and 1 that are no data are graphs of their own, as everywhere in torch."""
    function, calls = COMPILED[name]
    count = CountGraphs()
    torch._dynamo.reset()
    with torch._dynamo.config.patch(
        capture_dynamic_output_shape_ops=True, capture_scalar_outputs=True
    ):
        compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=count)
        for arguments_of_call in calls:
            assert torch.equal(compiled(*arguments_of_call), function(*arguments_of_call))
    assert count.graphs == 1


def test_compiled_calls_check_values_as_they_run() -> None:
    ragged = torch.compile(
        lambda cost, n: shear_ops.sinkhorn(cost, n_rows=n, reg=0.1), fullgraph=True, backend="eager"
    )
    with pytest.raises((RuntimeError, ValueError), match=r"n_rows must be in .*got 4"):
        ragged(torch.rand(2, 3, 4), torch.tensor([1, 4]))
    empty = torch.compile(
        lambda cost: shear_ops.sinkhorn(cost, reg=0.1), fullgraph=True, backend="eager"
    )
    for cost in (torch.rand(2, 0, 3), torch.rand(2, 3, 0)):
        with pytest.raises((RuntimeError, ValueError), match=r"n_(rows|cols) must be in"):
            empty(cost)


@pytest.mark.parametrize("context", [torch.inference_mode, torch.no_grad])
def test_inference_mode(context: Any) -> None:
    given = arguments()
    wanted = shear_ops.span_weights(**given, config=SpanConfig(**CONFIG))
    with context():
        assert torch.equal(shear_ops.span_weights(**given, config=SpanConfig(**CONFIG)), wanted)


def test_autocast_changes_nothing() -> None:
    given = arguments()
    wanted = shear_ops.span_weights(**given, config=SpanConfig(**CONFIG))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        seen = shear_ops.span_weights(**given, config=SpanConfig(**CONFIG))
    assert seen.dtype == torch.float32
    assert torch.equal(seen, wanted)


def test_direct_calls_are_memory_safe() -> None:
    """torch.ops.shear checks by itself whatever could read out of bounds."""
    good = arguments()
    bad: list[tuple[str, torch.Tensor, str]] = [
        ("cu_seqlens", torch.tensor([0, 37, 37, 42, 106, 127]), "cu_seqlens must end at"),
        ("cu_seqlens", torch.tensor([0, 37, 30, 42, 106, 126]), "cu_seqlens must not decrease"),
        ("cu_seqlens", torch.tensor([1, 37, 37, 42, 106, 126]), "cu_seqlens must start at 0"),
        ("cu_seqlens", good["cu_seqlens"][:-1], "cu_seqlens must have 6 entries"),
        ("cu_seqlens", good["cu_seqlens"].float(), "cu_seqlens must be int64"),
        ("group_ids", good["group_ids"][:2], "group_ids must have 5 entries"),
        ("labels", torch.tensor([1, 0, 0, 2, 0]), "labels must be 1, 0 or -1, got 2 at entry 3"),
        ("labels", torch.tensor([[1, 0]]), "labels must be a 1-d"),
        ("hidden", good["hidden"].double(), "hidden must be float32"),
        ("hidden", good["hidden"][None], "hidden must be a contiguous"),
        ("hidden", good["hidden"][:, :0], "with dim >= 1"),
    ]
    for name, value, message in bad:
        for op in (OPS.span_weights, OPS.span_weights_and_pairs, OPS.span_distances):
            with pytest.raises((RuntimeError, ValueError), match=message):
                op(*{**good, name: value}.values())
    options = {
        "span": 0, "stride": 0, "reg": 0.0, "n_iters": 0, "tol": -1.0, "reg_unit": 2, "distance": 4,
        "normalization": -1, "pooling": 2, "aggregation": 9,
    }  # fmt: skip
    for name, value in options.items():
        with pytest.raises((RuntimeError, ValueError), match=f"{name} must be"):
            OPS.span_weights(*good.values(), **{name: value})
    with pytest.raises((RuntimeError, ValueError), match="x and y must have one dtype"):
        OPS.pair_distances(torch.zeros(3, 4), torch.zeros(3, 5))
    with pytest.raises((RuntimeError, ValueError), match="n_rows must be in"):
        OPS.sinkhorn(torch.zeros(1, 2, 3), torch.tensor([3]), reg=1.0)
