"""The float64 reference against other solvers, closed forms, examples by hand, invariances."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from bench.truth import sharp_cost
from torch import Tensor

import oracle
from problems import PROBLEMS, Problem, Text
from shear_ops import SpanConfig, reference

BY_NAME = {p.name: p for p in PROBLEMS}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The tensors are too small to share: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def costs(n: int, m: int, batch: int = 4, dim: int = 32, shared: int = 0) -> Tensor:
    """Token costs (batch, n, m) of text; the first tokens are shared. Mean norm about 6."""
    text = Text(n * 1000 + m, dim)
    x = torch.stack(text.rollouts(*[n] * batch)).double()
    y = torch.stack(text.rollouts(*[m] * batch)).double()
    y[:, :shared] = x[:, :shared]
    return reference.token_cost(x, y)


def call(
    rollouts: list[Tensor], labels: list[int], group_ids: list[int] | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Arguments of span_weights; one group unless group_ids are given."""
    return (
        torch.cat(rollouts),
        torch.tensor([0, *(len(r) for r in rollouts)]).cumsum(0),
        torch.tensor(group_ids or [0] * len(labels)),
        torch.tensor(labels),
    )


def numbers(*values: float) -> Tensor:
    return torch.tensor(values)[:, None]


SPANS: list[tuple[int, int, int, list[tuple[int, int]]]] = [
    (0, 4, 2, []),
    (1, 4, 2, [(0, 1)]),
    (3, 4, 2, [(0, 3)]),
    (4, 4, 2, [(0, 4)]),
    (5, 4, 2, [(0, 4), (2, 5)]),
    (6, 4, 2, [(0, 4), (2, 6)]),
    (7, 4, 2, [(0, 4), (2, 6), (4, 7)]),
    (9, 4, 4, [(0, 4), (4, 8), (8, 9)]),
    (3, 1, 1, [(0, 1), (1, 2), (2, 3)]),
    (10, 7, 3, [(0, 7), (3, 10)]),
    (11, 7, 3, [(0, 7), (3, 10), (6, 11)]),
    (151, 100, 25, [(0, 100), (25, 125), (50, 150), (75, 151)]),
]


@pytest.mark.parametrize(("length", "span", "stride", "wanted"), SPANS)
def test_spans(length: int, span: int, stride: int, wanted: list[tuple[int, int]]) -> None:
    assert reference.spans(length, span, stride) == wanted


def test_spans_cover_every_token_and_end_at_the_last() -> None:
    for length in range(60):
        for span, stride in ((1, 1), (2, 1), (5, 5), (7, 3), (12, 5), (50, 30)):
            seen = reference.spans(length, span, stride)
            assert seen == list(oracle.spans(length, span, stride))
            assert {t for a, b in seen for t in range(a, b)} == set(range(length))
            assert all(b - a == span for a, b in seen[:-1])
            if len(seen) > 1:
                assert span - stride < seen[-1][1] - seen[-1][0] <= span


def test_token_cost_is_exact_where_the_gram_form_is_not() -> None:
    x = torch.tensor([[1e6, 0.0], [1e6, 3e-5]], dtype=torch.float64)
    y = torch.tensor([[1e6, 4e-5]], dtype=torch.float64)
    assert torch.allclose(reference.token_cost(x, y)[:, 0], numbers(4e-5, 1e-5)[:, 0].double())
    gram = (x**2).sum(1) + (y**2).sum(1) - 2 * (x @ y.T)[:, 0]
    assert gram.abs().max() > 10 * 4e-5**2 or gram.eq(0).all()  # what it would have been
    many = torch.randn(40, 4096, dtype=torch.float64)
    assert (reference.token_cost(many, many).diagonal() == 0).all()


def test_first_iteration_by_hand() -> None:
    """One plain row update from g = 0, then exact columns: every number by NumPy."""
    cost = np.array([[1.0, 2.0, 4.0], [3.0, 0.5, 2.5]])
    eps = 0.7
    f = -eps * np.log(np.exp(-cost / eps).mean(1))
    g = -eps * np.log(np.exp((f[:, None] - cost) / eps).mean(0))
    plan = np.exp((f[:, None] + g - cost) / eps) / 6
    assert np.allclose(plan.sum(0), 1 / 3)
    missing = 1 / 2 - plan.sum(1)
    assert np.abs(missing).max() > 0.01
    value = (plan * cost).sum() + f @ missing
    assert value > max(oracle.bounds(cost))  # it is the corrected value that is returned
    seen = reference.sinkhorn(torch.tensor(cost)[None], eps, n_iters=1, tol=0.0)
    assert seen.value.item() == pytest.approx(value, rel=1e-14)
    assert seen.residual.item() == pytest.approx(np.abs(missing).sum(), rel=1e-12)
    assert seen.iterations.item() == 1


@pytest.mark.parametrize("reg", [0.1, 0.3, 0.6, 3.0])
@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 9), (8, 8), (16, 11), (40, 33), (100, 100)])
def test_sinkhorn_against_other_solvers(n: int, m: int, reg: float) -> None:
    cost = costs(n, m)
    seen = reference.sinkhorn(cost, reg)
    assert (seen.residual <= 1e-7).all()
    torch.testing.assert_close(seen.value, sharp_cost(cost, reg, tol=1e-9), rtol=2e-7, atol=0)
    if reg >= 0.6:  # below, POT takes its time
        wanted = oracle.sinkhorn_pot(cost[0].numpy(), reg)
        assert seen.value[0].item() == pytest.approx(wanted, rel=1e-6)


NEWTON = [
    "shared prefix", "repeated tokens", "reg 0.005", "two clusters", "dim 1", "outlier tokens",
    "outlier dimensions", "near-duplicates 1e-3", "shared prefix, offset", "norms 1e+06",
    "norms 1e-04", "identical rollouts", "reg 4.5 in units of cost",
]  # fmt: skip


@pytest.mark.parametrize("name", NEWTON)
def test_nearest_spans_against_newton(name: str) -> None:
    """The hardest problems of the table, converged: the value of every fifth nearest span."""
    problem = BY_NAME[name]
    found = reference.span_distances(*problem.arguments().values(), **problem.config, tol=1e-5)
    hidden = problem.hidden.double()
    eps = problem.config.get("reg", 0.03)
    if problem.config.get("reg_unit") != "cost":
        eps *= hidden.norm(dim=1).mean().item()
    for k in range(0, len(found.distance), 5):
        x, y = (hidden[found.begin[i] : found.end[i]] for i in (k, int(found.nearest[k])))
        cost = torch.linalg.vector_norm(x[:, None] - y[None], dim=2)
        wanted = sharp_cost(cost[None], eps, tol=1e-9).item()
        assert found.distance[k].item() == pytest.approx(wanted, rel=1e-5, abs=1e-7 * eps)


@pytest.mark.parametrize("reg", [0.03, 0.15, 0.6])
@pytest.mark.parametrize("shared", [0, 12])
def test_value_lies_between_w1_and_its_upper_bound(reg: float, shared: int) -> None:
    cost = costs(16, 13, shared=shared)
    value = reference.sinkhorn(cost, reg).value
    exact = cost.new_tensor([oracle.w1(c) for c in cost.numpy()])
    assert (value >= exact * (1 - 1e-7)).all()
    assert (value <= exact + reg * math.log(13) + 1e-7).all()
    assert (value - exact).max() > 1e-3 * reg  # or the test could not see which of the two it is
    for c, (r, q), w in zip(
        cost.numpy(), zip(*reference.bounds(cost), strict=True), exact, strict=True
    ):
        assert (r.item(), q.item()) == pytest.approx(oracle.bounds(c), rel=1e-14)
        assert max(r, q) <= w * (1 + 1e-12)


def test_dual_value_of_any_potential_is_a_bound() -> None:
    cost = costs(16, 13)
    exact = cost.new_tensor([oracle.w1(c) for c in cost.numpy()])
    for scale in (0.0, 0.1, 1.0, 10.0):
        assert (
            reference.dual_value(cost, scale * torch.randn(4, 16).double()) <= exact + 1e-12
        ).all()
    # no bound without the c-transform of that very potential
    assert (reference.dual_value(cost, cost.amin(2)) > 0.5 * exact).all()


@pytest.mark.parametrize("n_iters", [1, 2, 3, 4, 5, 10, 11, 50])
@pytest.mark.parametrize("reg", [0.03, 0.6])
def test_unconverged_value_is_never_below_the_bounds(reg: float, n_iters: int) -> None:
    """Two clusters of unequal mass: plain <P, C> was 22.5 where the truth is 42.6."""
    cost = costs(30, 30)
    cost[0] = 0.01
    cost[0, :9, 12:] = cost[0, 9:, :12] = 60.0
    seen = reference.sinkhorn(cost, reg, n_iters=n_iters, tol=0.0)
    assert (seen.iterations == n_iters).all()
    for c, value in zip(cost.numpy(), seen.value.tolist(), strict=True):
        assert value >= max(oracle.bounds(c)) * (1 - 1e-12)
    # the potential that moves 10 % of the mass between the clusters is found in one c-transform
    exact = oracle.w1(cost[0].numpy())
    assert exact == pytest.approx(0.1 * 60 + 0.9 * 0.01)
    assert seen.value[0] <= exact + reg * math.log(30)
    assert seen.residual[0] > 1e-3


@pytest.mark.parametrize("reg", [0.15, 0.6])
def test_odd_and_even_counts_agree(reg: float) -> None:
    """A value that flips its sign at even counts (POT #842) passes tests of odd ones."""
    cost = costs(16, 16)
    limit = reference.sinkhorn(cost, reg).value
    values = [reference.sinkhorn(cost, reg, n_iters=k, tol=0.0).value for k in range(1, 13)]
    errors = torch.stack([(v - limit).abs() / limit for v in values])
    assert (errors < 0.2).all()
    assert (errors[-2:] < errors[:2]).all()


def test_stops_when_the_residual_is_small_and_not_when_it_is_large() -> None:
    cost = costs(40, 33)
    before = torch.zeros(4, dtype=torch.int64)
    for tol in (10.0, 0.3, 1e-2, 1e-4, 1e-6):
        seen = reference.sinkhorn(cost, 0.3, tol=tol)
        assert (seen.residual <= tol).all()
        assert (seen.iterations >= before).all()
        taken = int(seen.iterations[0])
        last_look = max(1, taken - reference.CHECK_EVERY)
        assert taken == 1 or reference.sinkhorn(cost[:1], 0.3, last_look, tol).residual[0] > tol
        before = seen.iterations
    assert before.min() > 10
    assert (reference.sinkhorn(cost, 0.3, tol=10.0).iterations == 1).all()
    assert (reference.sinkhorn(cost, 0.3, tol=0.0, n_iters=7).iterations == 7).all()


def test_each_problem_stops_by_itself() -> None:
    """Solved next to a slow problem, one is what it is alone."""
    cost = costs(30, 30)
    cost[3] = 0.01
    cost[3, :9, 12:] = cost[3, 9:, :12] = 60.0
    together = reference.sinkhorn(cost, 0.3)
    assert together.iterations.max() == together.iterations[3] > 3 * together.iterations[0]
    for i in range(4):
        alone = reference.sinkhorn(cost[i : i + 1], 0.3)
        assert alone.iterations[0] == together.iterations[i]
        assert alone.value[0].item() == pytest.approx(together.value[i].item(), rel=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_over_relaxation_never_diverges(seed: int) -> None:
    """Costs on which omega = 1.9 does: heavy tails, eps down to 1e-4 of the largest cost."""
    generator = torch.Generator().manual_seed(seed)
    cost = torch.rand(10, 12, 9, generator=generator, dtype=torch.float64) ** 8 * 10 ** (seed - 2.0)
    reg = 1e-4 * 10 ** (seed - 2.0)
    seen = [reference.sinkhorn(cost, reg, n_iters=k, tol=0.0) for k in (10, 100, 1000)]
    exact = cost.new_tensor([oracle.w1(c) for c in cost.numpy()])
    slack = reg * math.log(12)
    for s in seen:
        assert (s.residual < 2).all()
    assert (seen[2].residual <= seen[0].residual).all()
    assert ((seen[2].value - exact).abs() <= slack + 1e-3 * exact).all()


def test_cost_must_be_finite() -> None:
    cost = costs(5, 5)
    cost[2, 1, 1] = torch.nan
    with pytest.raises(ValueError, match="cost must be finite"):
        reference.sinkhorn(cost, 0.1)


def test_repeated_points_are_one() -> None:
    """Diracs: n copies of x against m copies of y cost |x - y|, at any regularisation."""
    x, y = torch.tensor([[1.0, 2.0, 2.0]]), torch.tensor([[1.0, -2.0, -1.0]])
    seen = reference.pair_distances(x.repeat(7, 1), y.repeat(5, 1), reg=0.3)
    assert seen.item() == pytest.approx(5.0, rel=1e-12)


@pytest.mark.parametrize(("n", "m"), [(1, 5), (9, 9), (12, 7), (30, 31)])
def test_exact_on_a_line(n: int, m: int) -> None:
    x, y = torch.randn(n, 1), torch.randn(m, 1) * 2 + 1
    wanted = oracle.w1_on_a_line(x[:, 0].double().numpy(), y[:, 0].double().numpy())
    assert reference.pair_distances(x, y, distance="exact").item() == pytest.approx(
        wanted, rel=1e-9
    )
    near = reference.pair_distances(x, y, reg=0.05, reg_unit="cost").item()
    assert wanted * (1 - 1e-6) <= near <= wanted + 0.05 * math.log(n) + 1e-6


def test_identical_spans_have_a_small_distance_and_exactly_0_without_entropy() -> None:
    x = Text(5)(16)
    assert reference.pair_distances(x, x, distance="exact").item() == 0
    assert reference.pair_distances(x, x, distance="chamfer").item() == 0
    assert reference.pair_distances(x, x, distance="mmd").item() == 0
    assert reference.pair_distances(x, x, distance="cosine").item() < 1e-12
    tight, loose = (reference.pair_distances(x, x, reg=r).item() for r in (0.01, 0.3))
    assert 0 <= tight < 1e-6 < loose < 0.3 * 8.5 * math.log(16)


def test_chamfer_mmd_and_cosine_by_hand() -> None:
    cost = torch.tensor([[[1.0, 5.0, 2.0], [4.0, 3.0, 6.0]]], dtype=torch.float64)
    assert reference.chamfer(cost).item() == ((1 + 3) / 2 + (1 + 3 + 2) / 3) / 2
    x, y = numbers(0.0, 2.0)[None].double(), numbers(1.0)[None].double()
    k = [math.exp(-(c**2) / (2 * 1.5**2)) for c in (0, 1, 2)]
    squared = (2 * k[0] + 2 * k[2]) / 4 + k[0] - 2 * k[1]
    assert reference.mmd(x, y, sigma=1.5).item() == pytest.approx(1.5 * math.sqrt(squared))
    wide = reference.mmd(x + 1, y, sigma=1e4).item()
    assert wide == pytest.approx(1.0, rel=1e-6)  # the distance of the means
    a = torch.tensor([[[3.0, 0.0], [0.0, 1.0]]], dtype=torch.float64)  # mean (1.5, 0.5)
    b = torch.tensor([[[1.0, 3.0]]], dtype=torch.float64)
    cos = (1.5 * 1 + 0.5 * 3) / math.sqrt(2.5 * 10)
    assert reference.cosine(a, b, mean_norm=7.0).item() == pytest.approx(7 * (1 - cos))
    assert reference.cosine(a, b - b, mean_norm=7.0).item() == 7.0
    assert reference.cosine(a, -a, mean_norm=7.0).item() == pytest.approx(14.0)


def test_steps_with_one_token_spans() -> None:
    """Norms 5, 5, 3, 13: mean 6.5. Costs 4, sqrt 90 / sqrt 34, 8. Nothing else may count."""
    correct = torch.tensor([[3.0, 4.0], [0.0, 5.0]])
    incorrect = torch.tensor([[3.0, 0.0], [0.0, 13.0]])
    ignored, alone = torch.full((3, 2), 900.0), torch.ones(2, 2)
    rollouts = [ignored, correct, torch.zeros(0, 2), incorrect, alone]
    arguments = call(rollouts, [-1, 1, 1, 0, 1], [7, 7, 7, 7, -3])
    found = reference.span_distances(*arguments, span=1, stride=1)
    root = math.sqrt(34)
    inf = math.inf
    assert found.distance.tolist() == pytest.approx([inf] * 3 + [4, root, 4, 8] + [inf] * 2)
    assert found.nearest.tolist() == [-1, -1, -1, 5, 5, 3, 4, -1, -1]
    assert found.rollout.tolist() == [0, 0, 0, 1, 1, 3, 3, 4, 4]
    assert found.begin.tolist() == list(range(9))
    assert found.end.tolist() == list(range(1, 10))
    assert found.iterations.tolist() == [0, 0, 0, 1, 1, 1, 1, 0, 0]
    assert found.pairs == (4, 0, 0, 4, 0)
    weights = reference.span_weights(*arguments, span=1, stride=1)
    wanted = [1, 1, 1, 4 / 6.5, root / 6.5, 4 / 6.5, 8 / 6.5, 1, 1]
    assert weights.tolist() == pytest.approx(wanted, rel=1e-12)


# Spans (0, 2) and (2, 6) against one token at 1 cost 1 and 3; norms 0, 2, 6 and 1, mean 9/4.
LINE = call([numbers(0.0, 2.0, 6.0), numbers(1.0)], [1, 0])
STEPS: list[tuple[dict[str, Any], list[float]]] = [
    ({}, [4 / 9, 12 / 9, 12 / 9, 4 / 9]),
    ({"pooling": "mean"}, [4 / 9, 8 / 9, 12 / 9, 4 / 9]),
    ({"aggregation": "mean"}, [4 / 9, 12 / 9, 12 / 9, 8 / 9]),
    ({"normalization": "rollout"}, [3 / 8, 9 / 8, 9 / 8, 1]),
    (
        {"normalization": "rollout", "pooling": "mean", "aggregation": "mean"},
        [3 / 8, 6 / 8, 9 / 8, 2],
    ),
    ({"distance": "exact"}, [4 / 9, 12 / 9, 12 / 9, 4 / 9]),
    # R = (1 + 1) / 2, Q = 1; R = (1 + 5) / 2, Q = 1
    ({"distance": "chamfer"}, [4 / 9, 8 / 9, 8 / 9, 4 / 9]),
    ({"distance": "cosine"}, [0, 0, 0, 0]),
    ({"reg": 0.5}, [4 / 9, 12 / 9, 12 / 9, 4 / 9]),
]


@pytest.mark.parametrize(("config", "wanted"), STEPS, ids=lambda v: str(v))
def test_steps_with_overlapping_spans(config: dict[str, Any], wanted: list[float]) -> None:
    weights = reference.span_weights(*LINE, span=2, stride=1, **config)
    assert weights.tolist() == pytest.approx(wanted, rel=1e-12)


def test_mean_aggregation_reports_the_worst_residual_and_the_nearest_span() -> None:
    problem = BY_NAME["text"]
    config = {**problem.config, "n_iters": 30, "tol": 1e-3}
    found = reference.span_distances(*problem.arguments().values(), **config)
    mean = reference.span_distances(*problem.arguments().values(), **config, aggregation="mean")
    assert torch.equal(mean.nearest, found.nearest)
    assert (mean.distance > found.distance).all()
    assert (mean.residual >= found.residual).all()
    assert (mean.residual > found.residual).any()
    assert (mean.iterations >= found.iterations).all()


def test_ties_go_to_the_lowest_span() -> None:
    x = numbers(0.0)
    arguments = call([numbers(5.0), numbers(2.0), x, numbers(-2.0), numbers(2.0)], [0, 0, 1, 0, 0])
    assert reference.span_distances(*arguments).nearest.tolist() == [2, 2, 1, 2, 2]


@pytest.mark.parametrize("labels", [[1, 1, 1], [0, 0, 0], [-1, -1, -1], [1, -1, 1], [-1, 0, 0]])
def test_without_an_opposing_set_weights_are_exactly_1(labels: list[int]) -> None:
    rollouts = Text(6, 8).rollouts(5, 20, 9)
    weights = reference.span_weights(*call(rollouts, labels), span=8, stride=4)
    assert (weights == 1).all()
    other = reference.span_weights(*call(rollouts, [1, 0, -1]), span=8, stride=4)
    assert (other[:25] != 1).all()
    assert (other[25:] == 1).all()


@pytest.mark.parametrize("distance", ["sinkhorn", "chamfer", "mmd", "cosine", "exact"])
@pytest.mark.parametrize("reg_unit", ["mean_norm", "cost"])
def test_all_states_zero(distance: str, reg_unit: str) -> None:
    arguments = call([torch.zeros(5, 3), torch.zeros(4, 3), torch.ones(2, 3)], [1, 0, -1])
    config = {"distance": distance, "reg_unit": reg_unit, "span": 3, "stride": 2}
    assert reference.span_weights(*arguments, **config).tolist() == [0] * 9 + [1] * 2


def test_states_must_be_finite() -> None:
    hidden, *rest = call(Text(8, 4).rollouts(6, 7, 5, 4), [1, 0, 1, 0], [1, 1, 2, 2])
    config = {"span": 3, "stride": 2, "reg": 0.3}
    wanted = reference.span_weights(hidden, *rest, **config)
    hidden[15, 2] = torch.nan
    with pytest.raises(ValueError, match="hidden must be finite"):
        reference.span_weights(hidden, *rest)
    weights = reference.span_weights(hidden, *rest, **config, check_finite=False)
    assert weights[13:].isnan().all()
    assert torch.equal(weights[:13], wanted[:13])


def test_unknown_parameters_raise() -> None:
    with pytest.raises(TypeError, match="epsilon"):
        reference.span_weights(*LINE, epsilon=1.0)
    with pytest.raises(ValueError, match=r"distance must be one of .*, got 'l2'"):
        reference.span_weights(*LINE, distance="l2")
    for name in ("normalization", "pooling", "aggregation", "reg_unit"):
        with pytest.raises(KeyError, match="other"):
            reference.span_weights(*LINE, **{name: "other"})


def test_parameters_are_those_of_span_config() -> None:
    config = SpanConfig()
    own = reference.Parameters()._asdict()
    assert own.keys() == vars(config).keys()
    same = {name: value for name, value in own.items() if name not in ("n_iters", "tol")}
    assert same == {name: getattr(config, name) for name in same}
    assert own["n_iters"] >= 10 * config.n_iters
    assert own["tol"] <= config.tol / 1000


def test_exact_without_pot_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ImportError, match=r"shear_ops\[pot\]"):
        reference.span_weights(*LINE, distance="exact")


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_pipeline_against_loops(problem: Problem) -> None:
    """Spans, groups, minima, norms and pooling of every problem, with a cheap distance."""
    given = problem.arguments()
    config = {**problem.config, "distance": "chamfer"}
    seen = reference.span_weights(*given.values(), **config)
    hidden, *rest = (t.tolist() for t in given.values())
    wanted = oracle.span_weights(
        np.array(hidden).reshape(given["hidden"].shape), *rest, oracle.chamfer, config
    )
    assert seen.numpy() == pytest.approx(wanted, rel=1e-11, abs=1e-13)


def test_table_is_not_trivial() -> None:
    assert len(BY_NAME) == len(PROBLEMS) >= 45
    varied = 0
    for problem in PROBLEMS:
        config = {**problem.config, "distance": "chamfer"}
        weights = reference.span_weights(*problem.arguments().values(), **config)
        varied += len(weights) > 0 and weights.max().item() - weights.min().item() > 1e-3
    assert varied >= 0.75 * len(PROBLEMS)
    assert {torch.float16 in p.dtypes for p in PROBLEMS} == {True, False}


INVARIANT: dict[str, dict[str, Any]] = {
    "sinkhorn": {"reg": 2.0, "tol": 1e-9},
    "chamfer": {"distance": "chamfer"},
    "mmd": {"distance": "mmd"},
    "exact": {"distance": "exact"},
}
SHARED = BY_NAME["shared prefix"]


def distances_of(x: Tensor, y: Tensor, **config: Any) -> Tensor:
    return reference.pair_distances(x, y, **{"span": 12, "stride": 5, "reg_unit": "cost", **config})


@pytest.fixture
def two() -> tuple[Tensor, Tensor]:
    text = Text(77)
    return text(31), text(26)


@pytest.mark.parametrize("config", INVARIANT.values(), ids=INVARIANT)
def test_swapping_transposes(two: tuple[Tensor, Tensor], config: dict[str, Any]) -> None:
    seen = distances_of(*two, **config)
    assert seen.shape == (5, 4)
    assert seen.std() > 0.01
    assert torch.allclose(distances_of(*reversed(two), **config).T, seen, rtol=1e-7)


@pytest.mark.parametrize("offset", [100.0, 1000.0])
def test_translation_changes_nothing(two: tuple[Tensor, Tensor], offset: float) -> None:
    for config in INVARIANT.values():
        if config.get("distance") == "mmd":
            continue  # its sigma is the mean norm
        seen = distances_of(*(t.double() + offset for t in two), **config)
        assert torch.allclose(seen, distances_of(*two, **config), rtol=1e-8)


@pytest.mark.parametrize("scale", [1e-4, 3.0, 1e6])
@pytest.mark.parametrize("config", INVARIANT.values(), ids=INVARIANT)
def test_scaling_the_states_scales_distances_and_keeps_weights(
    config: dict[str, Any], scale: float
) -> None:
    config = {**config, "reg": 0.2}
    hidden, *rest = SHARED.arguments().values()
    config |= {"span": 24, "stride": 12}
    before = reference.span_distances(hidden, *rest, **config)
    after = reference.span_distances(hidden.double() * scale, *rest, **config)
    assert torch.allclose(after.distance, before.distance * scale, rtol=1e-7)
    weights = reference.token_weights(before, hidden, *rest, **config)
    scaled = reference.token_weights(after, hidden.double() * scale, *rest, **config)
    assert torch.allclose(scaled, weights, rtol=1e-7)


def test_shifting_the_cost_shifts_the_value() -> None:
    cost = costs(16, 13)
    seen = reference.sinkhorn(cost + 7, 0.6, tol=1e-9).value
    assert torch.allclose(seen, reference.sinkhorn(cost, 0.6, tol=1e-9).value + 7, rtol=1e-9)


@pytest.mark.parametrize("config", [*INVARIANT.values(), {"distance": "cosine"}], ids=str)
def test_order_inside_a_span_does_not_matter(
    two: tuple[Tensor, Tensor], config: dict[str, Any]
) -> None:
    x, y = two
    config = {**config, "span": 40, "stride": 40}
    seen = distances_of(x[torch.randperm(31)], y[torch.randperm(26)], **config)
    assert torch.allclose(seen, distances_of(x, y, **config), rtol=1e-8)


@pytest.mark.parametrize("config", [*INVARIANT.values(), {"distance": "cosine"}], ids=str)
def test_repeating_every_token_changes_nothing(
    two: tuple[Tensor, Tensor], config: dict[str, Any]
) -> None:
    x, y = two
    config = {**config, "span": 100, "stride": 100}
    twice = distances_of(x.repeat_interleave(2, 0), y.repeat(2, 1), **config)
    assert torch.allclose(twice, distances_of(x, y, **config), rtol=1e-7)


def test_order_of_rollouts_and_other_groups_change_nothing() -> None:
    rollouts = Text(78, 16).rollouts(20, 9, 31, 14, 25)
    labels, groups = [1, 0, 0, 1, 1], [3, 3, 3, 3, 9]
    config = {"span": 10, "stride": 4, "reg": 0.1}
    wanted = reference.span_weights(*call(rollouts, labels, groups), **config).split(
        [len(r) for r in rollouts]
    )
    assert wanted[0].std() > 0.01
    order = [4, 2, 1, 3, 0]
    extra = Text(79, 16)(12) * 50
    seen = reference.span_weights(
        *call(
            [extra, *(rollouts[i] for i in order), extra],
            [1, *(labels[i] for i in order), 0],
            [5, *(groups[i] for i in order), 5],
        ),
        **config,
    ).split([12, *(len(rollouts[i]) for i in order), 12])
    for part, i in zip(seen[1:-1], order, strict=True):
        assert torch.allclose(part, wanted[i], rtol=1e-10)


@pytest.mark.parametrize("name", ["two clusters", "two clusters, reg 0.01", "reg 0.005"])
def test_slow_mixing_is_reported(name: str) -> None:
    problem = BY_NAME[name]
    assert problem.slow_mixing
    arguments = problem.arguments().values()
    early = reference.span_distances(*arguments, **problem.config, n_iters=20, tol=5e-3)
    limit = reference.span_distances(*arguments, **problem.config, tol=1e-5)
    assert early.residual.max() > 5e-3
    assert early.iterations.max() == 20
    assert early.pairs[4] > 0
    assert limit.residual.max() <= 1e-5
    assert limit.pairs[4] == 0
    assert ((early.distance - limit.distance).abs() / limit.distance).max() > 2e-3
