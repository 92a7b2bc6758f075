"""SHEAR in trl's GRPOTrainer under accelerate's FSDP2: two gloo ranks give what one process gives.

Stubbed: accelerate shards on accelerators only, so it is told that the CPU is one (the "XPU"). Sharding, gathering,
training and clipping are accelerate's and torch's own. FSDP1 is not covered: torch refuses it without an accelerator.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

trl = pytest.importorskip("trl", reason="trl is not installed")
pytest.importorskip("peft", reason="peft is not installed")

import grpo  # noqa: E402


@pytest.fixture(autouse=True)
def one_precision(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")


def call_the_cpu_an_accelerator() -> None:
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    os.environ["FSDP_VERSION"] = "2"  # transformers 4 leaves it to accelerate
    start = PartialState.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        start(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_XPU

    PartialState.__init__ = init


def lora() -> dict[str, Any]:
    """The reference is the policy without its adapter."""
    from peft import LoraConfig

    return {
        "beta": 0.1,
        "peft": LoraConfig(
            r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False
        ),
    }


def sharded() -> dict[str, Any]:
    config = {"version": 2, "transformer_layer_cls_to_wrap": ["Qwen2DecoderLayer"]}
    return {"fsdp": "full_shard auto_wrap", "fsdp_config": config}


def sharded_lora() -> dict[str, Any]:
    return sharded() | lora()


def test_fsdp2_equals_one_process(tmp_path: Path) -> None:
    one = [("score", dict), ("loss", dict), ("score", lora)]
    two = [("score", sharded), ("loss", sharded), ("score", sharded_lora)]
    for alone, found in grpo.on_one_and_two_ranks(tmp_path, one, two, call_the_cpu_an_accelerator):
        assert found[0].trainer[0].startswith("FSDP")
        assert found[0].trainer[1] == "FSDP"
        grpo.assert_equal_runs(alone, found)
