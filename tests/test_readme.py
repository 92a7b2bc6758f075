"""The examples of README.md and docs/trainers.md run as printed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import shear_ops
import tiny
from problems import Text

ROOT = Path(__file__).parents[1]
EXAMPLES = [
    code
    for path in ("README.md", "docs/trainers.md")
    for code in re.findall(r"```python\n(.*?)```", (ROOT / path).read_text(), re.S)
]
WORDS = ("def spans(", "torch.ops.shear.span_weights(", "(..., shear_config", "[correct]",
         "weighted_advantages(", "scale_gradient(logp")  # fmt: skip


def example(word: str) -> str:
    (code,) = (code for code in EXAMPLES if word in code)
    return code


def test_every_example_is_run() -> None:
    assert sorted(EXAMPLES) == sorted(example(word) for word in WORDS)


def test_readme_is_short() -> None:
    text = (ROOT / "README.md").read_text()
    for left_out in (r"<!-- bench:begin.*?bench:end -->", r"```.*?```"):
        text = re.sub(left_out, "", text, flags=re.S)
    assert len(text.split()) < 1000


def test_the_loop_computes_the_weights() -> None:
    """Lengths below a span, of one span, and with ragged tails; POT for the distance."""
    ot = pytest.importorskip("ot", reason="POT is the judge here")

    def sinkhorn(cost: Tensor, eps: Tensor) -> Tensor:
        plan = ot.sinkhorn([], [], cost.double(), float(eps), stopThr=1e-5, numItermax=10_000)
        return (plan * cost).sum().float()

    labels = [1, 0, 0, 1]
    rollouts = [
        torch.linspace(1, 2, len(x))[:, None] * x for x in Text(9, 16).rollouts(131, 60, 100, 126)
    ]
    names: dict[str, Any] = {
        "torch": torch, "rollouts": rollouts, "labels": labels, "sinkhorn": sinkhorn
    }  # fmt: skip
    exec(example("def spans("), names)
    given: dict[str, Any] = {
        "hidden": torch.cat(rollouts),
        "cu_seqlens": torch.tensor([0, *(len(x) for x in rollouts)]).cumsum(0),
        "group_ids": [0] * 4,
        "labels": labels,
    }
    assert shear_ops.span_distances(**given).pairs.stopped == 0
    seen = torch.cat(names["weights"])
    assert seen.std() > 0.01
    torch.testing.assert_close(shear_ops.span_weights(**given), seen, rtol=2e-3, atol=0)


def test_operator() -> None:
    names: dict[str, Any] = {}
    exec(example("torch.ops.shear.span_weights("), names)
    lengths = names["lengths"].tolist()
    wanted = shear_ops.span_weights(
        names["hidden"], cu_seqlens=torch.tensor([0, *lengths]).cumsum(0), group_ids=[0] * 4,
        labels=[1, 0, 0, 1],
    )  # fmt: skip
    assert torch.equal(names["weights"], wanted)
    advantages = names["advantages"].tolist()
    for part, weights, advantage in zip(
        names["token_advantages"].split(lengths), wanted.split(lengths), advantages, strict=True
    ):
        assert torch.equal(part, advantage * weights)


def test_weighted_advantages() -> None:
    names: dict[str, Any] = {}
    exec(example("weighted_advantages("), names)
    weighted, plain = names["token_advantages"], names["advantages"]
    assert weighted.shape == (8, 300)
    assert torch.equal(weighted.sign(), plain.sign()[:, None].expand_as(weighted))
    assert not torch.equal(weighted, plain[:, None].expand_as(weighted))


def test_three_lines_of_trl(monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands for the arguments of GRPOTrainer is taken by a trainer that keeps them."""
    pytest.importorskip("trl", reason="trl is not installed")
    seen: list[Any] = []

    class Trainer:
        def __init__(self, *arguments: Any, shear_config: Any) -> None:
            seen.extend([*arguments, shear_config.correctness])

        def train(self) -> None:
            seen.append("trained")

    monkeypatch.setattr("shear_ops.integrations.trl.ShearGRPOTrainer", Trainer)
    exec(example("(..., shear_config"), {})
    assert seen == [..., "my_reward", "trained"]


def test_trl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny model lies where the name of the model is looked up first."""
    pytest.importorskip("trl", reason="trl is not installed")
    code = example("[correct]")
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


def test_loss_with_scaled_gradients() -> None:
    names: dict[str, Any] = {}
    exec(example("scale_gradient(logp"), names)
    ratio, advantages, weights = names["ratio"], names["advantages"], names["weights"]
    assert bool(((ratio - 1.01).abs() < 0.02).all())  # so nothing clips
    coming = -(ratio * advantages)[:, None].detach() / weights.numel()
    kl = 0.01 * (1 - torch.exp(names["reference"] - names["logp"].detach())) / weights.numel()
    torch.testing.assert_close(names["logp"].grad, coming * weights + kl, rtol=1e-5, atol=1e-9)
