"""SHEAR in ms-swift's own pipeline on the CPU: its arguments, models, templates, rollouts, training.

Stubbed: rollouts where several runs must have the same ones, the check that padding_free has flash
attention (transformers' own attention knows packed rows, too), and what the refusals need.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import ranks
import tiny
from shear_ops import SpanConfig, span_weights

pytest.importorskip(
    "swift.rlhf_trainers",
    reason="ms-swift is not installed (make trainer-swift makes an environment with it)",
)
from swift.arguments import RLHFArguments
from swift.infer_engine import protocol
from swift.pipelines.train.rlhf import SwiftRLHF
from swift.rewards import ORM, orms
from swift.rlhf_trainers import GRPOTrainer
from swift.template import TemplateMeta, register_template
from swift.trainers import TrainerFactory

from shear_ops.integrations import swift as integration
from shear_ops.integrations.settings import RewardSettings

LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo")
SPANS = {"span": 4, "stride": 2, "tol": 1e-6, "n_iters": 2000}
OPTIONS = {
    "rlhf_type": "grpo", "model": "model", "model_type": "qwen2", "template": "tiny", "tuner_type": "full",
    "torch_dtype": "float32", "bf16": False, "fp16": False, "attn_impl": "eager", "dataset": "prompts.jsonl",
    "split_dataset_ratio": 0, "load_from_cache_file": False, "eval_strategy": "no", "external_plugins": "plugin.py",
    "reward_funcs": "correct", "num_generations": 4, "max_completion_length": 12, "beta": 0,
    "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "max_steps": 2, "learning_rate": 1e-2,
    "logging_steps": 1, "save_strategy": "no", "report_to": "none", "output_dir": "out", "add_version": False,
    "check_model": False, "dataloader_num_workers": 0, "gradient_checkpointing": False, "seed": 1,
}  # fmt: skip
PLUGIN = """
from shear_ops.integrations.swift import register
register({settings})
"""
PLAIN = "swift.rlhf_trainers.GRPOTrainer"


class Correct(ORM):  # type: ignore[misc]
    """Whether the answer's digit occurs at all, as tiny.correct."""

    def __call__(self, completions: list[str], solution: list[str], **_: Any) -> list[float]:
        return [float(a in c) for c, a in zip(completions, solution, strict=True)]


class Short(ORM):  # type: ignore[misc]
    def __call__(self, completions: list[str], **_: Any) -> list[float]:
        return [0.6 * (len(c) < 8) for c in completions]


class Unsure(ORM):  # type: ignore[misc]
    """As Correct, None for completions with an odd number of letters."""

    def __call__(self, completions: list[str], solution: list[str], **_: Any) -> Any:
        pairs = zip(completions, solution, strict=True)
        return [None if len(c) % 2 else float(a in c) for c, a in pairs]


class Always(ORM):  # type: ignore[misc]
    def __call__(self, completions: list[str], **_: Any) -> list[float]:
        return [1.0] * len(completions)


orms.update(correct=Correct, short=Short, unsure=Unsure, always=Always)
register_template(
    TemplateMeta("tiny", prefix=[], prompt=["{{QUERY}} "], chat_sep=None, suffix=[["eos_token_id"]])
)


class Pipeline(SwiftRLHF):  # type: ignore[misc]
    """swift rlhf, up to the training."""

    def train(self, trainer: Any) -> Any:
        return trainer


def write_files(folder: Path) -> None:
    tiny.model().save_pretrained(folder / "model")
    tiny.tokenizer().save_pretrained(folder / "model")
    rows = [
        {"messages": [{"role": "user", "content": row["prompt"]}], "solution": row["answer"]}
        for row in tiny.prompts()
    ]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))


def command(**options: Any) -> list[str]:
    words = []
    for name, value in (OPTIONS | options).items():
        values = value if isinstance(value, (list, tuple)) else [value]
        words += [f"--{name}", *map(str, values)]
    return words


@pytest.fixture(autouse=True)
def work_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(TrainerFactory.TRAINER_MAPPING, "grpo", PLAIN)
    monkeypatch.setattr(integration.ShearGRPOTrainer, "shear_settings", RewardSettings())
    # an argument class reads it; torchrun of an earlier test must not be seen
    write_files(tmp_path)


def build(shear: bool | dict[str, Any] = True, **options: Any) -> Any:
    """The trainer that `swift rlhf` makes, with a plugin as a user writes it."""
    settings = {"spans": SPANS} | (shear if isinstance(shear, dict) else {})
    text = PLUGIN.format(settings=f"**{settings!r}") if shear else ""
    # ms-swift imports a plugin once per path
    name = f"plugin_{len(list(Path.cwd().glob('plugin_*')))}.py"
    Path(name).write_text(text)
    if not shear:
        TrainerFactory.TRAINER_MAPPING["grpo"] = PLAIN
    trainer = Pipeline(command(external_plugins=name, **options)).main()
    assert isinstance(trainer, integration.ShearMixin) == bool(shear)
    return trainer


def train(trainer: Any) -> Tensor:
    trainer.train()
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def logged(trainer: Any, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def test_first() -> None:
    trainer = build()
    train(trainer)
    print(logged(trainer, "shear/weight_max"), logged(trainer, "shear/mixed_groups"))
    print(trainer.state.log_history)
