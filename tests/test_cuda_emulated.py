"""The CUDA backend on a CPU: its kernels and operators compiled by g++, with the headers of
tests/emulated before those of csrc, as torch.ops.shear_emulated, with chunks of 64 KiB."""

from __future__ import annotations

import ctypes
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import shear_ops
import solver_steps
from problems import (
    AVERAGES,
    DTYPES,
    PROBLEMS,
    SHOWS,
    Text,
    one_group,
    problem,
    rounding_shows_in_one_group,
)
from shear_ops import _C, SpanConfig, reference
from shear_ops.ops import backends, torch_op
from test_backends import BY_NAME, TOLERANCES, converged, mean_norms, resolution

ROOT = Path(__file__).parents[1]
SOURCES = [
    *(f"csrc/cuda/{name}.cu" for name in ("span_weights", "pipeline", "token_cost", "sinkhorn")),
    *(f"csrc/{name}.cpp" for name in ("problem", "chunks", "cuda/plan")),
    "tests/emulated/order.cpp",
    "tests/emulated/rows.cpp",
]
DEFINITIONS = torch.library.Library("shear_emulated", "DEF")
NAMES = torch_op.NAMES
COMPUTED = backends.DISTANCES["cuda"]
CASES = [
    (p.name, dtype)
    for p in PROBLEMS
    for dtype in DTYPES
    if dtype in p.dtypes and p.config.get("distance", "sinkhorn") in COMPUTED
]
FIELDS = ("distance", "nearest", "residual", "iterations", "spans", "pairs")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which("g++")
    if compiler is None or platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("the emulation needs g++ on x86-64")
    out = tmp_path_factory.mktemp("emulated")
    torch_dir = Path(torch.__file__).parent
    flags = (
        f"-x c++ -O2 -std=c++20 -fPIC -fvisibility=hidden -ffp-contract=off -Wall -Werror "
        f"-Wno-unknown-pragmas -DSHEAR_DEVICE_CHUNK_BYTES=65536 "
        f"-DTORCH_TARGET_VERSION=0x020a000000000000 -Itests/emulated -Icsrc "
        f"-isystem {torch_dir}/include"
    ).split()

    def compile_one(source: str) -> str:
        target = str(out / f"{source.replace('/', '_')}.o")
        subprocess.run([compiler, *flags, "-c", source, "-o", target], cwd=ROOT, check=True)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, SOURCES))
    module = out / "shear_emulated.so"
    subprocess.run(
        [compiler, "-shared", "-o", str(module), *objects, f"-L{torch_dir}/lib", "-ltorch",
         "-ltorch_cpu"], check=True,
    )  # fmt: skip
    for name in NAMES:
        schema = str(getattr(torch.ops.shear, name).default._schema)
        DEFINITIONS.define(schema.removeprefix("shear::"))
    torch.ops.load_library(module)
    return ctypes.CDLL(str(module))


@pytest.fixture(autouse=True)
def threads_in_order(library: ctypes.CDLL) -> None:
    library.shear_emulated_order(0)


def span_distances(given: dict[str, Tensor], config: dict[str, Any], **options: Any) -> Any:
    arguments = {**SpanConfig(**config).op_arguments(), **options}
    found = torch.ops.shear_emulated.span_distances(*given.values(), **arguments)
    return dict(zip(FIELDS, found, strict=True))


@pytest.mark.parametrize(("name", "dtype"), CASES, ids=lambda v: str(v).removeprefix("torch."))
def test_against_float64(name: str, dtype: torch.dtype) -> None:
    case = BY_NAME[name]
    given, config = case.arguments(dtype), SpanConfig(**case.config)
    found, wanted = span_distances(given, case.config), converged(name, dtype)
    assert torch.equal(found["spans"], torch.stack([wanted.rollout, wanted.begin, wanted.end], 1))
    assert torch.equal(found["distance"].isinf(), wanted.distance.isinf())
    assert torch.equal(found["nearest"] < 0, wanted.nearest < 0)
    total, bounded, abandoned, solved, _ = found["pairs"].tolist()
    assert total == wanted.pairs[0] == bounded + abandoned + solved

    stopped = found["iterations"] >= config.n_iters
    if "n_iters" not in case.config:
        assert not stopped.any()
    some = (wanted.nearest >= 0) & ~stopped
    scale = resolution(config, mean_norms(given))[wanted.rollout]
    allowed = TOLERANCES[config.distance][dtype] * torch.maximum(wanted.distance, scale)
    error = (found["distance"].double() - wanted.distance).abs()
    assert (error <= allowed)[some].all(), (error / allowed)[some].max()


@pytest.mark.parametrize("name", sorted({name for name, _ in CASES}))
def test_weights_and_distances_are_those_of_the_cpu_backend(name: str) -> None:
    """Within 1e-4 of another implementation of the same method: the rest is rounding."""
    case = BY_NAME[name]
    given, options = case.arguments(), SpanConfig(**case.config).op_arguments()
    wanted = torch.ops.shear.span_weights(*given.values(), **options)
    seen = torch.ops.shear_emulated.span_weights(*given.values(), **options)
    torch.testing.assert_close(seen, wanted, rtol=2e-3 if case.slow_mixing else 1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "name", sorted({n for n, _ in CASES} - {"a whole tile and more", "dim 4096"})
)
def test_no_bit_depends_on_pruning_or_who_comes_first(name: str, library: ctypes.CDLL) -> None:
    case = BY_NAME[name]
    wanted = span_distances(case.arguments(), case.config)
    for order, prune in ((0, False), (1, True), (2, True), (2, False)):
        library.shear_emulated_order(order)
        found = span_distances(case.arguments(), case.config, prune=prune)
        for field in FIELDS[:5]:
            assert torch.equal(found[field], wanted[field]), (order, prune, field)


def rows_of(states: Tensor, library: ctypes.CDLL) -> tuple[Tensor, Tensor, Tensor]:
    """Int8 rows, steps and center of the states of one group."""
    tokens, dim = states.shape
    rows = torch.empty(tokens, -(-dim // 64) * 64, dtype=torch.int8)
    scale, center = torch.empty(tokens), torch.empty(dim)
    dtype = [torch.float32, torch.float16, torch.bfloat16].index(states.dtype)
    sizes = dtype, ctypes.c_int64(tokens), ctypes.c_int64(dim)
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (states, rows, scale, center)]
    library.shear_emulated_rows(pointers[0], *sizes, *pointers[1:])
    return rows, scale, center


def states_to_round(kind: str, dim: int) -> Tensor:
    text = Text(dim, dim)
    states = torch.cat(text.rollouts(21, 12))
    if kind == "sinks":
        states[::9, 7] = 3000.0
        states[4] = 0
    if kind == "zero center":
        states = torch.cat([states, -states, torch.zeros(2, dim)])
    if kind == "one token":
        states = states[:1].expand(30, dim).contiguous()
    return states


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("kind", "dim"),
    [("text", 65), ("sinks", 130), ("sinks", 200), ("zero center", 640), ("one token", 72)],
)
def test_int8_rows_are_those_of_the_cpu_backend(
    kind: str, dim: int, dtype: torch.dtype, library: ctypes.CDLL
) -> None:
    states = states_to_round(kind, dim).to(dtype)
    wanted = [torch.from_numpy(a) for a in _C.int8_rows(states.float().numpy())]
    for order in (0, 2):
        library.shear_emulated_order(order)
        for seen, same in zip(rows_of(states, library), wanted, strict=True):
            assert torch.equal(seen, same)
    rows, scale, center = wanted
    assert (center == 0).all() == (kind == "zero center")
    at_center = 2 if kind == "zero center" else 0
    if kind == "one token" and dtype != torch.float32:  # else the center is a rounded one
        at_center = len(states)
    assert (scale == 0).sum() == at_center
    assert (rows[scale > 0].abs().amax(1) == 127).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_second_look_leaves_no_rounding(dtype: torch.dtype) -> None:
    """Distances of the nearest spans are bitwise those of pair_distances, which never rounds."""
    case = problem("", Text(5, 90).rollouts(70, 83), [0, 1], span=20, stride=9, reg=0.1)
    given = case.arguments(dtype)
    found = span_distances(given, case.config)
    total, bounded, abandoned, solved, _ = found["pairs"].tolist()
    assert total == bounded + abandoned + solved
    y, x = given["hidden"].split([70, 83])
    options = SpanConfig(**case.config).op_arguments()
    matrix = torch.ops.shear_emulated.pair_distances(x, y, **options)
    cols, rows = matrix.shape[1], matrix.shape[0]
    nearest = found["nearest"]
    assert ((nearest[:cols] >= cols) & (nearest[cols:] < cols).all()).all()
    exact = matrix[
        torch.cat([nearest[:cols] - cols, torch.arange(rows)]),
        torch.cat([torch.arange(cols), nearest[cols:]]),
    ]
    assert torch.equal(found["distance"], exact)
    unpruned = span_distances(given, case.config, prune=False)
    assert unpruned["pairs"].tolist() == [total, 0, 0, total, 0]
    for field in FIELDS[:5]:
        assert torch.equal(unpruned[field], found[field])


def assert_same_alone(given: dict[str, Tensor], group: int, config: dict[str, Any]) -> Any:
    """What a group finds does not depend on the others; returns the counts of its own call."""
    whole = span_distances(given, config)
    mine, alone = one_group(given, group)
    found = span_distances(alone, config)
    where = torch.isin(whole["spans"][:, 0], mine).nonzero()[:, 0]
    for field in ("distance", "residual", "iterations"):
        assert torch.equal(found[field], whole[field][where]), field
    some = found["nearest"] >= 0
    assert torch.equal(where[found["nearest"][some]], whole["nearest"][where][some])
    return found["pairs"]


def test_no_bit_depends_on_other_groups() -> None:
    case = BY_NAME["interleaved groups"]
    given = case.arguments()
    for group in given["group_ids"].unique():
        assert_same_alone(given, int(group), case.config)


@pytest.mark.parametrize(("dtype", "order"), [(torch.float32, 0), (torch.bfloat16, 2)])
def test_rounding_that_shows_is_noticed(
    dtype: torch.dtype, order: int, library: ctypes.CDLL
) -> None:
    """That group is what pair_distances, which never rounds, says bit by bit; the other is as if it
    were alone."""
    library.shear_emulated_order(order)
    case = rounding_shows_in_one_group(reg=2.0, reg_unit="cost")
    given, options = case.arguments(dtype), SpanConfig(**case.config).op_arguments()
    for group in (SHOWS, AVERAGES):
        assert_same_alone(given, group, case.config)
    found = span_distances(given, case.config)
    mine, _ = one_group(given, SHOWS)
    rows = given["hidden"].split(given["cu_seqlens"].diff().tolist())
    rollouts = [[i for i in mine if given["labels"][i] == label] for label in (1, 0)]
    exact = torch.cat([
        torch.cat([
            torch.ops.shear_emulated.pair_distances(rows[i], rows[j], **options)
            for j in rollouts[1]
        ], 1)
        for i in rollouts[0]
    ])  # fmt: skip
    correct, incorrect = (
        torch.isin(found["spans"][:, 0], torch.stack(side)).nonzero()[:, 0] for side in rollouts
    )
    for spans, others, matrix in ((correct, incorrect, exact), (incorrect, correct, exact.T)):
        assert torch.equal(found["distance"][spans], matrix.amin(1))
        assert torch.equal(found["nearest"][spans], others[matrix.argmin(1)])

    weights = torch.ops.shear_emulated.span_weights(*given.values(), **options)
    spans = found["spans"].unbind(1)
    values = (found[field] for field in FIELDS[:4])
    wanted = reference.token_weights(
        reference.Distances(*values, *spans, found["pairs"]), *given.values(), **case.config
    )
    torch.testing.assert_close(weights.double(), wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize("prune", [False, True])
def test_rounding_that_shows_shows_once(prune: bool) -> None:
    """Pairs are those of the first look; of those that n_iters stops each look has its own."""
    case = rounding_shows_in_one_group(n_iters=1)
    total, *rest = span_distances(case.arguments(), case.config, prune=prune)["pairs"].tolist()
    of_group = (2 * 5) * (2 * 5)
    assert sum(rest[:3]) == total
    if not prune:
        assert rest == [0, 0, total, total + of_group]


def test_a_pair_is_stopped_once() -> None:
    """Two spans are nearest to each other; their pair takes 37 iterations, and 40 at the second look."""
    rollouts, stopped = Text(24, 72).rollouts(44, 52, 44), []
    for n_iters in (39, 41):
        case = problem("", rollouts, [1, 0, 1], span=16, stride=7, n_iters=n_iters)
        given, options = case.arguments(), SpanConfig(**case.config).op_arguments()
        seen = span_distances(given, case.config, prune=False)["pairs"]
        wanted = torch.ops.shear.span_distances(*given.values(), **{**options, "prune": False})[5]
        assert torch.equal(seen, wanted)
        stopped.append(int(seen[4]))
    assert stopped == [7, 6]


# spans of every solver, strides with and without column minima, states that are rounded to int8
# and states that are not 16-byte rows
SHAPES = [
    (span, stride, dim)
    for span, stride in ((32, 8), (33, 9), (64, 16), (65, 40), (100, 25), (101, 33), (128, 128),
                         (129, 50), (260, 260))
    for dim in (72, 23)
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("span", "stride", "dim"), SHAPES)
def test_every_solver_and_tile(span: int, stride: int, dim: int, dtype: torch.dtype) -> None:
    case = problem(
        "", Text(span, dim).rollouts(span + stride + 3, 260, span), [1, 0, 0],
        span=span, stride=stride, reg=0.1,
    )  # fmt: skip
    given = case.arguments(dtype)
    found = span_distances(given, case.config)
    wanted = shear_ops.span_distances(**given, config=SpanConfig(**case.config), backend="cpu")
    assert wanted.distance.std() > 0
    torch.testing.assert_close(found["distance"], wanted.distance, rtol=1e-4, atol=0)
    again = span_distances(given, case.config, prune=False)
    assert torch.equal(again["distance"], found["distance"])


@pytest.mark.parametrize("tokens", [0, 1, 16, 17, 70])
@pytest.mark.parametrize("distance", COMPUTED)
def test_pair_distances(tokens: int, distance: str) -> None:
    options = SpanConfig(span=16, stride=5, distance=distance).op_arguments()
    x, y = Text(1, 6).rollouts(tokens, 41)
    seen = torch.ops.shear_emulated.pair_distances(x, y, **options)
    wanted = torch.ops.shear.pair_distances(x, y, **options)
    assert seen.shape == wanted.shape
    torch.testing.assert_close(seen, wanted, rtol=1e-4, atol=0)


SIZES = [(1, 1), (7, 31), (32, 32), (33, 5), (64, 64), (100, 100), (3, 101), (128, 127), (129, 40),
         (250, 260)]  # fmt: skip


@pytest.mark.parametrize(("n", "m"), SIZES)
def test_sinkhorn(n: int, m: int) -> None:
    generator = torch.Generator().manual_seed(n)
    cost = torch.cdist(
        torch.randn(3, n, 4, generator=generator), torch.randn(3, m, 4, generator=generator)
    )
    cost[1] -= 20  # any sign
    rows, cols = torch.tensor([n, n, (n + 1) // 2]), torch.tensor([m, m, (m + 1) // 2])
    cost[2, int(rows[2]) :] = 1e9  # outside the rows in use
    value, residual, iterations = torch.ops.shear_emulated.sinkhorn(
        cost, rows, cols, reg=0.2, n_iters=500, tol=1e-4
    )
    for k in range(3):
        wanted = reference.sinkhorn(cost[k : k + 1, : rows[k], : cols[k]].double(), 0.2)
        shift = 20 if k == 1 else 0
        torch.testing.assert_close(
            value[k].double() + shift, wanted.value[0] + shift, rtol=1e-3, atol=1e-5
        )
    assert (residual <= 1e-4).all()
    assert (iterations < 500).all()


def test_a_reg_in_units_of_cost_far_from_the_norms() -> None:
    given = PROBLEMS[0].arguments(torch.float32)
    with pytest.raises(ValueError, match=r"reg must be in \[1e-20, 1e\+14\] times the mean norm"):
        span_distances(given, {"reg": 1e-36, "reg_unit": "cost"})


def test_stops_at_n_iters_and_recovers() -> None:
    """Small reg, where over-relaxed scalings overflow: still finite, above its bounds, and right."""
    generator = torch.Generator().manual_seed(0)
    cost = torch.rand(2, 30, 30, generator=generator) * 1000
    for n_iters in (1, 3, 7, 100, 3000):
        value, _, iterations = torch.ops.shear_emulated.sinkhorn(cost, reg=0.5, n_iters=n_iters)
        assert (iterations <= n_iters).all()
        lower = torch.stack(reference.bounds(cost.double())).amax(0)
        assert (value >= lower - 1e-3).all()
    wanted = reference.sinkhorn(cost.double(), 0.5).value
    torch.testing.assert_close(value.double(), wanted, rtol=2e-3, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_states_that_are_not_finite(bad: float) -> None:
    case = BY_NAME["interleaved groups"]
    given = case.arguments()
    given["hidden"] = given["hidden"].clone()  # the table keeps its own
    given["hidden"][7, 3] = bad
    with pytest.raises(ValueError, match=r"got NaN, Inf or larger at .* hidden\[7\]") as seen:
        span_distances(given, case.config)
    with pytest.raises(ValueError, match="hidden must be finite") as wanted:
        torch.ops.shear.span_distances(*given.values())
    assert str(seen.value) == str(wanted.value)
    y = torch.full((4, 3), bad)
    with pytest.raises(ValueError, match=r"y must be finite .* at token 0$"):
        torch.ops.shear_emulated.pair_distances(torch.ones(5, 3), y)
    options = SpanConfig(**case.config, check_finite=False).op_arguments()
    seen = torch.ops.shear_emulated.span_weights(*given.values(), **options)
    wanted = torch.ops.shear.span_weights(*given.values(), **options)
    assert seen.isnan().any()
    torch.testing.assert_close(seen, wanted, rtol=1e-4, atol=1e-6, equal_nan=True)
    with pytest.raises(ValueError, match="cost must be finite"):
        torch.ops.shear_emulated.sinkhorn(torch.full((1, 2, 2), bad), reg=0.1)


@pytest.mark.parametrize(("n", "m"), [(7, 5), (100, 3), (129, 40)])
@pytest.mark.parametrize("exponent", [-100, -60, 29, 30, 60, 100])
def test_sinkhorn_is_linear_in_a_power_of_two(exponent: int, n: int, m: int) -> None:
    cost = torch.rand(1, n, m, generator=torch.Generator().manual_seed(0))
    wanted = torch.ops.shear_emulated.sinkhorn(cost, reg=0.0625)
    unit = 2.0**exponent
    seen = torch.ops.shear_emulated.sinkhorn(cost * unit, reg=0.0625 * unit)
    assert torch.equal(seen[0] / unit, wanted[0])
    assert torch.equal(seen[2], wanted[2])
    large = torch.ops.shear_emulated.sinkhorn(cost, reg=1e9)
    torch.testing.assert_close(large[0], cost.mean((1, 2)), rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm", [1e-38, 1e-22, 1e-15, 5e18, 1.8e19])
def test_norms_out_of_range(norm: float, dtype: torch.dtype) -> None:
    case = BY_NAME["interleaved groups"]
    given = case.arguments()
    hidden = given["hidden"]
    given["hidden"] = (hidden / hidden.norm(dim=1, keepdim=True) * norm).to(dtype)
    with pytest.raises(ValueError, match=r"^hidden must") as wanted:
        torch.ops.shear.span_distances(*given.values())
    with pytest.raises(ValueError, match=r"^hidden must") as seen:
        span_distances(given, case.config)
    assert str(seen.value) == str(wanted.value)
    options = SpanConfig(**case.config, check_finite=False).op_arguments()
    weights = torch.ops.shear_emulated.span_weights(*given.values(), **options)
    wanted_weights = torch.ops.shear.span_weights(*given.values(), **options)
    assert weights.isnan().any()
    assert torch.equal(weights.isnan(), wanted_weights.isnan())


def test_refusals() -> None:
    given = BY_NAME["text"].arguments()
    for distance in ("mmd", "cosine"):
        with pytest.raises(ValueError, match="distance must be sinkhorn or chamfer"):
            span_distances(given, {"distance": distance})
    long = {
        "hidden": torch.zeros(5000, 1).normal_(), "cu_seqlens": torch.tensor([0, 4900, 5000]),
        "group_ids": torch.zeros(2, dtype=torch.int64), "labels": torch.tensor([1, 0]),
    }  # fmt: skip
    with pytest.raises(ValueError, match="span must be at most 4096 for backend 'cuda'"):
        span_distances(long, {"span": 10_000})
    for name, value in (("cu_seqlens", torch.tensor([0, 9])), ("labels", torch.tensor([[1]]))):
        with pytest.raises((RuntimeError, ValueError), match=name):
            span_distances({**given, name: value}, {})


@pytest.mark.parametrize("name", solver_steps.problems())
def test_solver_takes_the_steps_of_the_cpu(name: str) -> None:
    def solve(cost: Tensor, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
        found: tuple[Tensor, Tensor, Tensor] = torch.ops.shear_emulated.sinkhorn(cost, **options)
        return found

    solver_steps.assert_same_steps(solve, name)
