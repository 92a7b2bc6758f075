"""The command line and the report, as a user meets them."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

import shear_ops
from rollouts_for_tests import CONFIG, LENGTHS, arguments, padded
from shear_ops import SpanConfig
from shear_ops.cli import main as cli
from shear_ops.cli.rollouts import load_rollouts
from shear_ops.cli.summary import auc, mistake_auc, verdict

OPTIONS = ("--span", "16", "--stride", "5")


class Done(NamedTuple):
    code: int
    out: str
    err: str


Shear = Callable[..., Done]


@pytest.fixture
def shear(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shear:
    """Run the command line in this process: most of a process of its own is import of torch."""

    def run(*command: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["shear-ops", *map(str, command)])
        capsys.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        return Done(code, *capsys.readouterr())

    monkeypatch.setenv("COLUMNS", "200")
    return run


def process(*command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "shear_ops", *map(str, command)], capture_output=True, text=True
    )


@pytest.fixture
def file(tmp_path: Path) -> Path:
    given = {k: v.clone() for k, v in arguments().items()}
    given["labels"] = given["labels"].to(torch.int8)
    given["tokens"] = torch.arange(sum(LENGTHS)) % 3
    given["first_wrong"] = torch.tensor([-1, -1, 2, -1, 5])
    path = tmp_path / "rollouts.safetensors"
    vocabulary = json.dumps(["<script>", "b\n", "&"])
    prompts = json.dumps([f"<b>prompt {i}" for i in range(5)])
    save_file(given, path, {"vocabulary": vocabulary, "source": "a <test>", "prompts": prompts})
    return path


def test_score_writes_the_weights(shear: Shear, file: Path) -> None:
    done = shear("score", file, *OPTIONS)
    assert done.code == 0, done.err
    assert done.err == ""
    assert "bounded away" in done.out
    assert "AUC" in done.out
    assert "rollout 2 of group 7, incorrect" in done.out
    written = load_file(file.with_suffix(".weights.safetensors"))
    wanted = shear_ops.span_weights(**arguments(), config=SpanConfig(**CONFIG))
    assert wanted.std() > 0.01
    assert torch.equal(written["weights"], wanted)
    found = shear_ops.span_distances(**arguments(), config=SpanConfig(**CONFIG))
    assert torch.equal(written["span_nearest"], found.nearest)
    assert sorted(p.name for p in file.parent.iterdir()) == [
        "rollouts.safetensors", "rollouts.weights.safetensors"
    ]  # fmt: skip


def test_report(shear: Shear, file: Path, tmp_path: Path) -> None:
    """Self-contained, texts of the file escaped, a value for each token of the group."""
    report = tmp_path / "report.html"
    assert shear("score", file, *OPTIONS, "--report", report, "--reference").code == 0
    page = report.read_text(encoding="utf-8")
    assert not re.findall(r"<script|<link|<iframe|@import|url\(|\bon\w+=", page)
    assert re.findall(r"(?:src|href)='([^']{5})", page) == ["data:"]
    for text in ("&lt;script&gt;", "a &lt;test&gt;", "&lt;b&gt;prompt 2", "↵\n"):
        assert text in page
    assert "<b>prompt" not in page
    weights = load_file(file.with_suffix(".weights.safetensors"))["weights"]
    titles = re.findall(r"title='token (\d+): ([\d.]+)'", page)
    # the printed rollout first, then the others of its group, in order
    order = [*range(37, 42), *range(37), *range(42, 106)]
    assert [f"{w:.4f}" for w in weights[order].tolist()] == [w for _, w in titles]
    assert page.count("class='wrong' style") == 1
    assert "float64 reference" in page


def test_outputs_do_not_overwrite_each_other(shear: Shear, file: Path, tmp_path: Path) -> None:
    before, other = file.read_bytes(), tmp_path / "other"
    for outputs in (("--report", file), ("--report", other, "--out", other), ("--out", file)):
        done = shear("score", file, *outputs)
        assert done.code == 2
        assert "is the input file" in done.err
    assert file.read_bytes() == before
    assert not other.exists()


def test_a_closed_pipe_loses_no_weights(file: Path) -> None:
    done = subprocess.run(
        ["bash", "-c", '"$0" -m shear_ops score "$1" --span 16 --stride 5 | head -n 1', sys.executable, file],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout
    assert file.with_suffix(".weights.safetensors").exists()


def test_report_without_a_mixed_group(shear: Shear, file: Path, tmp_path: Path) -> None:
    given = {**load_file(file), "labels": torch.full((5,), -1)}
    save_file(given, tmp_path / "f.safetensors")
    done = shear(
        "score", tmp_path / "f.safetensors", "--report", tmp_path / "r", "--reference", "--out",
        tmp_path / "w",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "no AUC" in done.out
    page = (tmp_path / "r").read_text(encoding="utf-8")
    assert "<img" not in page
    assert "no AUC" in page
    assert bool((load_file(tmp_path / "w")["weights"] == 1).all())


def test_score_json(shear: Shear, file: Path, tmp_path: Path) -> None:
    done = shear("score", file, *OPTIONS, "--json", "--reference", "--out", tmp_path / "w")
    assert done.err == ""
    seen = json.loads(done.out)
    rollouts = load_rollouts(file)
    weights = shear_ops.span_weights(**rollouts.arguments(), config=SpanConfig(**CONFIG))
    assert seen["auc"]["weights"] == mistake_auc(rollouts, weights)
    assert seen["auc"]["weights"]["rollouts"] == 2
    assert seen["auc"]["uniform"]["pooled"] == 0.5
    assert seen["auc"]["reference"]["largest_difference"] < 2e-3
    assert [g["correct"] for g in seen["groups"]] == [2, 0]
    assert seen["pairs"]["total"] == 2 * 6 // 2 * 1 + 11
    assert seen["written"]["weights"] == str(tmp_path / "w")


def test_score_padded(shear: Shear, tmp_path: Path) -> None:
    given = padded(arguments(), holes=True)
    path = tmp_path / "padded.safetensors"
    save_file(given, path)
    assert shear("score", path, *OPTIONS).code == 0
    written = load_file(path.with_suffix(".weights.safetensors"))
    wanted = shear_ops.span_weights(**given, config=SpanConfig(**CONFIG))
    assert torch.equal(written["weights"], wanted)
    assert torch.equal(written["mask"], given["mask"])


def test_demo_on_the_shipped_rollouts(shear: Shear, tmp_path: Path) -> None:
    report = tmp_path / "report.html"
    seen = json.loads(shear("demo", "--json", "--no-reference", "--report", report).out)
    assert seen["rollouts"] == 88
    assert seen["auc"]["uniform"]["pooled"] == 0.5
    assert 0 < seen["pairs"]["solved"] < seen["pairs"]["total"] == 18_150
    assert report.stat().st_size > 50_000
    done = shear("demo", "--no-reference", "--report", report, "--rollout", 0)
    assert f"AUC {seen['auc']['weights']['pooled']:.3f}" in done.out
    assert "rollout 0 of group 0" in done.out


def test_info(shear: Shear) -> None:
    done = process("info", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    seen = json.loads(done.stdout)
    assert seen["shear_ops"] == shear_ops.__version__
    assert seen["instruction set"] == shear_ops.cpu_isa()
    assert seen["backends"]["cpu"] == "available"
    assert seen["backends"]["cuda"] != "available"
    assert "triton" in shear("info").out


@pytest.mark.parametrize("command", ["demo", "score", "info"])
def test_help_teaches(command: str, shear: Shear) -> None:
    done = shear(command, "--help")
    assert done.code == 0
    assert "Example: shear-ops" in done.out


def test_no_command_is_help(shear: Shear) -> None:
    """It used to be the help squeezed into one line on stderr, and exit code 2."""
    done = shear()
    assert (done.code, done.err) == (0, "")
    assert done.out == shear("--help").out
    assert "\n  score" in done.out


def test_bad_input_is_one_line_and_exit_code_2(shear: Shear, file: Path, tmp_path: Path) -> None:
    commands: dict[tuple[object, ...], str] = {
        ("score", tmp_path / "missing"): "missing: no such file",
        ("score", tmp_path): "no such file",
        ("score", file, "--stride", 200): "stride must be at most span (100), got 200",
        ("score", file, "--reg", -1): "reg must be positive and finite, got -1.0",
        ("score", file, "--reg", "nan"): "reg must be positive and finite, got nan",
        ("score", file, "--span", "x"): "'x' is not a valid integer",
        ("score", file, "--rollout", 99): "--rollout must be in [0, 5), got 99",
        ("score", file, "--out", file): "is the input file",
        ("score", file, "--out", tmp_path / "no" / "file"): "no such folder",
        ("score", file, "--report", tmp_path / "no" / "file"): "no such folder",
        ("score", file, "--report", tmp_path): "not a regular file",
        ("score", file, "--distance", "l2"): "'l2' is not one of",
        ("score", file, "--backend", "triton"): "backend 'triton' is not available: ",
        ("score", file, "--backend", "cpu", "--distance", "exact"): "'exact' is not computed",
        ("score",): "Missing argument 'FILE'",
        ("score", file, "--nonsense"): "No such option",
        ("nonsense",): "No such command 'nonsense'",
        ("demo", "file"): "unexpected extra argument",
        ("demo", "--report", tmp_path / "no" / "file"): "no such folder",
    }
    before = file.read_bytes()
    for command, message in commands.items():
        done = shear(*command)
        assert done.code == 2, command
        assert done.err.startswith("shear-ops: "), done.err
        assert done.err.count("\n") == 1, done.err
        assert message in done.err
        assert done.out == ""
    assert file.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [file.name]


def test_weights_that_cannot_be_written(shear: Shear, file: Path, tmp_path: Path) -> None:
    """It used to be a traceback: the error of safetensors is not an OSError."""
    (tmp_path / "folder").mkdir()
    done = shear("score", file, *OPTIONS, "--out", tmp_path / "folder")
    assert done.code == 2
    assert done.err.startswith(f"shear-ops: cannot write {tmp_path / 'folder'}: ")
    assert done.err.count("\n") == 1


def test_a_truncated_file_in_a_process_of_its_own(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:500])
    done = process("score", file, "--json")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"shear-ops: {file}: not a readable safetensors file (")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "given",
    [{"model.embed_tokens\x1b[2J": torch.zeros(2)}, {"hidden": torch.full((126, 12), torch.nan)}],
    ids=["of a model", "NaN"],
)
def test_foreign_files(given: dict[str, torch.Tensor], shear: Shear, file: Path) -> None:
    save_file({**load_file(file), **given} if "hidden" in given else given, file)
    done = shear("score", file)
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith(f"shear-ops: {file}: ")
    assert done.err[:-1].isprintable()


@pytest.mark.parametrize("package", ["click", "rich", "safetensors", "matplotlib"])
def test_a_base_install_says_what_is_missing(
    package: str, shear: Shear, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the extra there is one line, wherever the import is."""
    for name in list(sys.modules):
        if name == "shear_ops.cli.commands" or name == package or name.startswith(f"{package}."):
            monkeypatch.setitem(sys.modules, name, None)  # type: ignore[arg-type]
    monkeypatch.delitem(sys.modules, "shear_ops.cli.commands", raising=False)
    monkeypatch.setitem(sys.modules, package, None)  # type: ignore[arg-type]
    done = shear("score", file, *OPTIONS, "--report", tmp_path / "r")
    assert done == (1, "", f'shear-ops: {package} is missing: pip install "shear_ops[cli]"\n')


def test_other_import_errors_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise ImportError("broken", name="shear_ops._C")

    monkeypatch.setattr(cli, "_run", broken)
    with pytest.raises(ImportError, match="broken"):
        cli.main()


def test_a_terminal_without_the_marks(
    shear: Shear, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It used to be a UnicodeEncodeError."""
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    assert shear("score", file, *OPTIONS).code == 0
    terminal.seek(0)
    assert "? marks the first wrong step" in terminal.read()


def test_auc_by_hand() -> None:
    assert auc(torch.tensor([3.0, 2.0]), torch.tensor([1.0, 2.0])) == (1 + 1 + 1 + 0.5) / 4
    assert auc(torch.ones(3), torch.ones(5)) == 0.5
    assert auc(torch.tensor([0.0]), torch.tensor([1.0, 2.0])) == 0


def test_mistake_auc_by_hand(file: Path) -> None:
    """Rollout 2 is tokens 37 to 41, wrong from its token 2; rollout 4 is left out if unknown."""
    rollouts = load_rollouts(file)
    assert rollouts.first_wrong is not None
    weights = torch.zeros(126)
    weights[37:42] = torch.tensor([0.1, 0.5, 0.5, 0.9, 0.2])
    rollouts.first_wrong[4] = -1
    wins = 1.5 + 2 + 1  # of 0.5, 0.9 and 0.2 against 0.1 and 0.5
    assert mistake_auc(rollouts, weights) == pytest.approx(
        {"pooled": wins / 6, "mean": wins / 6, "rollouts": 1, "left_out": 2}
    )
    rollouts.first_wrong[4] = 5
    both = mistake_auc(rollouts, weights)
    # of rollout 4, all weights are 0: ties with its own 5, below the other's 2, and 3 above these 5
    assert both["pooled"] == pytest.approx((wins + 3 * 5 + 15 * 5 / 2) / (18 * 7))
    assert both["mean"] == pytest.approx((wins / 6 + 0.5) / 2)
    rollouts.first_wrong[4] = 0
    assert mistake_auc(rollouts, weights)["left_out"] == 2


def test_verdict_says_when_the_weights_are_poor() -> None:
    def of(value: float | None) -> str:
        return verdict({"auc": {"weights": {"pooled": value}, "uniform": {"pooled": 0.5}}})

    assert "hardly separate" in of(0.55)
    assert "hardly" not in of(0.9)
    assert "no AUC" in of(None)
