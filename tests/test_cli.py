"""The command line and the report, as a user meets them."""

from __future__ import annotations

import io
import json
import math
import os
import re
import socket
import stat
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from rich.console import Console
from safetensors.torch import load, load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import shear_ops
from rollouts_for_tests import CONFIG, LENGTHS, arguments, padded
from shear_ops import SpanConfig
from shear_ops.cli import commands, report, summary
from shear_ops.cli import main as cli
from shear_ops.cli.report import html_report
from shear_ops.cli.rollouts import Rollouts, load_rollouts
from shear_ops.cli.summary import auc, mistake_auc, verdict
from shear_ops.cli.terminal import print_summary

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


def refused(done: Done, message: str) -> None:
    """Assert that it ended as bad input does: one line with message, exit code 2."""
    assert (done.code, done.out) == (2, ""), done
    assert done.err.startswith("shear-ops: "), done.err
    assert done.err[:-1].isprintable(), done.err
    assert message in done.err


def contents(folder: Path) -> dict[str, bytes | str]:
    """What is in a folder, by name: bytes of a file, where a link leads."""
    return {
        p.name: str(p.readlink()) if p.is_symlink() else p.read_bytes() if p.is_file() else "other"
        for p in folder.iterdir()
    }


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
    other, link, hard = (tmp_path / name for name in ("other", "link", "hard"))
    link.symlink_to(file)
    hard.hardlink_to(file)
    before = contents(tmp_path)
    for same in (file, link, hard, tmp_path / "." / ".." / tmp_path.name / file.name):
        for option in ("--report", "--out"):
            for given in (file, link, hard):
                refused(shear("score", given, option, same), f"{option} is the input file: {same}")
    refused(shear("score", file, "--report", other, "--out", other), f"--report is --out: {other}")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("option", ["--out", "--report"])
@pytest.mark.parametrize("kind", ["to a file", "dangling", "loop", "to a folder", "/dev/stdout"])
def test_a_link_is_neither_followed_nor_replaced(
    kind: str, option: str, shear: Shear, file: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("kept")
    targets = {"to a file": "file", "dangling": "nowhere", "loop": "link", "to a folder": "."}
    link = tmp_path / "link" if kind in targets else Path(kind)
    if kind in targets:
        link.symlink_to(targets[kind])
    before, where = contents(tmp_path), link.readlink()
    refused(shear("score", file, option, link), f"cannot write {link}: it is a symbolic link")
    assert (contents(tmp_path), link.readlink()) == (before, where)


@pytest.mark.parametrize("option", ["--out", "--report"])
def test_what_is_no_regular_file(option: str, shear: Shear, file: Path, tmp_path: Path) -> None:
    """Pipes and devices are opened, never renamed over; nothing else is touched."""
    (tmp_path / "loop").symlink_to("loop")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
    before = contents(tmp_path)
    other = ["--out", "/dev/null"] if option == "--report" else []
    for path, reason in {
        tmp_path: "it exists and is not a regular file",
        tmp_path / "socket": "it exists and is not a regular file",
        tmp_path / "loop" / "x": "no such folder",
        file / "x": "no such folder",
        Path("/dev/full"): "No space left on device",
        Path("/proc/nothing"): "No such file or directory",  # which no check foresees
    }.items():
        refused(shear("score", file, *OPTIONS, option, path, *other), f"{path}: {reason}")
    refused(shear("score", file, option, tmp_path / ("x" * 256)), "File name too long")
    if not other:
        assert shear("score", file, *OPTIONS, option, "/dev/null").code == 0
    assert contents(tmp_path) == before
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


@pytest.mark.parametrize("option", ["--out", "--report"])
def test_a_named_pipe(option: str, shear: Shear, file: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with ThreadPoolExecutor() as pool:
        seen = pool.submit((tmp_path / "pipe").read_bytes)
        assert shear("score", file, *OPTIONS, option, tmp_path / "pipe").code == 0
    if option == "--report":
        assert seen.result().endswith(b"</html>")
    else:
        assert load(seen.result())["weights"].shape == (126,)
    assert (tmp_path / "pipe").is_fifo()


def test_a_pipe_that_nobody_reads_on(
    shear: Shear, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is an error, unlike a closed stdout: the weights are lost."""
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)

    def closed(*_: object) -> bytes:
        os.close(reader)
        return b"x" * 2**20

    opened = os.open
    monkeypatch.setattr(os, "open", lambda *a: (opened(*a), closed())[0])
    refused(shear("score", file, "--out", tmp_path / "pipe"), "pipe: Broken pipe")


def test_an_output_is_replaced_whole_or_not_at_all(
    shear: Shear, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its mode stays; a new one gets the umask's. Another name of it keeps the old content."""
    out, report, other = (tmp_path / name for name in ("out", "report", "other"))
    for path in (out, report):
        path.write_text("old")
        path.chmod(0o640)
    other.hardlink_to(out)
    before = contents(tmp_path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        for option, path in (("--out", out), ("--report", report)):
            refused(shear("score", file, *OPTIONS, option, path), f"cannot write {path}: No space")
    assert contents(tmp_path) == before
    assert shear("score", file, *OPTIONS, "--out", out, "--report", report).code == 0
    assert other.read_text() == "old"
    assert load_file(out)["weights"].shape == (126,)
    assert {stat.S_IMODE(p.stat().st_mode) for p in (out, report)} == {0o640}
    umask = os.umask(0o027)
    try:
        assert shear("score", file, *OPTIONS, "--out", tmp_path / "new").code == 0
    finally:
        os.umask(umask)
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o640
    assert {p.name for p in tmp_path.iterdir()} == {"new", "other", "out", "report", file.name}


@pytest.mark.parametrize("place", ["file", "folder"])
def test_outputs_without_permission(
    place: str, shear: Shear, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked before any work. The answer is made up: root may write everywhere."""
    out = tmp_path / "out"
    out.write_text("old")
    protected = out if place == "file" else tmp_path
    allowed = os.access
    monkeypatch.setattr(os, "access", lambda p, mode: Path(p) != protected and allowed(p, mode))
    monkeypatch.setattr(commands, "load_rollouts", None)
    for options in (("--out", out), ("--report", out, "--out", "/dev/null")):
        refused(shear("score", file, *options), f"cannot write {out}: permission denied")
    assert out.read_text() == "old"


NAMES = {
    "markup": "[bold]b[red]",
    "closing markup": "run[",  # and then a /1]: it used to be a traceback
    "emoji": ":smile:",
    "newline": "a\nb",
    "escape sequence": "\x1b[31mred\x07",
    "changed direction": "a\u202eb",
    "no UTF-8": os.fsdecode(b"a\xffb"),
    "longest": "x" * 255,
    "two spaces": "a  b",
}


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_names_are_shown_as_they_are(name: str, shear: Shear, file: Path, tmp_path: Path) -> None:
    """In a line of text without control characters, in JSON exactly unless it is no Unicode."""
    folder = tmp_path / name
    folder.mkdir()
    out, report = folder / name, folder / "1]"
    command = ("score", file, *OPTIONS, "--out", out, "--report", report)
    done = shear(*command)
    assert (done.code, done.err) == (0, "")
    unicode = name.encode("utf-8", "replace").decode().replace("?", "\ufffd")
    shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in unicode)
    assert done.out.endswith(
        f"report: {tmp_path}/{shown}/1]\nweights: {tmp_path}/{shown}/{shown}\n"
    )
    assert strict(shear(*command, "--json").out)["written"] == {
        "report": f"{tmp_path}/{unicode}/1]", "weights": f"{tmp_path}/{unicode}/{unicode}"
    }  # fmt: skip
    assert load(out.read_bytes())["weights"].shape == (126,)
    assert report.stat().st_size > 1000
    for bad in (("score", report), ("score", folder / "no"), (*command[:-1], folder)):
        done = shear(*bad)
        refused(done, "".join(c if c.isprintable() else repr(c)[1:-1] for c in name))


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RecursionError("maximum recursion depth exceeded"),
        KeyError("key"),
        RuntimeError("[enforce fail at alloc_cpu.cpp]\n  frame #0: \x1b[1mc10::Error"),
        torch.OutOfMemoryError("out of memory"),
        NotImplementedError(),
        ImportError("libtorch.so: cannot open", name="shear_ops._C"),
        OSError(40, "Too many levels of symbolic links", "loop\n"),
        AssertionError("[/bold]"),
        UnicodeEncodeError("utf-8", "\udcff", 0, 1, "surrogates not allowed"),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("where", ["load_rollouts", "score_rollouts", "print_summary"])
def test_any_error_is_one_line(
    where: str, error: Exception, shear: Shear, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(commands, where, fail)
    done = shear("score", file, *OPTIONS)
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(error).split("\n")[0])
    refused(done, text)
    if not isinstance(error, (OSError, ValueError)):
        assert done.err.startswith(f"shear-ops: {type(error).__name__}")


@pytest.mark.parametrize("command", ["score", "info"])
def test_a_stdout_that_takes_nothing(command: str, file: Path) -> None:
    """Not exit code 120, which is Python's when it tries again at exit."""
    given = [file, *OPTIONS] if command == "score" else ["--json"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "shear_ops", command, *map(str, given)],
            stdout=full, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == "shear-ops: [Errno 28] No space left on device\n"


def test_closed_streams(file: Path) -> None:
    for redirect, code in (("score $1 --span 16 --stride 5 >&-", 0), ("score no 2>&-", 2)):
        script = f'"$0" -m shear_ops {redirect}'
        done = subprocess.run(
            ["bash", "-c", script, sys.executable, file], capture_output=True, text=True
        )
        assert (done.returncode, done.stdout, done.stderr) == (code, "", "")


def strict(text: str) -> Any:
    """Read JSON as strict readers do: Infinity and NaN are none."""

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=["NaN", "inf"])
@pytest.mark.parametrize("whole", [True, False], ids=["all", "one"])
def test_weights_that_are_no_numbers(
    value: float, whole: bool, shear: Shear, file: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """No such weight is expected; if there is one it is seen, and nothing else breaks."""

    def scored(*arguments: Any) -> summary.Scores:
        scores = summary.score_rollouts(*arguments)
        scores.weights[slice(None) if whole else 39] = value
        return scores

    monkeypatch.setattr(commands, "score_rollouts", scored)
    monkeypatch.setenv("FORCE_COLOR", "1")
    command = ("score", file, *OPTIONS, "--report", tmp_path / "r", "--reference")
    seen = strict(shear(*command, "--json").out)
    assert seen["groups"][0]["max"] is None
    assert (seen["auc"]["weights"]["pooled"] is None) == math.isnan(value)
    done = shear(*command)
    assert done.code == 0, done.err
    assert ("Some weights are NaN: no AUC" in done.out) == math.isnan(value)
    page = (tmp_path / "r").read_text()
    assert f"title='token 2: {value}'" in page
    colors = re.findall(
        r"style='background:rgb\(220 40 40/([^)]*)\)' title='token \d+: ([^']+)'", page
    )
    assert len(colors) == 106
    assert {c for c, w in colors if w == str(value)} == {"0.000" if math.isnan(value) else "0.800"}
    assert all(0 <= float(c) <= 0.8 for c, _ in colors)


def test_states_that_are_no_numbers_with_check_finite_off(file: Path) -> None:
    """The parts of the report and of the terminal, as nothing refuses the file for them."""
    rollouts = load_rollouts(file)
    rollouts.hidden[39] = math.nan
    config = SpanConfig(**CONFIG, check_finite=False)
    scores = summary.score_rollouts(rollouts, config, "cpu")
    assert bool(scores.weights[37:42].isnan().all())
    facts = summary.summarize(scores, summary.reference_check(scores)) | {"written": {}}
    page = html_report(scores, facts, 2)
    assert "/nan)" not in page
    assert "title='token 0: nan'" in page
    console = Console(file=io.StringIO(), force_terminal=True)
    print_summary(console, scores, facts, 2)
    assert strict(json.dumps(commands.finite(facts)))["groups"][0]["mean"] is None


def test_where_a_state_is_not_finite(shear: Shear, tmp_path: Path) -> None:
    """Rollout, group and token as the file counts them, whatever the layout."""
    rollouts, tokens = 16, 30
    hidden = torch.randn(rollouts, tokens, 8, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(rollouts, tokens, dtype=torch.bool)
    mask[:, :4] = False  # padded on the left, and a hole
    mask[:, 10] = False
    hidden[~mask] = torch.nan
    given = {"group_ids": torch.arange(rollouts) // 4 + 100, "labels": torch.arange(rollouts) % 2}
    for value, kind in ((math.nan, "NaN"), (math.inf, "Inf"), (-math.inf, "Inf")):
        bad = hidden.clone()
        bad[9, 17, 3] = value
        save_file({**given, "hidden": bad, "mask": mask}, tmp_path / "padded")
        packed = {"hidden": bad[mask], "cu_seqlens": torch.arange(0, 16 * 25 + 1, 25)}
        save_file({**given, **packed}, tmp_path / "packed")
        for layout, token in (("padded", 17), ("packed", 12)):
            where = f"got {kind} in rollout 9 of group 102, token {token}\n"
            refused(shear("score", tmp_path / layout), where)


def test_an_error_of_scoring_is_shown_as_it_is(
    shear: Shear, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: object) -> None:
        raise ValueError("hidden must be finite, got NaN in group 7, rollout 2, token 3")

    monkeypatch.setattr(summary, "span_weights", refuse)
    refused(shear("score", file), "shear-ops: hidden must be finite, got NaN in group 7, rollout 2")


@pytest.mark.parametrize("batch", [0, 3], ids=["no rollouts", "no tokens"])
def test_nothing_to_score(batch: int, shear: Shear, tmp_path: Path) -> None:
    """With --report a stale report used to stay, without a word."""
    integers = {n: torch.zeros(batch, dtype=torch.int64) for n in ("group_ids", "labels")}
    offsets = torch.zeros(batch + 1, dtype=torch.int64)
    save_file({"hidden": torch.zeros(0, 3), "cu_seqlens": offsets, **integers}, tmp_path / "f")
    (tmp_path / "r").write_text("stale")
    done = shear("score", tmp_path / "f", "--report", tmp_path / "r", "--reference")
    assert (done.code, done.err) == (0, "")
    assert ("The file has no rollouts." in done.out) == (batch == 0)
    assert ("<p>No rollouts.</p>" in (tmp_path / "r").read_text()) == (batch == 0)
    assert "0 tokens" in (tmp_path / "r").read_text()


class Work(TorchDispatchMode):
    """Counts calls, and elements of tensors that go into torch: no clock, so it is exact."""

    calls = elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:  # as x[i] is one
            given = tree_leaves((args, kwargs))
            self.elements += sum(x.numel() for x in given if isinstance(x, torch.Tensor))
        return func(*args, **(kwargs or {}))

    def __enter__(self) -> Work:
        sys.setprofile(self.count)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        sys.setprofile(None)

    def count(self, _frame: object, event: str, _argument: object) -> None:
        self.calls += event in ("call", "c_call")


@pytest.mark.parametrize("grows", ["groups", "rollouts of a group", "tokens of a rollout"])
def test_work_grows_with_the_file(
    grows: str, shear: Shear, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """8,000 groups took 0.1 s of weights and seconds of table: each group looked at all others."""
    # how often matplotlib calls what depends on its ticks, by more than all the rest
    monkeypatch.setattr(report, "_png", lambda *_: "")

    def work(size: int) -> tuple[int, int]:
        groups, each, tokens = (
            size if grows == name else 1
            for name in ("groups", "rollouts of a group", "tokens of a rollout")
        )
        rollouts = groups * each * 2
        generator = torch.Generator().manual_seed(0)
        labels = torch.arange(rollouts) % 2
        given = {
            "hidden": torch.randn(rollouts * tokens * 4, 2, generator=generator),
            "cu_seqlens": torch.arange(rollouts + 1) * tokens * 4,
            "group_ids": torch.arange(rollouts) // (2 * each),
            "labels": labels,
            "first_wrong": torch.where(labels == 0, 2 * tokens, -1),
        }
        save_file(given, tmp_path / "f")
        command = ("score", tmp_path / "f", "--report", tmp_path / "r", "--json")
        with Work() as counted:
            assert shear(*command).code == 0
        return counted.calls, counted.elements

    work(10)  # imports
    for small, middle, large in zip(*(work(size) for size in (100, 200, 400)), strict=True):
        assert middle - small > 5_000
        assert large - middle < 2.2 * (middle - small)  # 2 if linear, 4 if quadratic


def test_groups_cost_no_calls_of_torch() -> None:
    """A few per group took seconds where there are thousands."""

    class Calls(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            self.count += 1
            return func(*args, **(kwargs or {}))

    def calls(groups: int) -> int:
        rollouts = Rollouts(
            torch.zeros(6 * groups, 1), torch.arange(0, 6 * groups + 1, 3),
            torch.arange(groups).repeat_interleave(2), torch.tensor([0, 1] * groups),
            first_wrong=torch.tensor([1, -1] * groups),
        )  # fmt: skip
        found = shear_ops.span_distances(**rollouts.arguments())
        weights = torch.rand(6 * groups)
        scores = summary.Scores(rollouts, SpanConfig(), weights, found, 0.0)
        with Calls() as counted:
            rows = summary.group_rows(scores)
        assert [row["auc"] for row in rows] == [
            mistake_auc(rollouts, weights, [i])["pooled"] for i in range(0, 2 * groups, 2)
        ]
        return counted.count

    assert 0 < calls(2) == calls(50)


@pytest.mark.parametrize("size", [1, 2, 3, 20, 21, 22, 1000])
def test_quantile_of_a_group(size: int) -> None:
    weights = torch.rand(size, generator=torch.Generator().manual_seed(size))
    wanted = float(torch.quantile(weights.double(), 0.95))
    assert summary._p95(weights.numpy()) == pytest.approx(wanted, rel=1e-12)
    weights[-1] = math.inf
    assert summary._p95(weights.numpy()) == (math.inf if size <= 20 else pytest.approx(wanted, 0.1))
    weights[0] = math.nan
    assert math.isnan(summary._p95(weights.numpy()))


def test_a_group_of_more_than_2_24_tokens() -> None:
    """torch.quantile ends there: it used to be a traceback."""
    size = 2**24 + 1
    integers = torch.ones(1, dtype=torch.int64)
    rollouts = Rollouts(torch.zeros(0, 1), torch.tensor([0, size]), integers, integers)
    weights = torch.arange(size, dtype=torch.float32)
    nothing = shear_ops.span_distances(
        torch.zeros(0, 1), cu_seqlens=torch.zeros(2).long(), group_ids=[1], labels=[1]
    )
    scores = summary.Scores(rollouts, SpanConfig(), weights, nothing, 0.0)
    (row,) = summary.group_rows(scores)
    assert row["tokens"] == size
    assert row["p95"] == pytest.approx(0.95 * 2**24, rel=1e-6)


def test_many_groups_on_a_terminal(shear: Shear, tmp_path: Path) -> None:
    """The table ends; JSON and the report do not."""
    groups = torch.arange(450) // 2
    given = {"hidden": torch.randn(450, 2), "cu_seqlens": torch.arange(451), "group_ids": groups}
    save_file({**given, "labels": torch.arange(450) % 2}, tmp_path / "f")
    done = shear("score", tmp_path / "f", "--report", tmp_path / "r")
    assert len(re.findall(r"(?m)^ *\d+ +1 +1 +0 +2 ", done.out)) == 200
    assert "... and 25 more groups" in done.out
    assert (tmp_path / "r").read_text().count("<tr><td>") == 225
    assert len(strict(shear("score", tmp_path / "f", "--json").out)["groups"]) == 225


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


def test_score_says_where_spans_have_not_converged(shear: Shear, file: Path) -> None:
    converged = json.loads(shear("score", file, *OPTIONS, "--json").out)
    assert [g["stopped"] for g in converged["groups"]] == [0] * len(converged["groups"])
    stopped = json.loads(
        shear("score", file, *OPTIONS, "--n-iters", "1", "--tol", "0", "--json").out
    )
    rollouts = load_rollouts(file)
    spans = shear_ops.span_distances(**rollouts.arguments(), config=SpanConfig(**CONFIG))
    for row in stopped["groups"]:
        members = torch.tensor(rollouts.members_of(row["group"]))
        assert row["stopped"] == int(torch.isin(spans.rollout[spans.nearest >= 0], members).sum())
    assert max(row["stopped"] for row in stopped["groups"]) > 0
    assert re.search(r"max +stopped +auc", shear("score", file, *OPTIONS).out)


def test_score_padded(shear: Shear, tmp_path: Path) -> None:
    given = padded(arguments(), holes=True)
    path = tmp_path / "padded.safetensors"
    save_file(given, path)
    assert shear("score", path, *OPTIONS).code == 0
    written = load_file(path.with_suffix(".weights.safetensors"))
    wanted = shear_ops.span_weights(**given, config=SpanConfig(**CONFIG))
    assert torch.equal(written["weights"], wanted)
    assert torch.equal(written["mask"], given["mask"])


def test_demo_on_the_shipped_rollouts(
    shear: Shear, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = tmp_path / "report.html"
    seen = json.loads(shear("demo", "--json", "--no-reference", "--report", report).out)
    assert seen["rollouts"] == 88
    assert seen["auc"]["uniform"]["pooled"] == 0.5
    assert 0 < seen["pairs"]["solved"] < seen["pairs"]["total"] == 18_150
    assert report.stat().st_size > 50_000
    monkeypatch.setenv("COLUMNS", "80")
    done = shear("demo", "--no-reference", "--report", report, "--rollout", 0)
    assert f"AUC {seen['auc']['weights']['pooled']:.3f}" in done.out
    assert "rollout 0 of group 0" in done.out
    table = done.out[done.out.index("groups:") : done.out.index("Span pairs")]
    assert "…" not in table  # 80 columns hold it


def test_info(shear: Shear) -> None:
    done = process("info", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    seen = json.loads(done.stdout)
    assert seen["shear_ops"] == shear_ops.__version__
    assert seen["instruction set"] == shear_ops.cpu_isa()
    assert seen["backends"]["cpu"] == "available"
    assert seen["backends"]["cuda"] != "available"
    assert "triton" in shear("info").out


def test_plan(shear: Shear) -> None:
    given = ("plan", "--groups", 3, "--rollouts", 4, "--tokens", 150, "--dim", 32, *OPTIONS)
    seen = json.loads(shear(*given, "--json").out)
    told = shear_ops.plan(
        [i * 150 for i in range(13)], group_ids=[i // 4 for i in range(12)], labels=[0, 1] * 6,
        dim=32, dtype=torch.bfloat16, config=SpanConfig(span=16, stride=5),
    )  # fmt: skip
    assert seen["plan"] == told._asdict()
    parts = {"states": 12 * 150 * 64, "regrouping": 4 * 150 * 64}
    assert seen["bytes"] == parts | {
        "workspace": told.group_workspace_bytes,
        "peak": sum(parts.values()) + told.group_workspace_bytes,
    }
    lines = shear(*given).out.splitlines()
    assert [line.split()[0] for line in lines] == ["states", "regrouping", "workspace", "peak"]
    assert [float(line.split()[1]) for line in lines] == [
        round(size / 2**20, 1) for size in seen["bytes"].values()
    ]
    wide = json.loads(shear(*given, "--dtype", "float32", "--json").out)
    assert wide["bytes"]["states"] == 2 * parts["states"]


@pytest.mark.parametrize("command", ["demo", "score", "plan", "info"])
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
        ("score", tmp_path): "it is a folder",
        ("score", os.devnull): "/dev/null: it is no regular file",
        ("score", file, "--out", "-"): "--out must be the path of a file, got '-'",
        ("score", file, "--report", "-"): "--report must be the path of a file, got '-'",
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
        ("plan", "--tokens", 0): "--tokens must be in [1, 2^31), got 0",
        ("plan", "--groups", 2**30): "--groups times --rollouts times --tokens must be in",
        ("plan", "--stride", 200): "stride must be at most span (100), got 200",
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
