"""The arithmetic example runs from training to the recorded file (a few steps of it)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

from shear_ops.rollouts import load_rollouts

RECORD = Path(__file__).parents[1] / "examples" / "arithmetic" / "record.py"


def test_arithmetic_rollouts_can_be_recorded(tmp_path: Path) -> None:
    out = tmp_path / "tiny.safetensors"
    done = subprocess.run(
        [sys.executable, str(RECORD), "--steps", "2", "--groups", "1", "--any-group", "--out", str(out)],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rollouts = load_rollouts(out)
    assert len(rollouts) == 8
    assert rollouts.hidden.dtype == torch.bfloat16
    assert rollouts.vocabulary
    assert len(rollouts.prompts) == 8
