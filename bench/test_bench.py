"""The benchmarks themselves: records, reports, equal accuracy, and a run end to end."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner

import shear_ops
from shear_ops import reference

from . import measure, record, report, run, tables
from .contest import OURS, own_setting, qualify
from .peers import Peer, Setting, Solve
from .plots import draw
from .problems import SETTINGS, NearestSpans, Problems, real_span_pairs, synthetic_group
from .sizes import QUICK
from .timing import alternate, ratio
from .truth import sharp_cost

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def files() -> dict[Path, bytes]:
    """What the commands write by default."""
    paths = [HERE / "README.md", HERE.parent / "README.md", *record.RESULTS.rglob("*")]
    return {path: path.read_bytes() for path in paths if path.is_file()}


def test_truth_is_that_of_the_reference() -> None:
    cost, eps = real_span_pairs(6)
    wanted = reference.sinkhorn(cost.double(), eps, tol=1e-6).value
    torch.testing.assert_close(sharp_cost(cost, eps), wanted, rtol=1e-5, atol=0)
    assert wanted.std() > 0.01


@pytest.mark.parametrize("setting", SETTINGS)
def test_group_truth_agrees_with_ours(setting: str) -> None:
    job = NearestSpans(synthetic_group(setting, tokens=150, dim=32, rollouts=4))
    found = shear_ops.span_distances(**job.group.arguments())
    assert len(job.truth) == len(found.distance)
    assert job.judge(job.spans(found.distance)) <= 2e-3
    assert job.judge(job.spans(1.01 * found.distance)) > 2e-3
    some = NearestSpans(job.group, [0, 2])
    torch.testing.assert_close(some.truth, job.truth[[0, 2]])


def scaled_truth(job: Problems, errors: list[float | str]) -> Peer:
    """A peer whose settings are off by these errors."""

    def build(setting: Setting) -> Solve:
        return lambda cost, eps: (sharp_cost(cost, eps) * (1 + float(setting["off"]))).float()

    return Peer("peer", (tuple({"off": e, "chunk": 2} for e in errors),), build)


def test_a_setting_that_is_not_accurate_enough_is_refused() -> None:
    job = Problems(*real_span_pairs(4))
    calls, facts = qualify([scaled_truth(job, [0.1, 0.01, 1e-3, 1e-4])], job, job, 10.0)
    assert facts["peer"]["setting"]["off"] == 1e-3
    assert [t["off"] for t in facts["peer"]["tried"][:3]] == [0.1, 0.01, 1e-3]
    assert job.judge(calls["peer"]()) == pytest.approx(1e-3, rel=0.05)

    calls, facts = qualify([scaled_truth(job, [0.1, 0.01, "nan"])], job, job, 10.0)
    assert not calls
    assert facts["peer"]["inaccurate"]
    assert facts["peer"]["tried"][-1]["error"] is None
    json.dumps(facts, allow_nan=False)


def test_a_setting_is_confirmed_on_all_problems() -> None:
    """What passes on the sample but not on the whole job moves up its ladder."""
    whole = Problems(*real_span_pairs(4))
    sample = Problems(whole.cost[:2], whole.eps)

    def build(setting: Setting) -> Solve:
        def solve(cost: torch.Tensor, eps: float) -> torch.Tensor:
            value = sharp_cost(cost, eps)
            off = torch.tensor([bool((c == whole.cost[3]).all()) for c in cost])
            return torch.where(off & (setting["rung"] == 0), 2 * value, value)

        return solve

    peer = Peer("peer", (tuple({"rung": k, "chunk": 2} for k in range(2)),), build)
    assert qualify([peer], sample, sample, 10.0)[1]["peer"]["setting"]["rung"] == 0
    assert qualify([peer], sample, whole, 10.0)[1]["peer"]["setting"]["rung"] == 1


def test_our_own_setting_is_judged_too() -> None:
    job = Problems(*real_span_pairs(4))
    assert own_setting(lambda n: job.truth * (1 + 1 / n), job.judge)["n_iters"] == 1000
    with pytest.raises(ArithmeticError, match="off by"):
        own_setting(lambda n: 2 * job.truth, job.judge)


def test_missing_peers_are_reported() -> None:
    job = Problems(*real_span_pairs(1))
    peer = Peer("absent", (), lambda setting: pytest.fail("built"), needs="no_such_module")
    calls, facts = qualify([peer], job, job, 1.0)
    assert not calls
    assert facts == {"absent": {"missing": "no_such_module"}}


def test_times_are_taken_in_turns() -> None:
    order: list[str] = []
    samples = alternate({n: lambda n=n: order.append(n) for n in "ab"}, 3, 10.0)  # type: ignore[misc]
    assert order == list("ababab")
    assert [len(s) for s in samples.values()] == [3, 3]
    once = alternate({"slow": lambda: None}, 3, -1.0)
    assert once == {"slow": []} or len(once["slow"]) <= 1
    assert ratio([2.0, 4.0, 3.0], [1.0, 2.0])["value"] == 2.0
    assert ratio([2.0, 4.0, 3.0], [1.0, 2.0])["high"] == 4.0


@pytest.fixture(scope="module")
def quick_record(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A whole record at tiny sizes, of the entries that need no compiler and no library."""
    path = tmp_path_factory.mktemp("bench") / "record.json"
    before = files()
    wanted = ["paper-bf16", "growth", "survivors", "solver"]
    arguments = ["--quick", "--out", str(path), *(f"--only={name}" for name in wanted)]
    result = CliRunner().invoke(run.main, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "passed" in result.output
    assert files() == before
    content = record.load(path)
    assert list(content["entries"]) == wanted
    return content


def test_quick_run_records_everything(quick_record: dict[str, Any]) -> None:
    paper = quick_record["entries"]["paper-bf16"]
    assert {"commit", "dirty", "date", "threads", "versions", "tests"} <= paper["run"].keys()
    assert paper["run"]["quick"]
    assert {"name", "kind", "cores", "flags"} <= quick_record["device"].keys()
    for setting, part in paper["settings"].items():
        samples = paper["times"][f"shear_ops, {setting}"]["samples"]
        assert len(samples) == 2
        assert min(samples) > 0
        assert part["error"] <= 2e-3
        counts = part["pairs"]
        assert counts["bounded"] + counts["abandoned"] + counts["solved"] == counts["total"]
        assert sum(t for s, t in part["stages"].items() if s != "total") == pytest.approx(
            part["stages"]["total"]
        )


def test_quick_run_stays_out_of_the_records(quick_record: dict[str, Any]) -> None:
    inside = str(record.RESULTS / "x.json")
    result = CliRunner().invoke(run.main, ["--quick", "--out", inside])
    assert result.exit_code == 2
    with pytest.raises(click.ClickException, match="--quick"):
        report.refuse_quick({"x": quick_record})


def test_red_tests_stop_the_run(tmp_path: Path) -> None:
    red = tmp_path / "test_red.py"
    red.write_text("def test_red():\n    assert False\n")
    with pytest.raises(click.ClickException, match="nothing is measured"):
        run.check_tests((str(red), "-p", "no:cacheprovider"))


def test_record_round_trip(tmp_path: Path) -> None:
    device = record.device_facts()
    path = tmp_path / f"{record.slug(device)}.json"
    first, second = {"run": {"quick": False}, "x": [1.5, None]}, {"run": {"quick": False}}
    record.save(path, device, "a", {"run": {}, "x": 0})
    record.save(path, device, "b", second)
    record.save(path, device, "a", first)
    assert record.load_all(tmp_path) == {
        path.stem: {"device": device, "entries": {"a": first, "b": second}}
    }
    with pytest.raises(ValueError, match="record of"):
        record.save(path, {**device, "name": "another"}, "a", first)
    with pytest.raises(ValueError, match="not JSON compliant"):
        record.save(path, device, "a", {"x": float("nan")})
    assert record.slug({"name": "NVIDIA H200"}) == "nvidia-h200"


def test_report_without_records() -> None:
    for block, least in ((report.readme_block({}), 5), (report.details_block({}), 10)):
        rows = [line for line in block.splitlines() if line.startswith("| ") and "---" not in line]
        assert len(rows) > least
        assert all(tables.NOT_YET in row for row in rows if "target |" not in row)


def test_report_of_a_record(quick_record: dict[str, Any], tmp_path: Path) -> None:
    content = copy.deepcopy(quick_record)
    block = report.details_block({"this": content})
    product = content["entries"]["paper-bf16"]["settings"]["unpruned"]["over torch.mm"]["value"]
    assert f"unpruned {tables.number(product)} (" in block
    measured = {line.split("|")[1]: line for line in block.splitlines() if line.startswith("|")}
    assert tables.NOT_YET in measured[" two threads: times faster than one "]
    gpu_row = " paper group, bf16: time over bf16 `torch.matmul` of its product "
    assert tables.NOT_YET in measured[gpu_row]

    in_readme = report.readme_block({"this": content}).splitlines()
    assert 5 < len(in_readme) < len(block.splitlines()) / 2
    assert {line for line in in_readme if line.startswith("| paper")} <= set(block.splitlines())
    assert sum(line.startswith("![") for line in in_readme) == 1

    assert f"{content['entries']['survivors']['rows'][0]['total']:,}" in block
    assert f"{tables.number(1e9 * content['entries']['solver']['iteration_s'])} ns" in block
    drawn = {path.name for path in draw("this", content, tmp_path)}
    assert drawn == {f"this-{plot}.svg" for plot in report.plots_of(content)}
    assert drawn == {p.name for p in tmp_path.iterdir()}


def test_micro_reads_what_pytest_benchmark_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pytest_benchmark")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as in the other tests, in a process of its own
    entry = measure.micro(QUICK)
    (name,) = entry["functions"]
    assert name == "sinkhorn"
    assert entry["functions"][name].keys() == {OURS, "kernel loop"}
    for facts in entry["functions"][name].values():
        assert facts["error"] <= 2e-3
        assert 0 < facts["time"]["min"] <= facts["time"]["median"]
        assert len(facts["time"]["samples"]) >= 5

    device = {"kind": "cpu", "name": "this", "flags": []}
    heading = "#### Equal accuracy: single functions\n\n"
    text = tables.details({"device": device, "entries": {}})
    assert f"{heading}{tables.NOT_YET}" in text
    run_facts = {**record.run_facts("passed"), "quick": True}
    text = tables.details({"device": device, "entries": {"micro": {"run": run_facts, **entry}}})
    rows = [line for line in text.partition(heading)[2].splitlines() if "`sinkhorn`" in line]
    assert [row.split(" | ")[1] for row in rows] == [OURS, "kernel loop"]


def test_missed_targets_are_marked(quick_record: dict[str, Any]) -> None:
    content = copy.deepcopy(quick_record)
    for value, marked in ((0.9, False), (1.1, True)):
        for part in content["entries"]["paper-bf16"]["settings"].values():
            part["over torch.mm"] = {"value": value, "low": value, "high": value}
        row = tables.targets({"this": content}).splitlines()[2]
        assert ("missed" in row) == marked


def test_readmes_say_what_the_records_say() -> None:
    result = CliRunner().invoke(report.main, ["--check"])
    assert result.exit_code == 0, result.output
