"""SHEAR in trl's GRPOTrainer under DeepSpeed ZeRO-2 and ZeRO-3: two gloo ranks give what one process gives.

Only the model's generate is stubbed; DeepSpeed's engine trains on the CPU.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("DS_ACCELERATOR", "cpu")

pytest.importorskip("deepspeed", reason="deepspeed is not installed")
pytest.importorskip("trl", reason="trl is not installed")

import grpo


@pytest.fixture(autouse=True)
def one_precision(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")


def zero(stage: int) -> dict[str, Any]:
    # parameters as small as these would stay whole
    persistence = {"stage3_param_persistence_threshold": 0} if stage == 3 else {}
    automatic = (
        "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"
    )  # fmt: skip
    return {
        "deepspeed": {
            "zero_optimization": {"stage": stage, **persistence},
            "zero_allow_untested_optimizer": True,  # SGD
            **dict.fromkeys(automatic, "auto"),
        }
    }


def zero2() -> dict[str, Any]:
    return zero(2)


def zero3() -> dict[str, Any]:
    return zero(3)


@pytest.mark.parametrize("stage", [zero2, zero3])
def test_zero_equals_one_process(stage: Any, tmp_path: Path) -> None:
    one = [("score", dict), ("loss", dict)]
    two = [("score", stage), ("loss", stage)]
    for alone, found in grpo.on_one_and_two_ranks(tmp_path, one, two):
        assert found[0].trainer == ("DeepSpeedEngine", "DEEPSPEED")
        grpo.assert_equal_runs(alone, found)
