"""The public functions: layouts, invariances, and every error by its text."""

from __future__ import annotations

import ast
import math
import re
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

import shear_ops
from rollouts_for_tests import CONFIG, LENGTHS, arguments, padded
from shear_ops import _C, HiddenBank, SpanConfig, distributed
from shear_ops.ops import backends

config = SpanConfig(**CONFIG)
TRIED = ("cpu", "reference", *(["triton"] if backends.interpreted() else []))


def weights_of(**given: Any) -> torch.Tensor:
    return shear_ops.span_weights(**{"config": config, **given})


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("holes", [False, True])
def test_padded_equals_packed(backend: str, holes: bool) -> None:
    packed = arguments()
    wanted = weights_of(**packed, backend=backend)
    assert wanted.std() > 0.01
    given = padded(packed, holes)
    seen = weights_of(**given, backend=backend)
    assert seen.dtype == torch.float32
    assert torch.equal(seen[given["mask"]], wanted)
    assert (seen[~given["mask"]] == 1).all()
    assert torch.equal(weights_of(**{**given, "mask": given["mask"].long()}, backend=backend), seen)


@pytest.mark.parametrize("backend", TRIED)
@pytest.mark.parametrize("n_iters", [1, 5000])
def test_counts_beside_weights(backend: str, n_iters: int) -> None:
    settings = SpanConfig(**CONFIG, n_iters=n_iters)
    for given in (arguments(), padded(arguments(), holes=True)):
        weights, counts = shear_ops.span_weights(
            **given, config=settings, backend=backend, return_counts=True
        )
        wanted = shear_ops.span_weights(**given, config=settings, backend=backend)
        assert torch.equal(weights, wanted)
        found = shear_ops.span_distances(**given, config=settings, backend=backend).pairs
        assert counts.total == found.total == counts.bounded + counts.abandoned + counts.solved > 0
        assert (counts.stopped > 0) == (n_iters == 1)
        assert counts.stopped_share == counts.stopped / counts.solved


def test_counts_of_nothing() -> None:
    given = {**arguments(), "labels": torch.ones(len(LENGTHS), dtype=torch.int64)}
    _, counts = shear_ops.span_weights(**given, return_counts=True)
    assert counts == (0, 0, 0, 0, 0)
    assert counts.stopped_share == 0


def test_weighted_advantages() -> None:
    packed = arguments()
    weights = weights_of(**packed)
    advantages = torch.tensor([1.5, -0.5, -2.0, 1.0, -0.0], dtype=torch.float64)
    seen = shear_ops.weighted_advantages(advantages, **packed, config=config)
    listed = {**packed, "cu_seqlens": packed["cu_seqlens"].tolist()}
    assert torch.equal(shear_ops.weighted_advantages(advantages, **listed, config=config), seen)
    wanted = advantages.repeat_interleave(torch.tensor(LENGTHS)) * weights
    assert seen.dtype == torch.float64
    assert torch.equal(seen, wanted)
    given = padded(packed, holes=True)
    rows = shear_ops.weighted_advantages(advantages, **given, config=config)
    assert torch.equal(rows[given["mask"]], wanted)
    assert torch.equal(rows[~given["mask"]], advantages[:, None].expand_as(rows)[~given["mask"]])


@pytest.mark.parametrize("label", [1, 0, -1])
def test_uniform_groups_leave_advantages_bit_identical(label: int) -> None:
    given = {**arguments(), "labels": torch.full((5,), label)}
    advantages = torch.randn(5)
    seen = shear_ops.weighted_advantages(advantages, **given, config=config)
    assert torch.equal(seen, advantages.repeat_interleave(torch.tensor(LENGTHS)))


def test_order_and_packing_change_nothing() -> None:
    """Rollouts in another order, next to other groups and ignored rollouts, keep their weights."""
    given = arguments()
    pieces = dict(enumerate(zip(
        given["hidden"].split(LENGTHS), weights_of(**given).split(LENGTHS),
        given["group_ids"].tolist(), given["labels"].tolist(), strict=True,
    )))  # fmt: skip
    extra = torch.randn(30, 12) * 3
    order = [3, 4, 1, 0, 2]
    rows = [pieces[i][0] for i in order]
    hidden = torch.cat([extra, *rows, extra])
    lengths = [30, *(len(r) for r in rows), 30]
    seen = weights_of(
        hidden=hidden,
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0),
        group_ids=torch.tensor([-5, *(pieces[i][2] for i in order), 7]),
        labels=torch.tensor([1, *(pieces[i][3] for i in order), -1]),
    )
    parts = seen.split(lengths)
    for part, i in zip(parts[1:-1], order, strict=True):
        torch.testing.assert_close(part, pieces[i][1], rtol=1e-6, atol=0)
    assert (parts[0] == 1).all()
    assert (parts[-1] == 1).all()


def test_threads_and_pruning_change_no_bit(two_threads: None) -> None:
    generator = torch.Generator().manual_seed(3)
    given = {
        "hidden": torch.randn(600, 40, generator=generator) + torch.randn(40, generator=generator),
        "cu_seqlens": torch.arange(7) * 100,
        "group_ids": torch.tensor([0, 0, 0, 0, 1, 1]),
        "labels": torch.tensor([1, 0, 0, 1, 1, 0]),
    }
    settings = SpanConfig(span=20, stride=4)
    wanted = shear_ops.span_distances(**given, config=settings, prune=False)
    assert wanted.pairs.solved == wanted.pairs.total
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for prune in (False, True):
            seen = shear_ops.span_distances(**given, config=settings, prune=prune)
            for name in ("distance", "nearest", "residual", "iterations"):
                assert torch.equal(getattr(seen, name), getattr(wanted, name)), name
    assert seen.pairs.bounded + seen.pairs.abandoned + seen.pairs.solved == seen.pairs.total
    assert seen.pairs.solved < seen.pairs.total


def test_span_distances_says_where_spans_are_and_where_it_stopped() -> None:
    given = arguments()
    seen = shear_ops.span_distances(**given, config=SpanConfig(**CONFIG, n_iters=1, tol=0.0))
    assert seen.begin[seen.rollout == 0].tolist() == [0, 5, 10, 15, 20, 25]
    assert seen.end[seen.rollout == 0].tolist() == [16, 21, 26, 31, 36, 37]
    assert 1 not in seen.rollout
    alone = seen.rollout == 4  # group 9 has one rollout
    assert (seen.nearest[alone] == -1).all()
    assert seen.distance[alone].isinf().all()
    assert (seen.iterations[~alone] == 1).all()
    assert (seen.residual[~alone] > 0).all()
    assert seen.pairs.stopped == seen.pairs.solved > 0
    opposing = seen.rollout[seen.nearest[~alone]]
    labels = given["labels"]
    assert (labels[opposing] != labels[seen.rollout[~alone]]).all()


def test_pair_distances_holds_the_minima_of_span_distances() -> None:
    x, y = torch.randn(50, 8), torch.randn(33, 8)
    matrix = shear_ops.pair_distances(x, y, config=config)
    found = shear_ops.span_distances(
        torch.cat([x, y]), cu_seqlens=torch.tensor([0, 50, 83]), group_ids=[0, 0], labels=[1, 0],
        config=config,
    )  # fmt: skip
    assert matrix.shape == (8, 5)
    assert torch.equal(torch.cat([matrix.amin(1), matrix.amin(0)]), found.distance)
    assert torch.equal(matrix.argmin(1) + 8, found.nearest[:8])


def test_group_ids_from_uids() -> None:
    ids = shear_ops.group_ids_from_uids(["a", "b", "a", "ab"])
    assert ids.dtype == torch.int64
    assert ids[0] == ids[2]
    assert len(set(ids.tolist())) == 3
    assert (ids >= 0).all()
    prompts = [[5, 6], torch.tensor([5, 6]), (5, 6), [56], torch.tensor([56])]
    same, *others = shear_ops.group_ids_from_uids(prompts).tolist()
    assert others[:2] == [same, same]
    assert others[2] == others[3] != same
    for uids, seen in (
        ("ab", "the string 'ab'"),
        ([1, 2], "got 1 among them"),
        ([None], "None"),
        ([[1.2]], "got .1.2. among"),
    ):
        with pytest.raises(TypeError, match=f"uids must be .*{seen}"):
            shear_ops.group_ids_from_uids(uids)


def test_advice_of_errors_works() -> None:
    """What an error or a docstring sends to takes what it was sent with."""
    cost = torch.rand(4, 6, dtype=torch.float64)
    found = shear_ops.reference.sinkhorn(cost, 0.1)
    assert found.value.shape == ()
    assert float(found.value) == pytest.approx(
        float(shear_ops.sinkhorn(cost.float(), reg=0.1).value), rel=2e-3
    )
    assert shear_ops.labels_from_rewards([1.0, 0.0, math.nan]).tolist() == [1, 0, -1]
    with pytest.raises(TypeError, match=r"rewards must be numbers, got \['a'\]"):
        shear_ops.labels_from_rewards(["a"])


def test_a_cost_that_is_refused_is_named() -> None:
    cost = torch.rand(3, 4, 5)
    cost[2, 3, 1] = math.inf
    with pytest.raises(ValueError, match=r"cost must be finite, .* in problem 2$"):
        shear_ops.sinkhorn(cost, reg=0.1)
    cost[1, 2, 4] = math.nan  # not in use
    with pytest.raises(ValueError, match=r"in problem 2$"):
        shear_ops.sinkhorn(cost, reg=0.1, n_rows=[4, 2, 4])
    with pytest.raises(ValueError, match=r"in problem 2$"):
        shear_ops.sinkhorn(cost, reg=0.1, n_cols=[5, 4, 5])
    x, y = torch.rand(2, 3, 2), torch.rand(2, 4, 2)
    for name in ("x", "y"):
        given = {"x": x.clone(), "y": y.clone()}
        given[name][1, 2, 0] = math.nan
        with pytest.raises(ValueError, match=rf"^{name} must be finite, .* at {name}\[1, 2\]$"):
            shear_ops.sinkhorn(**given, reg=0.1)
    with pytest.raises(ValueError, match=r"cost must be finite, .* in problem 0$"):
        shear_ops.sinkhorn(x=x * 1e34, y=y, reg=0.1)
    with pytest.raises(ValueError, match=r"cost must be finite, .* on$"):
        shear_ops.sinkhorn(cost[2], reg=0.1)


@pytest.mark.parametrize("unused", [1e25, math.inf, math.nan])
def test_points_that_are_not_in_use_change_nothing(unused: float) -> None:
    x, y = torch.rand(2, 4, 3), torch.rand(2, 5, 3)
    wanted = shear_ops.sinkhorn(x=x[:, :3], y=y[:, :4], reg=0.1)
    x[:, 3], y[:, 4] = unused, unused
    seen = shear_ops.sinkhorn(x=x, y=y, reg=0.1, n_rows=[3, 3], n_cols=[4, 4])
    assert torch.equal(seen.value, wanted.value)
    y[1, 1, 0] = math.nan
    with pytest.raises(ValueError, match=r"^y must be finite, .* at y\[1, 1\]$"):
        shear_ops.sinkhorn(x=x, y=y, reg=0.1, n_rows=[3, 3], n_cols=[4, 4])


def test_the_reference_checks_its_numbers() -> None:
    for given, message in (
        ({"reg": 0.0}, "reg must be positive and finite, got 0.0"),
        ({"reg": math.nan}, "reg must be positive and finite, got nan"),
        ({"reg": 0.1, "n_iters": 0}, "n_iters must be at least 1, got 0"),
        ({"reg": 0.1, "cost": torch.zeros(3)}, r"cost must be .*, got shape \(3,\)"),
        ({"reg": 0.1, "cost": torch.zeros(2, 0, 3)}, r"cost must be .*, got shape \(2, 0, 3\)"),
    ):
        with pytest.raises(ValueError, match=message):
            shear_ops.reference.sinkhorn(**{"cost": torch.rand(2, 3, 4), **given})


def test_the_reference_names_what_it_refuses() -> None:
    x = torch.rand(9, 3)
    bad = x.clone()
    bad[4] = math.nan
    with pytest.raises(ValueError, match=r"^y must be finite, got NaN or Inf at token 4$"):
        shear_ops.pair_distances(x, bad, backend="reference")
    with pytest.raises(ValueError, match=r"^x is on meta"):
        shear_ops.reference.pair_distances(x.to("meta"), x)
    with pytest.raises(ValueError, match=r"^cost is on meta"):
        shear_ops.reference.sinkhorn(x.to("meta"), 0.1)


def test_integers_that_int64_does_not_have() -> None:
    given = {**arguments(), "group_ids": torch.tensor([2**64 - 1] * 5, dtype=torch.uint64)}
    with pytest.raises(
        ValueError, match=r"^group_ids must be below 2\^63, got 18446744073709551615"
    ):
        shear_ops.span_weights(**given)


def test_labels_from_rewards() -> None:
    rewards = torch.tensor([1.0, 0.5, 0.49, -3.0, torch.nan, torch.inf])
    labels = shear_ops.labels_from_rewards(rewards)
    assert labels.dtype == torch.int8
    assert labels.tolist() == [1, 1, 0, 0, -1, 1]
    assert shear_ops.labels_from_rewards(torch.tensor([2, 3]), threshold=3).tolist() == [0, 1]


def test_without_the_finite_check_a_nan_poisons_its_group_only() -> None:
    given = arguments()
    given["group_ids"] = torch.tensor([7, 7, 7, 7, 9])
    more = {
        "hidden": torch.cat([given["hidden"], given["hidden"]]),
        "cu_seqlens": torch.cat([given["cu_seqlens"], given["cu_seqlens"][1:] + 126]),
        "group_ids": torch.cat([given["group_ids"], given["group_ids"] + 10]),
        "labels": torch.cat([given["labels"], given["labels"]]),
    }
    more["hidden"][40, 3] = torch.nan
    seen = weights_of(**more, config=SpanConfig(**CONFIG, check_finite=False))
    assert seen[:106].isnan().all()
    assert torch.equal(seen[126:], weights_of(**given))


GOOD = arguments()
H, B = GOOD["hidden"], 5
HALF = SpanConfig(span=4, stride=2)
ERRORS: list[tuple[type[Exception], str, dict[str, Any]]] = [
    (ValueError, "hidden must be finite.*token 3", {"hidden": H.index_fill(0, torch.tensor(3), torch.nan)}),
    (ValueError, "hidden must be finite.*token 9", {"hidden": H.index_fill(0, torch.tensor(9), torch.inf)}),
    (ValueError, "hidden must be finite.*token 1", {"hidden": H.index_fill(0, torch.tensor(1), 1e30)}),
    (ValueError, "hidden must be finite", {"hidden": H.half() / 0}),
    (TypeError, "hidden must be float32, float16 or bfloat16, got torch.float64", {"hidden": H.double()}),
    (TypeError, "hidden must be float32, float16 or bfloat16, got torch.int64", {"hidden": H.long()}),
    (TypeError, "hidden must be a torch.Tensor, got ndarray", {"hidden": H.numpy()}),
    (TypeError, "hidden must be a dense", {"hidden": H.to_sparse()}),
    (ValueError, "hidden must be 2-d or 3-d, got shape", {"hidden": H[0]}),
    (ValueError, "hidden must have at least one dimension", {"hidden": H[:, :0]}),
    (ValueError, "hidden is on meta", {"hidden": H.to("meta")}),
    (ValueError, "give cu_seqlens and no mask", {"cu_seqlens": None}),
    (ValueError, "give mask .* and no cu_seqlens", {"hidden": H[None]}),
    (TypeError, "cu_seqlens must be integer or bool, got torch.float32", {"cu_seqlens": GOOD["cu_seqlens"].float()}),
    (TypeError, "cu_seqlens must be int32 or int64, got torch.int8", {"cu_seqlens": GOOD["cu_seqlens"].to(torch.int8)}),
    (ValueError, "cu_seqlens must be 1-d", {"cu_seqlens": GOOD["cu_seqlens"][None]}),
    (ValueError, "cu_seqlens must have at least one entry", {"cu_seqlens": torch.zeros(0, dtype=torch.int64)}),
    (ValueError, "cu_seqlens must start at 0, got 1", {"cu_seqlens": [1, 37, 37, 42, 106, 126]}),
    (ValueError, "cu_seqlens must not decrease, got 37 before 30 at entry 2", {"cu_seqlens": [0, 37, 30, 42, 106, 126]}),
    (ValueError, "cu_seqlens must end at the number of tokens, 126, got 127", {"cu_seqlens": [0, 37, 37, 42, 106, 127]}),
    (ValueError, "cu_seqlens must end at the number of tokens, 126, got 120", {"cu_seqlens": [0, 37, 37, 42, 106, 120]}),
    (ValueError, "group_ids must have 5 entries, got 4", {"group_ids": [7] * 4}),
    (TypeError, "group_ids must be integer or bool, got torch.float32", {"group_ids": [7.0] * 5}),
    (TypeError, "group_ids must be int64 integers, got .*group_ids_from_uids", {"group_ids": ["a"] * 5}),
    (TypeError, "group_ids must be int64 integers, got None", {"group_ids": None}),
    (TypeError, "group_ids must be int64 integers, got .9223372036854775808", {"group_ids": [2**63] * 5}),
    (TypeError, "labels must be int64 integers, got None", {"labels": None}),
    (ValueError, "labels must have 5 entries, got 6", {"labels": [1] * 6}),
    (TypeError, "labels must be integer.*labels_from_rewards", {"labels": torch.tensor([1.0, 0, 0, 1, 0])}),
    (ValueError, "labels must be 1, 0 or -1, got 2 at entry 1", {"labels": [1, 2, 0, 1, 0]}),
    (ValueError, "labels must be 1, 0 or -1, got -2 at entry 0", {"labels": [-2, 0, 0, 1, 0]}),
    (TypeError, "config must be a SpanConfig, got dict", {"config": CONFIG}),
    (ValueError, "backend must be one of cpu, cuda, triton, reference or None, got 'gpu'", {"backend": "gpu"}),
    (ValueError, "backend 'triton' (is not available|wants hidden on a GPU)", {"backend": "triton"}),
    (ValueError, "distance 'exact' is not computed by backend 'cpu'", {"backend": "cpu", "config": SpanConfig(distance="exact")}),
]  # fmt: skip


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize(("error", "message", "change"), ERRORS)
def test_errors(
    error: type[Exception], message: str, change: dict[str, Any], backend: str | None
) -> None:
    if backend and (
        "backend" in change or change.get("config") or "token" in message or "meta" in message
    ):
        pytest.skip("about the automatic backend")
    if backend and "1e30" in str(change.get("hidden")):
        pytest.skip("float64 has room for it")
    with pytest.raises(error, match=message):
        weights_of(**{**arguments(), "backend": backend, **change})
    if "backend" not in change:
        with pytest.raises(error, match=message):
            shear_ops.span_distances(
                **{**arguments(), "backend": backend, "config": config, **change}
            )


OF_VALUES = (
    "cu_seqlens must start", "cu_seqlens must not decrease", "cu_seqlens must end",
    "labels must be 1, 0 or -1",
)  # fmt: skip
VALUE_ERRORS = [(message, change) for _, message, change in ERRORS if message.startswith(OF_VALUES)]


@pytest.mark.parametrize(("message", "change"), VALUE_ERRORS)
def test_every_caller_checks_values_in_the_same_words(message: str, change: dict[str, Any]) -> None:
    assert len(VALUE_ERRORS) == 6
    given = {**arguments(), **change}
    integers = (torch.as_tensor(given[name]) for name in ("cu_seqlens", "group_ids", "labels"))
    calls = [
        lambda: torch.ops.shear.span_weights(given["hidden"], *integers),
        lambda: shear_ops.span_weights(**given),
        lambda: shear_ops.span_weights(**given, backend="reference"),
        lambda: distributed.span_weights(**given),
        lambda: HiddenBank().add(**given, sample_ids=range(5)),
    ]
    texts = set()
    for call in calls:
        with pytest.raises(ValueError, match=message) as error:
            call()
        texts.add(str(error.value))
    assert len(texts) == 1


MASK = torch.ones(5, 9, dtype=torch.bool)
MASK_ERRORS: list[tuple[type[Exception], str, Any]] = [
    (TypeError, "mask must be a torch.Tensor, got list", [[1]]),
    (TypeError, "mask must be bool or integer, got torch.float32", MASK.float()),
    (ValueError, r"mask must have hidden's first two dimensions \(5, 9\), got \(5, 8\)", MASK[:, :8]),
    (ValueError, "mask must be 0 or 1 everywhere", MASK.long() * 2),
    (ValueError, "mask must be on hidden's device cpu, got meta", MASK.to("meta")),
]  # fmt: skip


@pytest.mark.parametrize(("error", "message", "mask"), MASK_ERRORS)
def test_mask_errors(error: type[Exception], message: str, mask: Any) -> None:
    with pytest.raises(error, match=message):
        weights_of(
            hidden=torch.randn(5, 9, 4), mask=mask, group_ids=[0] * 5, labels=[1, 0] * 2 + [1]
        )


CONFIG_ERRORS: list[tuple[type[Exception], str, dict[str, Any]]] = [
    (ValueError, r"span must be in \[1, 2\^31\), got 0", {"span": 0}),
    (TypeError, "span must be an int, got 10.0", {"span": 10.0}),
    (TypeError, "stride must be an int, got True", {"stride": True}),
    (ValueError, "stride must be at most span \\(4\\), got 5", {"span": 4, "stride": 5}),
    (ValueError, "reg must be positive and finite, got 0", {"reg": 0}),
    (ValueError, "reg must be positive and finite, got -0.1", {"reg": -0.1}),
    (ValueError, "reg must be positive and finite, got nan", {"reg": float("nan")}),
    (ValueError, "reg must be positive and finite, got inf", {"reg": float("inf")}),
    (TypeError, "reg must be a number, got '0.1'", {"reg": "0.1"}),
    (ValueError, "n_iters must be in", {"n_iters": 0}),
    (ValueError, "tol must be non-negative and finite, got -1", {"tol": -1}),
    (ValueError, "reg_unit must be one of 'mean_norm', 'cost', got 'raw'", {"reg_unit": "raw"}),
    (ValueError, "distance must be one of 'sinkhorn', .*, got 'l2'", {"distance": "l2"}),
    (ValueError, "normalization must be one of", {"normalization": "token"}),
    (ValueError, "pooling must be one of", {"pooling": "sum"}),
    (ValueError, "aggregation must be one of", {"aggregation": "median"}),
    (TypeError, "check_finite must be a bool, got 1", {"check_finite": 1}),
]


@pytest.mark.parametrize(("error", "message", "fields"), CONFIG_ERRORS)
def test_config_errors(error: type[Exception], message: str, fields: dict[str, Any]) -> None:
    with pytest.raises(error, match=message):
        SpanConfig(**fields)


def test_names_become_the_enumerators_of_the_operators() -> None:
    assert list(_C.CHOICES) == [
        name for name, value in vars(SpanConfig()).items() if isinstance(value, str)
    ]
    for name, choices in _C.CHOICES.items():
        seen = [SpanConfig(**{name: choice}).op_arguments()[name] for choice in choices]
        assert seen == list(range(len(choices)))
    # no enumerator of another distance
    assert SpanConfig(distance="exact").op_arguments()["distance"] == len(_C.CHOICES["distance"])


def test_config_is_frozen() -> None:
    with pytest.raises(AttributeError):
        config.span = 3  # type: ignore[misc]


COST = torch.rand(2, 3, 4)
SINKHORN_ERRORS: list[tuple[type[Exception], str, dict[str, Any]]] = [
    (ValueError, "give either cost, or both x and y", {"cost": None}),
    (ValueError, "give either cost, or both x and y", {"x": torch.zeros(2, 3, 1)}),
    (ValueError, "give either cost, or both x and y", {"cost": None, "x": torch.zeros(2, 3, 1)}),
    (ValueError, "give either cost, or both x and y", {"cost": None, "y": torch.zeros(2, 3, 1)}),
    (ValueError, "give either cost, or both x and y", {"x": torch.zeros(2, 3, 1), "y": torch.zeros(2, 4, 1)}),
    (TypeError, "cost must be float32, float16 or bfloat16, got torch.float64", {"cost": COST.double()}),
    (ValueError, "cost must be 2-d or 3-d", {"cost": COST[0, 0]}),
    (ValueError, "cost must have at least one", {"cost": COST[:, :0]}),
    (ValueError, "cost must have at least one", {"cost": COST[:, :, :0]}),
    (ValueError, "cost must be finite, got NaN or Inf", {"cost": COST / 0}),
    (ValueError, "cost is on meta, which has no data", {"cost": COST.to("meta")}),
    (ValueError, "reg must be positive", {"reg": 0.0}),
    (ValueError, r"n_rows must be in \[1, 3\], got \[1, 4\]", {"n_rows": [1, 4]}),
    (ValueError, r"n_cols must be in \[1, 4\], got \[0, 4\]", {"n_cols": [0, 4]}),
    (ValueError, "n_cols must have 2 entries, got 1", {"n_cols": [1]}),
    (ValueError, "y must have x's batch and dimension", {"cost": None, "x": torch.zeros(2, 3, 1), "y": torch.zeros(2, 3, 2)}),
]  # fmt: skip


@pytest.mark.parametrize(("error", "message", "change"), SINKHORN_ERRORS)
def test_sinkhorn_errors(error: type[Exception], message: str, change: dict[str, Any]) -> None:
    with pytest.raises(error, match=message):
        shear_ops.sinkhorn(**{"cost": COST, "reg": 0.1, **change})


def test_other_errors() -> None:
    with pytest.raises(ValueError, match=r"advantages must have shape \(5,\), .* got \(4,\)"):
        shear_ops.weighted_advantages(torch.zeros(4), **arguments(), config=config)
    with pytest.raises(
        TypeError, match=r"advantages must be a floating-point tensor, got torch.int64"
    ):
        shear_ops.weighted_advantages(torch.zeros(5).long(), **arguments(), config=config)
    with pytest.raises(ValueError, match="y must have x's dtype, d and device"):
        shear_ops.pair_distances(torch.zeros(3, 4), torch.zeros(3, 5))
    with pytest.raises(ValueError, match="rewards must be 1-d"):
        shear_ops.labels_from_rewards(torch.zeros(2, 2))
    with pytest.raises(ValueError, match="threshold must be a number, got nan"):
        shear_ops.labels_from_rewards(torch.zeros(2), threshold=math.nan)
    with pytest.raises(ValueError, match="threads must be in"):
        shear_ops.plan([0, 4, 8], group_ids=[0, 0], labels=[1, 0], dim=8, threads=-1)
    with pytest.raises(TypeError, match="threshold must be a number, got None"):
        shear_ops.labels_from_rewards(torch.zeros(2), threshold=None)
    with pytest.raises(ValueError, match="labels must be 1, 0 or -1, got 3"):
        shear_ops.plan([0, 4, 8], group_ids=[0, 0], labels=[1, 3], dim=8)


def test_every_backend_says_why_it_is_missing() -> None:
    status = backends.status()
    assert list(status) == ["cpu", "cuda", "triton", "reference"]
    assert status["cpu"] is None
    for name, reason in status.items():
        assert reason is None or len(reason) > 10, name


SOURCES = Path(shear_ops.__file__).parent


@pytest.mark.parametrize(
    "source", sorted(SOURCES.rglob("*.py")), ids=lambda path: str(path.relative_to(SOURCES))
)
def test_no_module_uses_private_names_of_another(source: Path) -> None:
    """_C is the compiled module, and names with one underscore stay in their file."""
    nodes = list(ast.walk(ast.parse(source.read_text(encoding="utf-8"))))
    imported = {
        alias.asname or alias.name: alias.name
        for node in nodes
        if isinstance(node, ast.ImportFrom) and node.level
        for alias in node.names
    }
    private = [name for name in imported.values() if name.startswith("_") and name != "_C"]
    private += [
        f"{node.value.id}.{node.attr}"
        for node in nodes
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
        if node.value.id in imported and node.attr.startswith("_") and node.attr != "__file__"
    ]
    assert private == []


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("at", [(0, 36), (2, 0), (3, 63), (4, 19)])
def test_errors_say_where_a_state_is_not_finite(
    at: tuple[int, int], backend: str, value: float
) -> None:
    """In the layout of the caller: packed, or padded with holes, where masked tokens count."""
    rollout, token = at
    given = arguments()
    group = int(given["group_ids"][rollout])
    packed = int(given["cu_seqlens"][rollout]) + token
    given["hidden"][packed, 3] = value
    given["hidden"][packed + 1 :, 0] = value  # the first of several
    pads = padded(given, holes=True)
    column = int(pads["mask"][rollout].nonzero()[token])
    place = f"token {token} of rollout {rollout} (group {group}), hidden[{packed}]"
    seen = f"token {column} of rollout {rollout} (group {group}), hidden[{rollout}, {column}]"
    calls = (shear_ops.span_weights, shear_ops.span_distances, partial_advantages)
    for call, (arguments_of_call, wanted) in product(calls, ((given, place), (pads, seen))):
        with pytest.raises(ValueError, match=f"^hidden must be finite.* at {re.escape(wanted)}$"):
            call(**arguments_of_call, config=config, backend=backend)
    for op in (torch.ops.shear.span_weights, torch.ops.shear.span_distances):
        with pytest.raises(ValueError, match=f"^hidden must be finite.* at {re.escape(place)}$"):
            op(*given.values())


def partial_advantages(**given: Any) -> torch.Tensor:
    return shear_ops.weighted_advantages(torch.ones(5), **given)


@pytest.mark.parametrize(("name", "token"), [("x", 0), ("x", 29), ("y", 0), ("y", 39)])
def test_pair_distances_says_where_a_state_is_not_finite(name: str, token: int) -> None:
    given = {"x": torch.randn(30, 4), "y": torch.randn(40, 4)}
    given[name][token, 1] = math.nan
    for call in (torch.ops.shear.pair_distances, shear_ops.pair_distances):
        with pytest.raises(ValueError, match=f"^{name} must be finite.* at token {token}$"):
            call(**given)


@pytest.mark.parametrize("backend", TRIED)
@pytest.mark.parametrize("normalization", ["group", "rollout"])
@pytest.mark.parametrize("zero", [(0,), (3,), (2, 3), (0, 3), (0, 2, 3)])
@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-12])
def test_no_weight_is_infinite(
    backend: str, normalization: str, zero: tuple[int, ...], size: float
) -> None:
    """Rollouts whose states are zero, or nothing beside the others, have the group's scale."""
    given = arguments()
    for i in zero:
        given["hidden"][slice(*given["cu_seqlens"][i : i + 2])] *= size
    for pooling, distance in product(("max", "mean"), ("sinkhorn", "chamfer", "mmd", "cosine")):
        settings = SpanConfig(
            **CONFIG, normalization=normalization, pooling=pooling, distance=distance
        )
        if len(zero) == 3 and size == 1e-30 and backend != "reference":
            with pytest.raises(ValueError, match="must have a mean norm of at least"):
                weights_of(**given, config=settings, backend=backend)
            continue
        seen = weights_of(**given, config=settings, backend=backend)
        assert seen.isfinite().all()
        assert (seen[:106] < 100).all()
        if len(zero) == 3:
            assert size > 0 or (seen[:106] == 0).all()
        elif distance != "cosine":
            by_group = weights_of(**given, config=SpanConfig(**{
                **CONFIG, "pooling": pooling, "distance": distance,
            }), backend=backend)  # fmt: skip
            for i in zero:
                tokens = slice(*given["cu_seqlens"][i : i + 2])
                assert torch.equal(seen[tokens], by_group[tokens])


def test_stopped_pairs_are_warned_of_once() -> None:
    """In a process of its own, on stderr as torch's operators warn; nothing at the defaults."""
    code = """
import torch, shear_ops
given = dict(hidden=torch.randn(60, 8), cu_seqlens=[0, 30, 60], group_ids=[0, 0], labels=[1, 0])
shear_ops.span_weights(**given)
for _ in range(3):
    shear_ops.span_weights(**given, config=shear_ops.SpanConfig(n_iters=1))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    wanted = "1 of 1 solved span pairs were stopped at n_iters=1 before they converged"
    assert done.stderr.count(wanted) == 1
    assert done.stderr.count("stopped at n_iters") == 1
