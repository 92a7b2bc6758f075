"""The command line, rollout files and the report, as a user meets them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import shear_ops
from rollouts_for_tests import CONFIG, LENGTHS, arguments, padded
from shear_ops import SpanConfig
from shear_ops.rollouts import RolloutFileError, load_rollouts, shipped_rollouts
from shear_ops.summary import auc, mistake_auc, verdict

OPTIONS = ("--span", "16", "--stride", "5")


def run(*command: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "shear_ops", *map(str, command)], capture_output=True, text=True
    )
    assert done.returncode == code, done.stderr
    return done


def tensors() -> dict[str, torch.Tensor]:
    given = {k: v.clone() for k, v in arguments().items()}
    given["labels"] = given["labels"].to(torch.int8)
    given["tokens"] = torch.arange(sum(LENGTHS)) % 3
    given["first_wrong"] = torch.tensor([-1, -1, 2, -1, 5])
    return given


METADATA = {"vocabulary": json.dumps(["<script>", "b", "&"]), "source": "a <test>"}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "rollouts.safetensors"
    save_file(tensors(), path, METADATA)
    return path


def test_score_writes_the_weights(file: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.html"
    out = run("score", file, *OPTIONS, "--report", report).stdout
    assert "bounded away" in out
    assert "AUC" in out
    written = load_file(file.with_suffix(".weights.safetensors"))
    wanted = shear_ops.span_weights(**arguments(), config=SpanConfig(**CONFIG))
    assert wanted.std() > 0.01
    assert torch.equal(written["weights"], wanted)
    found = shear_ops.span_distances(**arguments(), config=SpanConfig(**CONFIG))
    assert torch.equal(written["span_nearest"], found.nearest)
    page = report.read_text()
    assert "&lt;script&gt;" in page
    assert "<script" not in page
    assert "a &lt;test&gt;" in page
    assert "http" not in page
    assert "data:image/png;base64," in page


def test_score_json(file: Path, tmp_path: Path) -> None:
    seen = json.loads(
        run("score", file, *OPTIONS, "--json", "--reference", "--out", tmp_path / "w").stdout
    )
    rollouts = load_rollouts(file)
    weights = shear_ops.span_weights(**rollouts.arguments(), config=SpanConfig(**CONFIG))
    assert seen["auc"]["weights"] == mistake_auc(rollouts, weights)
    assert seen["auc"]["weights"]["rollouts"] == 2
    assert seen["auc"]["uniform"]["pooled"] == 0.5
    assert seen["auc"]["reference"]["largest_difference"] < 2e-3
    assert [g["correct"] for g in seen["groups"]] == [2, 0]
    assert seen["pairs"]["total"] == 2 * 6 // 2 * 1 + 11
    assert seen["written"]["weights"] == str(tmp_path / "w")


def test_score_padded(tmp_path: Path) -> None:
    given = padded(arguments(), holes=True)
    given["hidden"] = given["hidden"].nan_to_num(0.0)
    path = tmp_path / "padded.safetensors"
    save_file(given, path)
    run("score", path, *OPTIONS)
    written = load_file(path.with_suffix(".weights.safetensors"))
    wanted = shear_ops.span_weights(**given, config=SpanConfig(**CONFIG))
    assert torch.equal(written["weights"], wanted)
    assert torch.equal(written["mask"], given["mask"])


def test_demo_on_the_shipped_rollouts(tmp_path: Path) -> None:
    report = tmp_path / "report.html"
    seen = json.loads(run("demo", "--json", "--no-reference", "--report", report).stdout)
    assert seen["rollouts"] == 88
    assert seen["auc"]["uniform"]["pooled"] == 0.5
    assert 0 < seen["pairs"]["solved"] < seen["pairs"]["total"] == 18_150
    assert report.stat().st_size > 50_000
    text = run("demo", "--no-reference", "--report", report, "--rollout", 0).stdout
    assert f"AUC {seen['auc']['weights']['pooled']:.3f}" in text
    assert "rollout 0 of group 0" in text


def test_shipped_rollouts_are_what_they_say() -> None:
    """Groups of 8 with 2 to 6 correct, 300 tokens and more, mistakes where first_wrong says."""
    rollouts = load_rollouts(shipped_rollouts())
    assert shipped_rollouts().stat().st_size <= 8_000_000
    assert rollouts.hidden.dtype == torch.bfloat16
    assert rollouts.cu_seqlens.diff().min() >= 300
    groups = rollouts.group_ids.unique().tolist()
    assert len(groups) >= 10
    for group in groups:
        labels = rollouts.labels[rollouts.group_ids == group]
        assert len(labels) == 8
        assert 2 <= (labels == 1).sum() <= 6
    assert rollouts.first_wrong is not None
    assert torch.equal(rollouts.first_wrong >= 0, rollouts.labels == 0)
    for i in range(len(rollouts)):
        _check_arithmetic("".join(rollouts.text_of(i)), int(rollouts.first_wrong[i]))


def _check_arithmetic(text: str, first_wrong: int) -> None:
    """Steps like `B:98-2=96 ` before first_wrong compute; the step at first_wrong does not."""
    position = 0
    for step in text.split(" "):
        if step.startswith("="):
            break
        name, _, rest = step.partition(":")
        left, _, result = rest.partition("=")
        computes = left and str(eval(left) % 100) == result
        if position == first_wrong and computes:
            return  # a wrong copy of the operand: it computes, but not the problem's step
        assert bool(computes) == (position != first_wrong), (name, step)
        if position == first_wrong:
            return
        position += len(step) + 1
    assert first_wrong == -1


def test_info() -> None:
    seen = json.loads(run("info", "--json").stdout)
    assert seen["shear_ops"] == shear_ops.__version__
    assert seen["instruction set"] == shear_ops.cpu_isa()
    assert seen["backends"]["cpu"] == "available"
    assert seen["backends"]["cuda"] != "available"
    assert "triton" in run("info").stdout


@pytest.mark.parametrize("command", [(), ("demo",), ("score",), ("info",)])
def test_help_teaches(command: tuple[str, ...]) -> None:
    out = run(*command, "--help").stdout
    assert "Example:" in out or command == ()


def change(**tensors_changed: Any) -> dict[str, torch.Tensor]:
    return {k: v for k, v in {**tensors(), **tensors_changed}.items() if v is not None}


BAD_TENSORS: dict[str, tuple[dict[str, torch.Tensor], str]] = {
    "another model's file": ({"lm_head.weight": torch.zeros(2, 2)}, "are missing"),
    "no labels": (change(labels=None), "['labels'] are missing"),
    "double": (change(hidden=torch.zeros(126, 12).double()), "hidden must be float32"),
    "one dimension": (change(hidden=torch.zeros(126)), "hidden must be (B, T, d)"),
    "label 7": (change(labels=torch.tensor([1, 0, 7, 1, 0])), "labels must be 1, 0 or -1"),
    "float labels": (change(labels=torch.rand(5)), "labels must be integers"),
    "too few labels": (change(labels=torch.tensor([1, 0])), "group_ids must be (2,)"),
    "offsets": (change(cu_seqlens=torch.tensor([0, 9, 3, 42, 106, 126])), "cu_seqlens must be 0"),
    "last offset": (change(cu_seqlens=torch.tensor([0, 9, 9, 42, 106, 120])), "126, the number"),
    "NaN": (change(hidden=torch.full((126, 12), torch.nan)), "hidden must be finite states"),
    "first_wrong": (change(first_wrong=torch.tensor([-1, 0, 2, -1, 5])), "first_wrong must be -1"),
    "tokens": (change(tokens=torch.full((126,), 3)), "tokens must be ids below 3"),
    "mask": (change(mask=torch.ones(5, 8), cu_seqlens=None), "hidden must be (B, T, d)"),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_rollout_files_that_are_wrong(case: str, tmp_path: Path) -> None:
    given, message = BAD_TENSORS[case]
    path = tmp_path / "bad.safetensors"
    save_file(given, path, METADATA)
    with pytest.raises(RolloutFileError) as error:
        load_rollouts(path)
    assert str(error.value).startswith(f"{path}: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def damaged(path: Path, kind: str) -> Path:
    whole = path.read_bytes()
    content = {
        "truncated": whole[: len(whole) // 2],
        "header only": whole[:8],
        "empty": b"",
        "random": bytes(range(256)) * 40,
        "json": b'{"labels": [1, 0]}',
        "huge header": b"\xff" * 8 + whole[8:],
        "pickle": b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00}\x94\x8c\x01a\x94K\x01s.",
    }.get(kind)
    if content is None:
        return path.parent / "missing.safetensors" if kind == "missing" else path.parent
    path.write_bytes(content)
    return path


KINDS = ["truncated", "header only", "empty", "random", "json", "huge header", "pickle", "missing",
         "directory"]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files(kind: str, file: Path) -> None:
    with pytest.raises(RolloutFileError):
        load_rollouts(damaged(file, kind))


def test_bad_input_is_one_line_and_exit_code_2(file: Path, tmp_path: Path) -> None:
    commands: list[tuple[object, ...]] = [
        ("score", damaged(tmp_path / "rollouts.safetensors", "missing")),
        ("score", file, "--stride", 200),
        ("score", file, "--reg", -1),
        ("score", file, "--rollout", 99),
        ("score", file, "--out", file),
        ("score", file, "--report", tmp_path / "no" / "such" / "folder.html"),
        ("score", file, "--distance", "l2"),
        ("score", file, "--backend", "triton"),
        ("score",),
        ("nonsense",),
    ]
    for command in commands:
        done = run(*command, code=2)
        assert done.stderr.startswith("shear-ops: "), done.stderr
        assert done.stderr.count("\n") == 1, done.stderr
        assert done.stdout == ""
    file.write_bytes(b"not a safetensors file")
    done = run("score", file, code=2)
    assert done.stderr.startswith(f"shear-ops: {file}: not a readable safetensors file")
    assert done.stderr.count("\n") == 1


def test_auc_by_hand() -> None:
    assert auc(torch.tensor([3.0, 2.0]), torch.tensor([1.0, 2.0])) == (1 + 1 + 1 + 0.5) / 4
    assert auc(torch.ones(3), torch.ones(5)) == 0.5
    assert auc(torch.tensor([0.0]), torch.tensor([1.0, 2.0])) == 0


def test_verdict_says_when_the_weights_are_poor() -> None:
    def of(value: float | None) -> str:
        return verdict({"auc": {"weights": {"pooled": value}, "uniform": {"pooled": 0.5}}})

    assert "hardly separate" in of(0.55)
    assert "hardly" not in of(0.9)
    assert "no AUC" in of(None)
