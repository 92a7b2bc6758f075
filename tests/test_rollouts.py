"""Rollout files: what is read, what is refused and in which words, what is written."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from safetensors.torch import load_file, save_file

import shear_ops
from rollouts_for_tests import CONFIG, LENGTHS, arguments, padded
from shear_ops import SpanConfig
from shear_ops.cli.output import check_output
from shear_ops.cli.rollouts import (
    RolloutFileError,
    load_rollouts,
    save_scores,
    shipped_rollouts,
)

METADATA = {"vocabulary": json.dumps(["<script>", "b", "&"]), "source": "a <test>"}


def tensors() -> dict[str, torch.Tensor]:
    given = {k: v.clone() for k, v in arguments().items()}
    given["labels"] = given["labels"].to(torch.int8)
    given["tokens"] = torch.arange(sum(LENGTHS)) % 3
    given["first_wrong"] = torch.tensor([-1, -1, 2, -1, 5])
    return given


def change(**tensors_changed: Any) -> dict[str, torch.Tensor]:
    return {k: v for k, v in {**tensors(), **tensors_changed}.items() if v is not None}


def padded_file(**tensors_changed: Any) -> dict[str, torch.Tensor]:
    given = padded(arguments(), holes=True) | {"first_wrong": tensors()["first_wrong"]}
    return {k: v for k, v in {**given, **tensors_changed}.items() if v is not None}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "rollouts.safetensors"
    save_file(tensors(), path, METADATA)
    return path


def test_a_packed_file(file: Path) -> None:
    rollouts = load_rollouts(file)
    assert len(rollouts) == 5
    for name, wanted in tensors().items():
        assert torch.equal(getattr(rollouts, name), wanted), name
    assert rollouts.source == "a <test>"
    assert rollouts.mask is None
    assert rollouts.text_of(2) == ["b", "&", "<script>", "b", "&"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_states_keep_their_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    save_file(change(hidden=tensors()["hidden"].to(dtype)), tmp_path / "f")
    assert load_rollouts(tmp_path / "f").hidden.dtype == dtype


def test_a_padded_file_is_packed(tmp_path: Path) -> None:
    """Masked states may be NaN: they are not read."""
    mask = padded_file()["mask"]
    tokens = torch.where(mask, torch.cumsum(mask, 1) - 1, -7)
    save_file(padded_file(tokens=tokens), tmp_path / "f")
    rollouts = load_rollouts(tmp_path / "f")
    packed = arguments()
    assert torch.equal(rollouts.hidden, packed["hidden"])
    assert torch.equal(rollouts.cu_seqlens, packed["cu_seqlens"])
    assert rollouts.text_of(2) == ["0 ", "1 ", "2 ", "3 ", "4 "]


def test_a_mask_of_integers(tmp_path: Path) -> None:
    save_file(padded_file(mask=padded_file()["mask"].int()), tmp_path / "f")
    assert torch.equal(load_rollouts(tmp_path / "f").hidden, arguments()["hidden"])


def test_no_rollouts_at_all(tmp_path: Path) -> None:
    save_file(
        {
            "hidden": torch.zeros(0, 3),
            "cu_seqlens": torch.zeros(1, dtype=torch.int64),
            "group_ids": torch.zeros(0, dtype=torch.int64),
            "labels": torch.zeros(0, dtype=torch.int8),
        },
        tmp_path / "f",
    )
    assert len(load_rollouts(tmp_path / "f")) == 0


def test_one_group(file: Path) -> None:
    group = load_rollouts(file).group(9)
    assert torch.equal(group.hidden, tensors()["hidden"][106:])
    assert group.cu_seqlens.tolist() == [0, 20]
    assert group.first_wrong is not None
    assert group.first_wrong.tolist() == [5]


def test_texts_cannot_reach_the_terminal_as_commands(tmp_path: Path) -> None:
    """Escape sequences used to be printed as they are; a lone surrogate stopped the report."""
    words = ["\x1b[31mred\r", "tab\tline\n", "\ud800\x9b\u202e"]
    save_file(
        tensors(), tmp_path / "f", {"vocabulary": json.dumps(words), "source": "\x1b]0;x\x07"}
    )
    rollouts = load_rollouts(tmp_path / "f")
    assert rollouts.vocabulary == ["␛[31mred␍", "tab\tline\n", "?\ufffd\ufffd"]
    assert rollouts.source == "␛]0;x␇"


SIX = torch.tensor([0, 9, 9, 42, 106, 126])
BAD_TENSORS: dict[str, tuple[dict[str, torch.Tensor], str]] = {
    "another model's file": ({"lm_head.weight": torch.zeros(2, 2)}, "the file has ['lm_head.weight']"),
    "no labels": (change(labels=None), "tensors ['labels'] are missing"),
    "no layout": (change(cu_seqlens=None), "tensors ['cu_seqlens'] are missing"),
    "double": (
        change(hidden=torch.zeros(126, 12).double()),
        "hidden must be float32, float16 or bfloat16, got torch.float64",
    ),
    "float8": (
        change(hidden=torch.zeros(126, 12).to(torch.float8_e4m3fn)),
        "hidden must be float32, float16 or bfloat16, got torch.float8_e4m3fn",
    ),
    "one dimension": (change(hidden=torch.zeros(126)), "hidden must be (B, T, d) with mask or (N, d)"),
    "no dimensions": (
        change(hidden=torch.zeros(126, 0)),
        "hidden must be of at least one dimension d, got shape (126, 0)",
    ),
    "label 7": (
        change(labels=torch.tensor([1, 0, 7, 1, 0])),
        "labels must be 1, 0 or -1, got [0, 1, 7]",
    ),
    "float labels": (
        change(labels=torch.rand(5)),
        "labels must be integers of a signed type, uint8 or bool, got torch.float32",
    ),
    "scalar labels": (change(labels=torch.tensor(1)), "labels must be (B,), got shape ()"),
    "too few labels": (change(labels=torch.tensor([1, 0])), "group_ids must be (2,), got shape (5,)"),
    # torch has no comparison for these: a NotImplementedError before they were refused
    "unsigned ids": (change(group_ids=torch.ones(5, dtype=torch.uint64)), "got torch.uint64"),
    "unsigned tokens": (change(tokens=torch.zeros(126, dtype=torch.uint16)), "got torch.uint16"),
    "falling offsets": (
        change(cu_seqlens=torch.tensor([0, 9, 3, 42, 106, 126])),
        "cu_seqlens must be 0 first, then never decreasing",
    ),
    "negative offset": (change(cu_seqlens=SIX - 1), "cu_seqlens must be 0 first"),
    # the difference of these two overflows to a positive number
    "offsets that overflow": (
        change(cu_seqlens=torch.tensor([0, 2**62, -(2**62), 2**62, 3, 126])),
        "cu_seqlens must be 0 first, then never decreasing",
    ),
    "last offset": (
        change(cu_seqlens=torch.tensor([0, 9, 9, 42, 106, 120])),
        "cu_seqlens must be 126, the number of tokens, got 120 at its end",
    ),
    "no offsets": (
        change(cu_seqlens=torch.zeros(0, dtype=torch.int64)),
        "cu_seqlens must be (6,), got shape (0,)",
    ),
    "NaN": (change(hidden=torch.full((126, 12), torch.nan)), "hidden must be finite states, got NaN"),
    "infinite": (change(hidden=torch.full((126, 12), -torch.inf)), "hidden must be finite states"),
    "first_wrong beyond": (
        change(first_wrong=torch.tensor([-1, 0, 2, -1, 5])),
        "first_wrong must be -1 or inside the rollout, got 0 for rollout 1 of 0 tokens",
    ),
    "first_wrong -2": (
        change(first_wrong=torch.tensor([-2, -1, 2, -1, 5])),
        "first_wrong must be -1 or inside the rollout, got -2 for rollout 0 of 37 tokens",
    ),
    "first_wrong, too few": (change(first_wrong=torch.tensor([1])), "first_wrong must be (5,)"),
    "tokens, too few": (change(tokens=torch.zeros(9).int()), "tokens must be (126,), got shape (9,)"),
    "token id too large": (
        change(tokens=torch.arange(126)),
        "tokens must be 0 to 2 (ids in the vocabulary), got 0 to 125",
    ),
    "token id negative": (change(tokens=torch.full((126,), -1)), "tokens must be 0 to 2"),
    "mask of a packed file": (
        change(mask=torch.ones(5, 8).bool(), cu_seqlens=None),
        "hidden must be (B, T, d) with mask",
    ),
    "mask, too few columns": (
        padded_file(mask=torch.ones(5, 8).bool()),
        "mask must be (5, 73), got shape (5, 8)",
    ),
    "mask, one dimension": (padded_file(mask=torch.ones(5).bool()), "mask must be (5, 73), got"),
    "mask, other values": (
        padded_file(mask=torch.full((5, 73), 2)),
        "mask must be 0 and 1, got other values",
    ),
    "mask of floats": (padded_file(mask=torch.ones(5, 73)), "mask must be integers"),
    "padded, too few rollouts": (
        padded_file(labels=torch.ones(4).int(), group_ids=torch.ones(4).int()),
        "mask must be (4, T), got shape (5, 73)",
    ),
    "padded, packed tokens": (
        padded_file(tokens=torch.zeros(126).int()),
        "tokens must be (5, 73), got shape (126,)",
    ),
}  # fmt: skip


def refusal(path: Path) -> str:
    """Return what load_rollouts says about a file, without the file's name."""
    with pytest.raises(RolloutFileError) as error:
        load_rollouts(path)
    text = str(error.value)
    assert text.startswith(f"{path}: ")
    assert "\n" not in text
    return text.removeprefix(f"{path}: ")


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_tensors_that_are_refused(case: str, tmp_path: Path) -> None:
    given, message = BAD_TENSORS[case]
    save_file(given, tmp_path / "bad", METADATA)
    assert message in refusal(tmp_path / "bad")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("vocabulary", "no JSON", "metadata vocabulary must be a JSON list of strings"),
        ("vocabulary", '{"a": 1}', "metadata vocabulary must be a JSON list of strings"),
        ("vocabulary", '["a", 1]', "metadata vocabulary must be a JSON list of strings"),
        ("vocabulary", "[" * 100_000, "metadata vocabulary must be a JSON list of strings"),
        ("vocabulary", '["a", "b"]', "tokens must be 0 to 1 (ids in the vocabulary), got 0 to 2"),
        ("prompts", "[1]", "metadata prompts must be a JSON list of strings"),
        ("prompts", '["a", "b"]', "metadata prompts must be 5 texts, got 2 texts"),
    ],
    ids=["no JSON", "a dict", "a number", "nested", "too short", "prompts", "too few prompts"],
)
def test_metadata_that_is_refused(name: str, text: str, message: str, tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "bad", {name: text})
    assert refusal(tmp_path / "bad") == message


def test_files_that_are_not_safetensors(file: Path) -> None:
    whole = file.read_bytes()
    contents = [
        b"",
        whole[:4],
        whole[:8],
        whole[: len(whole) // 2],
        whole[:-1],
        whole + b"\0",
        b"\xff" * 8 + whole[8:],
        whole[:8] + b"[" + whole[9:],
        bytes(range(256)) * 40,
        json.dumps({"labels": [1, 0]}).encode(),
        pickle.dumps({"hidden": [[0.0]]}),
    ]
    for content in contents:
        file.write_bytes(content)
        assert refusal(file).startswith("not a readable safetensors file ("), content[:20]


def test_files_that_are_not_there(tmp_path: Path) -> None:
    assert refusal(tmp_path / "missing") == "no such file"
    assert refusal(tmp_path) == "it is a folder"
    os.mkfifo(tmp_path / "pipe")
    assert refusal(tmp_path / "pipe") == "it is no regular file"


def test_a_file_that_changes_after_it_was_read(file: Path) -> None:
    """The states used to be the bytes of the file, mapped: cut short, it ended the process."""
    rollouts = load_rollouts(file)
    with file.open("r+b") as changed:
        changed.write(b"\0" * 4000)
        changed.truncate(100)
    for name, wanted in tensors().items():
        assert torch.equal(getattr(rollouts, name), wanted), name


def test_a_file_that_changes_while_it_is_read(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = safetensors.safe_open

    def changing(path: Path, framework: str) -> Any:
        os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
        return opened(path, framework)

    monkeypatch.setattr(safetensors, "safe_open", changing)
    assert refusal(file) == "it changed while it was read"


def test_tensors_of_other_names_are_not_read(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file(change(other=torch.zeros(3)), file, METADATA)
    opened, read = safetensors.safe_open, []

    class Recording:
        def __init__(self, path: Path, framework: str) -> None:
            self.file = opened(path, framework)

        def __enter__(self) -> Any:
            self.file.__enter__()
            return self

        def __exit__(self, *error: Any) -> None:
            self.file.__exit__(*error)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def get_tensor(self, name: str) -> torch.Tensor:
            read.append(name)
            return self.file.get_tensor(name)

    monkeypatch.setattr(safetensors, "safe_open", Recording)
    load_rollouts(file)
    assert sorted(read) == sorted(tensors())


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_what_is_written(layout: str, tmp_path: Path) -> None:
    save_file(tensors() if layout == "packed" else padded_file(), tmp_path / "f")
    rollouts = load_rollouts(tmp_path / "f")
    config = SpanConfig(**CONFIG)
    weights = shear_ops.span_weights(**rollouts.arguments(), config=config)
    found = shear_ops.span_distances(**rollouts.arguments(), config=config)
    assert weights.std() > 0.01
    save_scores(tmp_path / "out", rollouts, weights, found)
    written = load_file(tmp_path / "out")
    for name in ("distance", "nearest", "rollout", "begin", "end"):
        assert torch.equal(written.pop(f"span_{name}"), getattr(found, name)), name
    assert torch.equal(written.pop("group_ids"), tensors()["group_ids"])
    assert torch.equal(written.pop("labels"), tensors()["labels"])
    if layout == "packed":
        assert torch.equal(written.pop("cu_seqlens"), tensors()["cu_seqlens"])
        assert torch.equal(written.pop("weights"), weights)
    else:
        mask = written.pop("mask")
        assert torch.equal(mask, padded_file()["mask"])
        padded_weights = written.pop("weights")
        assert torch.equal(padded_weights[mask], weights)
        assert bool((padded_weights[~mask] == 1).all())
    assert written == {}


def test_paths_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such folder"):
        check_output(tmp_path / "no" / "file")
    with pytest.raises(ValueError, match="is not a regular file"):
        check_output(tmp_path)
    (tmp_path / "link").symlink_to("old")
    with pytest.raises(ValueError, match="is a symbolic link"):
        check_output(tmp_path / "link")
    (tmp_path / "old").write_text("old")
    for name in ("old", "new"):
        assert not check_output(tmp_path / name)
    # a file renamed onto a device would replace it: True means that it is opened
    assert check_output(Path("/dev/null"))


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
