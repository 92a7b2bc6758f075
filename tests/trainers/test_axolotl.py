"""Axolotl's real configuration, plugin manager, model loader, builder and training; nothing is stubbed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

import tiny
from shear_ops import SpanConfig, Weighting, distributed, labels_from_rewards, span_weights

os.environ["AXOLOTL_DO_NOT_TRACK"] = "1"
pytest.importorskip(
    "axolotl", reason="axolotl is not installed (make trainer-axolotl makes an environment with it)"
)
from axolotl.cli.config import load_cfg
from axolotl.common.datasets import load_preference_datasets
from axolotl.core.trainers.grpo.trainer import AxolotlGRPOTrainer
from axolotl.integrations.base import PluginManager
from axolotl.train import setup_model_and_trainer

from shear_ops.integrations.trl import ShearMixin

PLUGIN = "shear_ops.integrations.axolotl.ShearPlugin"
SPANS = {"span": 4, "stride": 2}
SHEAR = {"correctness": "even", "spans": SPANS}
LORA = {"adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_target_modules": ["q_proj", "v_proj"]}  # fmt: skip


def even(prompts: Any, completions: Any, completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [float(len(ids) % 2 == 0) for ids in completion_ids]


def low(prompts: Any, completions: Any, completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [0.1 * (ids[0] < 20) for ids in completion_ids]


class OtherTrainer(AxolotlGRPOTrainer):  # type: ignore[misc]
    """Scores rollouts by itself."""

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        return super()._generate_and_score_completions(inputs)


@pytest.fixture(autouse=True)
def work_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(PluginManager.get_instance(), "plugins", type(PluginManager.plugins)())
    tiny.model().save_pretrained("tiny")
    tiny.tokenizer().save_pretrained("tiny")
    tiny.prompts().to_json("prompts.jsonl")


def load(*, plugin: bool = True, shear: Any = SHEAR, trl: Any = (), **settings: Any) -> Any:
    """Axolotl's configuration from a YAML file."""
    file = {
        "base_model": "tiny", "rl": "grpo", "sequence_len": 128, "output_dir": "out",
        "datasets": [{"path": "prompts.jsonl", "ds_type": "json", "split": "train"}],
        "skip_prepare_dataset": True, "micro_batch_size": 8, "gradient_accumulation_steps": 1,
        "num_epochs": 1, "max_steps": 2, "learning_rate": 0.01, "warmup_steps": 0, "optimizer": "adamw_torch",
        "lr_scheduler": "constant", "logging_steps": 1, "save_strategy": "no", "seed": 1,
        "bf16": False, "fp16": False, "tf32": False, "dataloader_num_workers": 0, "dataloader_prefetch_factor": None,
        "trl": {"num_generations": 4, "max_completion_length": 12, "beta": 0.0,
                "reward_funcs": [f"{__name__}.low", f"{__name__}.even"], **dict(trl)},
        **settings,
    }  # fmt: skip
    if plugin:
        file |= {"plugins": [PLUGIN], "shear": shear}
    Path("file.yml").write_text(yaml.safe_dump(file))
    return load_cfg("file.yml")


def build(**settings: Any) -> Any:
    cfg = load(**settings)
    torch.manual_seed(0)  # for new LoRA weights
    return setup_model_and_trainer(cfg, load_preference_datasets(cfg=cfg))[0]


def train(trainer: Any) -> Tensor:
    trainer.train()
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def logged(trainer: Any, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@pytest.mark.parametrize(
    "settings", [{}, {"rl": "gdpo"}, LORA, {"micro_batch_size": 4, "gradient_accumulation_steps": 2}],
    ids=["grpo", "gdpo", "lora", "accumulation"],
)  # fmt: skip
def test_weights_of_one_change_nothing(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = build(plugin=False, **settings)
    assert type(plain) is AxolotlGRPOTrainer
    before = torch.cat([p.detach().flatten() for p in plain.model.parameters()])
    wanted = train(plain)
    assert not torch.equal(wanted, before)
    weighted = build(**settings)
    assert not torch.equal(train(weighted), wanted)
    assert max(logged(weighted, "shear/weight_max")) > 1
    real = distributed.span_weights

    def ones(*args: Any, **kwargs: Any) -> Any:
        found = real(*args, **kwargs)
        return found._replace(weights=torch.ones_like(found.weights))

    monkeypatch.setattr(distributed, "span_weights", ones)
    assert torch.equal(train(build(**settings)), wanted)


@pytest.mark.parametrize("settings", [{}, LORA], ids=["all", "lora"])
def test_advantages_times_weights_of_each_rollout(settings: dict[str, Any]) -> None:
    """Against one forward per rollout, without padding, and span_weights."""
    trainer = build(**settings)
    real, weighted = trainer._weigh, []

    def weigh(batch: dict[str, Any], recording: Any) -> None:
        plain = batch["advantages"]
        states, lengths, rewards = [], [], []
        for row in range(len(plain)):
            prompt, completion = (
                batch[f"{name}_ids"][row][batch[f"{name}_mask"][row].bool()]
                for name in ("prompt", "completion")
            )
            ids = torch.cat([prompt, completion])[None]
            with torch.no_grad():
                hidden = trainer.model(ids, output_hidden_states=True).hidden_states[-1][0]
            states.append(hidden[len(prompt) :])
            lengths.append(len(completion))
            rewards += even(None, None, [completion.tolist()])
        weights = span_weights(
            torch.cat(states), cu_seqlens=torch.tensor([0, *lengths]).cumsum(0),
            group_ids=batch["shear_samples"] // 4, labels=labels_from_rewards(torch.tensor(rewards)),
            config=SpanConfig(**SPANS),
        ).split(lengths)  # fmt: skip
        real(batch, recording)
        for row, factors in enumerate(weights):
            found = batch["advantages"][row, : lengths[row]]
            torch.testing.assert_close(found, plain[row] * factors, rtol=2e-3, atol=1e-5)
        weighted.append(torch.cat(weights))

    trainer._weigh = weigh
    train(trainer)
    assert len(weighted) == 2
    assert bool((torch.cat(weighted) != 1).any())
    for name in ("weight_mean", "weight_p95", "weight_max", "mixed_groups", "stopped"):
        assert len(logged(trainer, f"shear/{name}")) == 2
    highest = [weights.max().item() for weights in weighted]
    assert logged(trainer, "shear/weight_max") == pytest.approx(highest, rel=2e-3)


def test_section_reaches_the_trainer() -> None:
    weighting = {"mean_one": True, "clip": [0.5, 2.0], "warmup_steps": 3}
    section = {**SHEAR, "threshold": 0.25, "align": "predictor", "mode": "score", "weighting": weighting}  # fmt: skip
    trainer = build(shear=section)
    assert isinstance(trainer, ShearMixin)
    found = trainer.shear_config
    assert (found.correctness, found.threshold, found.align) == ("even", 0.25, "predictor")
    assert found.mode == trainer._shear_mode == "score"
    assert found.spans == SpanConfig(**SPANS)
    assert (found.weighting.mean_one, found.weighting.warmup_steps) == (True, 3)
    assert list(found.weighting.clip) == [0.5, 2.0]
    train(trainer)
    assert max(logged(trainer, "shear/weight_max")) <= 2


def test_without_section_the_defaults() -> None:
    trainer = build(shear=None, trl={"reward_funcs": [f"{__name__}.even"]})
    assert isinstance(trainer, ShearMixin)
    assert trainer.shear_config.spans == SpanConfig()
    assert trainer.shear_config.weighting == Weighting()


def test_later_file_without_the_plugin() -> None:
    """Axolotl's plugin manager keeps the plugins of earlier files."""
    assert isinstance(build(), ShearMixin)
    assert PLUGIN in PluginManager.get_instance().plugins
    assert type(build(plugin=False)) is AxolotlGRPOTrainer


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shear": {"treshold": 1}}, r"shear\.\* must be among .*, got treshold"),
        ({"shear": {"spans": {"spam": 1}}}, r"shear\.spans\.\* must be among .*, got spam"),
        ({"shear": {"spans": {"span": 0}}}, "span must be in"),
        ({"shear": 3}, "shear must be a section, got 3"),
        ({"rl": "dpo"}, "rl must be grpo or gdpo with shear, got 'dpo'"),
        ({"context_parallel_size": 2}, "context_parallel_size must be 1 with shear, got 2"),
        ({"trl": {"async_prefetch": True}}, r"trl\.async_prefetch must be false with shear"),
        ({"trl": {"use_data_producer": True}}, r"trl\.use_data_producer must be false with shear"),
    ],
)
def test_refuses_files(settings: dict[str, Any], message: str) -> None:
    """Before a model is loaded."""
    with pytest.raises((TypeError, ValueError), match=message):
        load(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shear": {}}, r"2 functions \(low, even\): say which"),
        ({"shear": {"correctness": "right"}}, r"\(low, even\), got 'right'"),
        (
            {
                "trl": {"importance_sampling_level": "sequence"},
                "shear": SHEAR | {"apply": "advantages"},
            },
            "must be 'token' with apply='advantages', got 'sequence'",
        ),
        (
            {"trainer_cls": f"{__name__}.OtherTrainer"},
            "_generate_and_score_completions must be trl's, got another one in OtherTrainer",
        ),
    ],
)
def test_refuses_trainers(settings: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        build(**settings)
