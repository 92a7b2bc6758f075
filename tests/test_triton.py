"""What only the Triton backend has: several chunks, large spans, its own checks.

Runs in Triton's interpreter (TRITON_INTERPRET=1, `make interpreted`) and on a GPU.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bench.language import Text
from torch import Tensor

import shear_ops
import solver_steps
from problems import AVERAGES, SHOWS, one_group, rounding_shows_in_one_group
from rollouts_for_tests import CONFIG, arguments
from shear_ops import _C, SpanConfig
from shear_ops.ops import backends
from test_backends import device_of, span_distances
from test_rounding import states as rounded_states

REASON = backends.status()["triton"]
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))


@pytest.fixture(scope="module")
def device() -> torch.device:
    return device_of("triton")


def moved(device: torch.device, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    given = arguments(dtype)
    return {**given, "hidden": given["hidden"].to(device)}


def in_single_blocks(plan: dict[str, Any]) -> dict[str, Any]:
    """The same plan with every block in a chunk of its own."""
    blocks, stretches, chunks = plan["blocks"].copy(), [], []
    for k, row in enumerate(blocks):
        block = dict(zip(_C.COLUMNS["block"], row, strict=True))
        row[[name.endswith(("offset", "place")) for name in block]] = 0  # into the chunk
        row[_C.COLUMNS["block"].index("col_place")] = block["row_tokens"]
        for side, place in (("row", 0), ("col", block["row_tokens"])):
            stretch = {"group": block["group"], "place": place}
            stretch |= {name: block[f"{side}_{name}"] for name in ("token", "tokens")}
            stretches.append([stretch[name] for name in _C.COLUMNS["stretch"]])
        chunk = {
            "block_begin": k,
            "block_end": k + 1,
            "stretch_begin": 2 * k,
            "stretch_end": 2 * k + 2,
            "places": block["row_tokens"] + block["col_tokens"],
            "cost_floats": block["row_tokens"] * block["ld"],
            "row_floats": block["row_tokens"] * block["col_spans"],
            "pairs": block["row_spans"] * block["col_spans"],
        }
        chunks.append([chunk[name] for name in _C.COLUMNS["chunk"]])
    return {
        **plan, "blocks": blocks, "stretches": np.array(stretches), "chunks": np.array(chunks)
    }  # fmt: skip


@pytest.mark.parametrize("distance", ["sinkhorn", "cosine"])
def test_chunks_change_no_bit(distance: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from shear_ops.triton import ops, tables

    config = SpanConfig(**CONFIG, distance=distance)
    given = arguments(dim=70)
    whole = span_distances("triton", given, config=config)
    make_plan = ops._C.make_plan
    monkeypatch.setattr(ops._C, "make_plan", lambda *a, **k: in_single_blocks(make_plan(*a, **k)))
    monkeypatch.setattr(tables, "SLICE", 1)  # several second looks
    ops._recent.clear()
    parts = span_distances("triton", given, config=config)
    used = next(reversed(ops._recent.values()))
    ops._recent.clear()
    assert len(used.chunks) > 1
    if distance == "sinkhorn":
        assert used.row_bytes == 128
        assert used.second is not None
        assert len(used.second.blocks) < len(whole.distance) / 2
    for name in ("distance", "nearest", "residual", "iterations"):
        assert torch.equal(getattr(parts, name), getattr(whole, name)), name
    assert (whole.nearest >= 0).any()
    assert parts.pairs.total == whole.pairs.total


def results(path: str) -> None:
    """Write what depends on every table of a plan."""
    from shear_ops.triton import ops

    x, y = arguments()["hidden"][:40], arguments()["hidden"][40:70]
    found: list[Tensor] = []
    for distance, dim in (("sinkhorn", 70), ("mmd", 12), ("cosine", 12)):
        config = SpanConfig(span=16, stride=12, distance=distance)
        found += span_distances("triton", arguments(dim=dim), config=config)[:6]
        given = moved(device_of("triton"))
        found.append(shear_ops.span_weights(**given, config=config, backend="triton").cpu())
    found.append(ops.pair_distances(x.to(device_of("triton")), y.to(device_of("triton"))).cpu())
    torch.save(found, path)


def other_columns() -> None:
    """From now on, _C has the columns of all tables in the opposite order, and one more in blocks."""
    tables = {name: f"{name}s" for name in ("rollout", "span", "block", "chunk")}
    tables["stretch"] = "stretches"
    make_plan = _C.make_plan

    def other_plan(*args: Any, **options: Any) -> dict[str, Any]:
        plan = make_plan(*args, **options)
        other = {name: plan[name][:, ::-1].copy() for name in tables.values()}
        blocks = other["blocks"]
        return plan | other | {"blocks": np.insert(blocks, 0, np.full(len(blocks), -1), axis=1)}

    _C.COLUMNS = {name: _C.COLUMNS[name][::-1] for name in tables}
    _C.COLUMNS["block"] = ("new", *_C.COLUMNS["block"])
    _C.make_plan = other_plan


def test_nothing_depends_on_the_order_of_columns(tmp_path: Path) -> None:
    before = "import conftest, test_triton as t; t.other_columns()"  # the interpreter as it is here
    after = f"t.results({str(tmp_path / 'reversed')!r})"
    paths = os.pathsep.join([*sys.path, str(Path(__file__).parent)])
    subprocess.run(
        [sys.executable, "-c", f"{before}; {after}"], check=True,
        env={**os.environ, "PYTHONPATH": paths},
    )  # fmt: skip
    results(str(tmp_path / "in order"))
    seen, wanted = (torch.load(tmp_path / name) for name in ("reversed", "in order"))
    assert len(seen) == len(wanted)
    for k, (a, b) in enumerate(zip(seen, wanted, strict=True)):
        assert torch.equal(a, b), k


ROWS = [(65, torch.float32), (130, torch.bfloat16), (200, torch.float16), (640, torch.float32)]


@pytest.mark.parametrize(("dim", "dtype"), ROWS, ids=lambda v: str(v).removeprefix("torch."))
def test_rows_are_those_of_the_cpu(dim: int, dtype: torch.dtype, device: torch.device) -> None:
    """Int8 rows, their scales and the centers of two groups, bit by bit."""
    from shear_ops.triton import rounding, states, tables

    half = rounded_states(dim)[:70]  # outliers, sinks, a token of zeros
    other = torch.ones(70, dim)  # all but two at the center
    other[0], other[1] = 2, 0
    hidden = torch.stack([half, other]).to(dtype)
    plan = _C.make_plan(
        [0, 40, 70, 110, 140], [0, 0, 1, 1], [1, 0, 0, 1], dim=dim, span=70, stride=70, distance=0,
        aggregation=0, every_pair=False, tokens=140, bytes_per_pair=40,
    )  # fmt: skip
    table = tables.tables_of(plan, device)
    packed = hidden.flatten(0, 1).to(device)
    known = states.measure(packed, table, center=True, norm_range=(0.0, math.inf))
    (chunk,) = table.chunks
    rows = rounding.Rows(
        torch.full((chunk.places, table.row_bytes), 55, dtype=torch.int8, device=device),
        torch.full((chunk.places,), -1.0, device=device),
    )
    rounding.round_states(packed, known.center, known.group_norm, chunk, rows)
    stretches = [dict(zip(_C.COLUMNS["stretch"], r, strict=True)) for r in plan["stretches"]]
    assert len(stretches) == 4
    for group, given in enumerate(hidden.float()):
        row, scale, center = (torch.from_numpy(a) for a in _C.int8_rows(given.numpy()))
        assert torch.equal(known.center[group].cpu(), center)
        assert (scale == 0).sum() == (68 if group else 0)
        for stretch in stretches[2 * group : 2 * group + 2]:
            assert stretch["group"] == group
            place = slice(stretch["place"], stretch["place"] + stretch["tokens"])
            begin = stretch["token"] - 70 * group
            token = slice(begin, begin + stretch["tokens"])
            assert torch.equal(rows.row[place].cpu(), row[token])
            assert torch.equal(rows.scale[place].cpu(), scale[token])


def test_second_look_changes_no_bit_with_pruning() -> None:
    """From int8 rows: pruned and not; a rollout without an opposing set keeps what it had."""
    given = {
        "hidden": torch.cat(Text(200, 70).rollouts(30, 25, 21, 18)),
        "cu_seqlens": torch.tensor([0, 30, 55, 76, 94]),
        "group_ids": torch.tensor([3, 3, 3, 4]),
        "labels": torch.tensor([1, 0, 0, 1]),
    }
    config = SpanConfig(span=16, stride=7)
    pruned = span_distances("triton", given, config=config)
    whole = span_distances("triton", given, config=config, prune=False)
    assert pruned.pairs.solved < whole.pairs.solved == whole.pairs.total
    for name in ("distance", "nearest", "residual", "iterations"):
        assert torch.equal(getattr(pruned, name), getattr(whole, name)), name
    assert (pruned.nearest < 0).any()
    assert pruned.distance[pruned.nearest < 0].isinf().all()
    wanted = span_distances("cpu", given, config=config)
    torch.testing.assert_close(pruned.distance, wanted.distance, rtol=2e-3, atol=0)


def test_rounding_that_shows_is_noticed() -> None:
    """That group is what pair_distances, which never rounds, says, but for another center of its
    products; the other is as if it were alone, bit by bit."""
    case = rounding_shows_in_one_group(reg=2.0, reg_unit="cost")
    given, config = case.arguments(), SpanConfig(**case.config)
    found = span_distances("triton", given, config=config)
    fields = ("distance", "residual", "iterations")

    mine, alone = one_group(given, AVERAGES)
    where = torch.isin(found.rollout, mine).nonzero()[:, 0]
    other = span_distances("triton", alone, config=config)
    for name in fields:
        assert torch.equal(getattr(other, name), getattr(found, name)[where]), name
    assert torch.equal(where[other.nearest], found.nearest[where])

    mine, _ = one_group(given, SHOWS)
    rows = given["hidden"].to(device_of("triton")).split(given["cu_seqlens"].diff().tolist())
    rollouts = [[i for i in mine if given["labels"][i] == label] for label in (1, 0)]
    pairs = [
        torch.cat([
            shear_ops.pair_distances(rows[i], rows[j], config=config, backend="triton").cpu()
            for j in rollouts[1]
        ], 1)
        for i in rollouts[0]
    ]  # fmt: skip
    exact = torch.cat(pairs)
    correct, incorrect = (
        torch.isin(found.rollout, torch.stack(side)).nonzero()[:, 0] for side in rollouts
    )
    for spans, others, matrix in ((correct, incorrect, exact), (incorrect, correct, exact.T)):
        torch.testing.assert_close(found.distance[spans], matrix.amin(1), rtol=2e-6, atol=0)
        assert torch.equal(found.nearest[spans], others[matrix.argmin(1)])


@pytest.mark.parametrize("prune", [False, True])
def test_counts_are_those_of_the_first_look(prune: bool) -> None:
    """But for pairs that n_iters stops: each look has its own."""
    case = rounding_shows_in_one_group(n_iters=1)
    given, config = case.arguments(), SpanConfig(**case.config)
    found = span_distances("triton", given, config=config, prune=prune).pairs
    assert found.bounded + found.abandoned + found.solved == found.total
    of_group = (2 * 5) * (2 * 5)
    if not prune:
        assert (found.solved, found.stopped) == (found.total, found.total + of_group)


def test_rules_are_those_of_solve_h(device: torch.device) -> None:
    """The level of omega and the tolerance, value by value; when the loop pauses for what."""
    import triton_rules as rules

    ratios = torch.cat([torch.linspace(0.001, 2.0, 126), torch.tensor([torch.inf, torch.nan])])
    out = torch.zeros(128, device=device)
    for level in range(_C.SOLVER["top_level"] + 1):
        levels = torch.full((128,), level, dtype=torch.int32, device=device)
        reached = torch.zeros_like(levels)
        rules.next_level_kernel[1,](levels, ratios.to(device), reached, N=128)
        assert reached.tolist() == [_C.next_level(level, ratio) for ratio in ratios.tolist()]
        rules.omega_kernel[1,](levels, out, N=128)
        assert out.tolist() == [_C.omega_of(level)] * 128

    entropies, distances = (torch.rand(128, generator=torch.Generator().manual_seed(seed)) * scale
                            for seed, scale in ((1, 1.0), (2, 5.0)))  # fmt: skip
    rules.tolerance_kernel[1,](5e-3, entropies.to(device), 0.1, distances.to(device), out, N=128)
    wanted = [
        _C.tolerance(tol=5e-3, entropy=entropy, eps=0.1, distance=distance)
        for entropy, distance in zip(entropies.tolist(), distances.tolist(), strict=True)
    ]
    assert min(wanted) < 5e-3 == pytest.approx(max(wanted))
    torch.testing.assert_close(out.cpu(), torch.tensor(wanted), rtol=1e-6, atol=0)

    sizes = [(100, 100), (100, 95), (7, 2), (400, 401), (30, 31), (512, 512)]
    for n, m in sizes:
        hidden = torch.zeros(1, dtype=torch.int32, device=device)
        rules.may_hide_kernel[1,](n, m, 5e-3, hidden)
        assert bool(hidden) == _C.may_hide(n=n, m=m, tol=5e-3), (n, m)
    assert {_C.may_hide(n=n, m=m, tol=5e-3) for n, m in sizes} == {False, True}
    for n, m in (*sizes, (8, 8), (32, 400), (33, 33), (500, 32)):
        for costs_range in (0.5, 200.0, 300.0, 5000.0):
            rules.travel_kernel[1,](n, m, 5e-3, 0.7, 0.1, costs_range, out)
            wanted_travel = _C.travel(n, m, 5e-3, entropy=0.7, eps=0.1, range=costs_range)
            assert out[0].item() == pytest.approx(wanted_travel, rel=1e-6), (n, m, costs_range)
    for costs_range in (0.0, 255.0, 257.0, 1023.0, 1025.0, 1e6):
        rules.first_heat_kernel[1,](costs_range, out)
        assert out[0].item() == _C.first_heat(costs_range)
    for longest in (2, 100, 4096):
        rules.entropy_kernel[1,](0.3, float(longest), 1.0, out)
        assert out[0].item() == pytest.approx(_C.entropy_term(0.3, math.log(longest)), rel=1e-6)


def test_pauses_of_the_solver(device: torch.device) -> None:
    """After the first iteration, for every choice of omega, for dual values; the last at n_iters."""
    import triton_rules as rules

    first, every, again = (_C.SOLVER[k] for k in ("first_check", "test_every", "finish_again"))
    duals = [first * 2**k for k in range(6)]
    for residual in (1.0, 1e-4):
        n_iters, pauses = 30, 9
        out = torch.zeros(pauses, 3, dtype=torch.int32, device=device)
        rules.schedule_kernel[1,](residual, 5e-3, n_iters, out, N=pauses)
        its = sorted(
            {1, *range(every, n_iters, every), *(d for d in duals if d < n_iters), n_iters}
        )
        assert out[:, 0].tolist() == its
        assert [it for it, due, _ in out.tolist() if due] == [d for d in duals if d < n_iters]
        wanted, from_ = [], 1
        for it in its:
            if residual < 5e-3 and it >= from_:
                wanted.append(it)
                from_ = it + again
        assert [it for it, _, settled in out.tolist() if settled] == wanted


@pytest.mark.parametrize("distance", ["sinkhorn", "chamfer", "mmd", "cosine"])
def test_pair_distances(distance: str, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(n, 8, generator=generator) for n in (50, 33))
    config = SpanConfig(span=16, stride=9, distance=distance)
    seen = shear_ops.pair_distances(x.to(device), y.to(device), config=config, backend="triton")
    wanted = shear_ops.pair_distances(x, y, config=config, backend="cpu")
    torch.testing.assert_close(seen.cpu(), wanted, rtol=1e-3, atol=1e-5)


def ragged_problems() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    x, y = (torch.randn(4, n, 4, generator=generator) for n in (40, 33))
    cost = torch.cdist(x, y) - 1  # costs of any sign
    cost[2, 7:] = 1e9  # outside the rows in use
    return cost, torch.tensor([40, 1, 7, 32]), torch.tensor([33, 33, 20, 1])


@pytest.mark.parametrize("reg", [0.5, 0.05])
@pytest.mark.parametrize("tiles", ["by size", "none"])
def test_sinkhorn(
    tiles: str, reg: float, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In registers, and by the solver of what does not fit there."""
    from shear_ops.triton import queue

    if tiles == "none":
        monkeypatch.setattr(queue, "TILES", ())
    cost, rows, columns = ragged_problems()
    given: dict[str, Any] = {"reg": reg, "n_rows": rows, "n_cols": columns}
    seen = shear_ops.sinkhorn(cost.to(device), backend="triton", **given)
    wanted = shear_ops.sinkhorn(cost, backend="cpu", **given)
    torch.testing.assert_close(seen.value.cpu(), wanted.value, rtol=1e-3, atol=1e-4)
    assert (seen.residual.cpu()[wanted.converged] <= 5e-3).all()
    assert torch.equal(seen.converged.cpu(), wanted.converged)


@pytest.mark.parametrize("size", [(200, 150), (260, 3)])
def test_sinkhorn_of_large_problems(size: tuple[int, int], device: torch.device) -> None:
    generator = torch.Generator().manual_seed(3)
    x, y = (torch.randn(1, n, 4, generator=generator) for n in size)
    wanted = shear_ops.sinkhorn(x=x, y=y, reg=0.3)
    seen = shear_ops.sinkhorn(x=x.to(device), y=y.to(device), reg=0.3, backend="triton")
    torch.testing.assert_close(seen.value.cpu(), wanted.value, rtol=1e-3, atol=0)


def test_sinkhorn_that_diverges_recovers(device: torch.device) -> None:
    """Two clusters of unequal mass at a tiny reg: scalings drift and overflow, never a NaN."""
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(1, 30, 4, generator=generator)
    y = torch.randn(1, 28, 4, generator=generator)
    x[:, :13] += 30
    y[:, :5] += 30
    cost = torch.cdist(x, y)
    for reg in (0.5, 0.02):
        wanted = shear_ops.sinkhorn(cost, reg=reg, n_iters=60)
        seen = shear_ops.sinkhorn(cost.to(device), reg=reg, n_iters=60, backend="triton")
        assert seen.value.isfinite().all()
        torch.testing.assert_close(seen.value.cpu(), wanted.value, rtol=5e-2, atol=0)


def test_sinkhorn_errors(device: torch.device) -> None:
    cost, rows, _ = ragged_problems()
    for broken in (float("nan"), float("inf")):
        cost[0, 3, 5] = broken
        with pytest.raises(ValueError, match="cost must be finite, got NaN or Inf"):
            shear_ops.sinkhorn(cost.to(device), reg=1.0, n_iters=20, backend="triton")
    cost[0, 3, 5] = 1.0
    cost[2, 9] = float("nan")  # outside the rows in use
    assert (
        shear_ops.sinkhorn(cost.to(device), reg=1.0, n_rows=rows, backend="triton")
        .value.isfinite()
        .all()
    )
    assert shear_ops.sinkhorn(torch.zeros(0, 3, 4, device=device), reg=1.0, backend="triton")
    with pytest.raises(ValueError, match=r"call shear_ops\.reference\.sinkhorn"):
        shear_ops.sinkhorn(cost, reg=1.0, backend="reference")


def test_states_that_are_not_finite(device: torch.device) -> None:
    given = moved(device)
    given["hidden"][50, 3] = torch.inf
    place = r"token 8 of rollout 3 \(group 7\), hidden\[50\]$"
    with pytest.raises(ValueError, match=f"hidden must be finite.* at {place}"):
        shear_ops.span_weights(**given, config=SpanConfig(**CONFIG), backend="triton")
    with pytest.raises(ValueError, match=r"y must be finite.* at token 20$"):
        shear_ops.pair_distances(*given["hidden"].split([30, 96]), backend="triton")
    config = SpanConfig(**CONFIG, check_finite=False)
    poisoned = shear_ops.span_weights(**given, config=config, backend="triton")
    assert poisoned[:106].isnan().all()  # its group
    assert (poisoned[106:] == 1).all()


def test_direct_calls_are_memory_safe(device: torch.device) -> None:
    from shear_ops.triton import ops

    good = moved(device)
    bad: list[tuple[str, Tensor, str]] = [
        ("cu_seqlens", torch.tensor([0, 37, 37, 42, 106, 127]), "cu_seqlens must end at"),
        ("cu_seqlens", torch.tensor([0, 37, 30, 42, 106, 126]), "cu_seqlens must not decrease"),
        ("cu_seqlens", good["cu_seqlens"].float(), "cu_seqlens must be int64"),
        ("group_ids", good["group_ids"][:2], "group_ids must have 5 entries"),
        ("labels", torch.tensor([1, 0, 0, 2, 0]), "labels must be 1, 0 or -1, got 2 at entry 3"),
        ("labels", torch.tensor([[1, 0]]), "labels must be a 1-d"),
        ("hidden", good["hidden"].double(), "hidden must be float32"),
        ("hidden", good["hidden"][None], "hidden must be a"),
        ("hidden", good["hidden"][:, :0], "with dim >= 1"),
    ]
    for name, value, message in bad:
        for op in (ops.span_weights, ops.span_weights_and_pairs, ops.span_distances):
            with pytest.raises(ValueError, match=message):
                op(*{**good, name: value}.values())
    for name, value in {"span": 0, "reg": 0.0, "n_iters": 0, "tol": -1.0, "distance": 4}.items():
        with pytest.raises(ValueError, match=f"{name} must be"):
            ops.span_weights(*good.values(), **{name: value})
    with pytest.raises(ValueError, match="x and y must have one dtype"):
        ops.pair_distances(torch.zeros(3, 4, device=device), torch.zeros(3, 5, device=device))
    with pytest.raises(ValueError, match="n_rows must be in"):
        ops.sinkhorn(torch.zeros(1, 2, 3, device=device), torch.tensor([3]), reg=1.0)


def test_strided_states(device: torch.device) -> None:
    given = moved(device)
    config = SpanConfig(**CONFIG)
    wanted = shear_ops.span_weights(**given, config=config, backend="triton")
    wide = torch.stack([given["hidden"], given["hidden"] + 1], 2)
    given["hidden"] = wide[:, :, 0]
    assert not given["hidden"].is_contiguous()
    assert torch.equal(shear_ops.span_weights(**given, config=config, backend="triton"), wanted)


def test_gpu_script_runs_without_a_gpu(tmp_path: Path) -> None:
    """bench/gpu.sh --quick: build, tests and measurements at tiny sizes, in the interpreter."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU: run bench/gpu.sh")
    pytest.importorskip("cpuinfo", reason="bench needs py-cpuinfo")
    done = subprocess.run(
        [Path(__file__).parents[1] / "bench" / "gpu.sh", "--quick"],
        env={**os.environ, "PYTHON": sys.executable, "BUILD": str(tmp_path), "WHEELS": "none"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    record = json.loads((tmp_path / "record.json").read_text())
    wanted = {"ceilings", "solver", "paper-bf16", "overhead", "growth", "small", "sinkhorn"}
    wanted.add("survivors-larger")
    assert wanted == {name.removesuffix("-triton") for name in record["entries"]}
    assert "times torch.mm" in done.stdout
    assert "times faster than POT" in done.stdout


@pytest.mark.parametrize("name", solver_steps.problems())
@pytest.mark.parametrize("large", [False, True])
def test_solver_takes_the_steps_of_the_cpu(
    name: str, large: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    from shear_ops.triton import queue

    if large:
        monkeypatch.setattr(queue, "TILES", ())
        monkeypatch.setattr(solver_steps, "STEPS", range(1, 21, 3))

    def solve(cost: Tensor, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
        found = shear_ops.sinkhorn(cost.to(device), backend="triton", **options)
        return found.value, found.residual, found.iterations

    solver_steps.assert_same_steps(solve, name)
