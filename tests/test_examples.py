"""The examples run, a few steps of each."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from shear_ops.cli.rollouts import load_rollouts

EXAMPLES = Path(__file__).parents[1] / "examples"
RECORD = EXAMPLES / "arithmetic" / "record.py"


def run(script: str, *options: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(EXAMPLES / script), *options],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_grpo_loop() -> None:
    lines = run("grpo_loop.py", "--steps", "2", "--prompts", "4").splitlines()
    assert [line.split(":")[0] for line in lines] == ["step 0", "step 1"]
    assert "of 4 groups mixed, 0 bytes sent" in lines[0]


def test_trl_script(tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="trl is not installed")
    printed = run("trl_grpo.py", "--tiny", "--steps", "1", "--out", str(tmp_path / "out"))
    assert re.search(r"shear/mixed_groups'?: '?1\b", printed)
    assert not re.search(r"shear/weight_max'?: '?1(\.0)?\b[^.]", printed)


@pytest.mark.parametrize(
    ("options", "width", "prompt"),
    [((), 128, r"\d\d( [A-Za-h][-+*]\d){34}>"),
     (("--problem-steps", "54", "--width", "64", "--layers", "1"), 64, r"\d\d( [AB][A-Za-z][-+*]\d){54}>")],
    ids=["shipped", "longer"],
)  # fmt: skip
def test_arithmetic_rollouts_can_be_recorded(
    options: tuple[str, ...], width: int, prompt: str, tmp_path: Path
) -> None:
    out = tmp_path / "tiny.safetensors"
    done = subprocess.run(
        [sys.executable, str(RECORD), "--steps", "2", "--groups", "1", "--any-group", "--out", str(out), *options],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rollouts = load_rollouts(out)
    assert len(rollouts) == 8
    assert rollouts.hidden.dtype == torch.bfloat16
    assert rollouts.hidden.shape[1] == width
    assert rollouts.vocabulary
    assert len(rollouts.prompts) == 8
    assert all(re.fullmatch(prompt, text) for text in rollouts.prompts)
