"""The README's examples run as printed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny

TEXT = (Path(__file__).parents[1] / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", TEXT, re.S)


def example(word: str) -> str:
    (code,) = (code for code in EXAMPLES if word in code)
    return code


def test_every_example_is_run() -> None:
    assert sorted(EXAMPLES) == sorted(
        [example("weighted_advantages("), example("ShearGRPOTrainer(")]
    )


def test_weighted_advantages() -> None:
    names: dict[str, Any] = {}
    exec(example("weighted_advantages("), names)
    weighted, plain = names["token_advantages"], names["advantages"]
    assert weighted.shape == (8, 300)
    assert torch.equal(weighted.sign(), plain.sign()[:, None].expand_as(weighted))
    assert not torch.equal(weighted, plain[:, None].expand_as(weighted))


def test_trl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny model lies where the name of the model is looked up first."""
    pytest.importorskip("trl", reason="trl is not installed")
    code = example("ShearGRPOTrainer(")
    (name,) = re.findall(r'model="(.*?)"', code)
    tiny.model().save_pretrained(tmp_path / name)
    tiny.tokenizer().save_pretrained(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    # trl's default of bfloat16 asks for a GPU
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    names: dict[str, Any] = {"__name__": "readme"}
    exec(code, names)
    trainer = names["trainer"]
    assert trainer.state.global_step == 3
    shares = [
        entry["shear/mixed_groups"]
        for entry in trainer.state.log_history
        if "shear/mixed_groups" in entry
    ]
    assert shares == [0]  # one prompt that a random model always gets wrong
