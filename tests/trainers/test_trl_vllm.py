"""SHEAR in trl's GRPOTrainer with use_vllm.

Stubbed: the client of the vLLM server, which answers with given completions and log-probabilities. What trl does with
them, and how it sends prompts and weights, is its own code.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny

trl = pytest.importorskip("trl", reason="trl is not installed")
from trl import GRPOTrainer  # noqa: E402
from trl.generation.vllm_generation import VLLMGeneration  # noqa: E402

import grpo  # noqa: E402
from shear_ops import distributed  # noqa: E402
from shear_ops.integrations.trl import ShearConfig, ShearGRPOTrainer  # noqa: E402

LOGPROB = -3.3  # of every token; about log(1 / 32), so that importance ratios are near 1 but not 1


class Client:
    """In place of trl's VLLMClient."""

    def __init__(self, **_: Any) -> None:
        self.steps = 0
        self.received: set[str] = set()

    def init_communicator(self, device: Any) -> None:
        pass

    def reset_prefix_cache(self) -> None:
        pass

    def get_server_info(self) -> dict[str, Any]:
        return {"model_config": {"logprobs_mode": "processed_logprobs"}}

    def update_named_param(self, name: str, weights: Tensor) -> None:  # trl < 1.16
        self.received.add(name)

    def update_named_params(self, metadata: Any, parameters: Any) -> None:
        self.received |= {name for name, _ in parameters}

    def generate(self, prompts: list[Any], n: int, **_: Any) -> dict[str, Any]:
        if isinstance(prompts[0], str):  # trl 0.29
            prompts = tiny.tokenizer()(prompts)["input_ids"]
        rows = range(n * len(prompts))
        made = [[*grpo.completion(self.steps, row), 1] for row in rows]
        self.steps += 1
        return {
            "prompt_ids": prompts,
            "completion_ids": made,
            "logprobs": [[[LOGPROB] for _ in tokens] for tokens in made],
            "logprob_token_ids": [[[token] for token in tokens] for tokens in made],
        }


@pytest.fixture(autouse=True)
def served(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if "import vllm" in inspect.getsource(VLLMGeneration.generate):
        pytest.skip(f"trl {trl.__version__} asks vllm itself for its version")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setattr("trl.generation.vllm_generation.is_vllm_available", lambda: True)
    monkeypatch.setattr("trl.generation.vllm_generation.VLLMClient", Client)
    monkeypatch.setattr("torch.cuda.current_device", lambda: "cpu")  # trl < 1.16
    # rows stay where they are between scoring and loss, to be compared
    monkeypatch.setattr("trl.trainer.grpo_trainer.shuffle_sequence_dict", lambda batch: batch)


class Seen:
    """What passed through a training: losses' inputs, states and weights, forwards of SHEAR's own."""

    def __init__(self, trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.inputs: list[dict[str, Any]] = []
        self.states: list[Tensor] = []
        self.weights: list[Tensor] = []
        self.extra = 0
        loss, weigh = GRPOTrainer._compute_loss, distributed.span_weights

        def compute_loss(trainer: Any, model: Any, inputs: dict[str, Any]) -> Tensor:
            self.inputs.append(inputs)
            return loss(trainer, model, inputs)  # type: ignore[no-any-return]

        def span_weights(hidden: Tensor, **kwargs: Any) -> Any:
            found = weigh(hidden, **kwargs)
            self.states.append(hidden)
            self.weights.append(found.weights)
            return found

        with monkeypatch.context() as patch:
            patch.setattr(GRPOTrainer, "_compute_loss", compute_loss)
            patch.setattr(distributed, "span_weights", span_weights)
            if isinstance(trainer, ShearGRPOTrainer):
                forward = trainer._forward_for_shear

                def counted(*args: Any) -> None:
                    self.extra += 1
                    forward(*args)

                trainer._forward_for_shear = counted
            self.parameters = grpo.train(trainer)


def build(cls: Any, vllm: bool, mode: str = "score", **config: Any) -> Any:
    shear = ShearConfig(mode=mode, spans=grpo.EXACT)
    if vllm:
        return grpo.build(cls, shear=shear, use_vllm=True, vllm_mode="server", **config)
    trainer = grpo.build(cls, shear=shear, **config)
    grpo.give_completions(trainer)
    return trainer


@pytest.mark.parametrize("mode", ["score", "loss"])
@pytest.mark.parametrize("correction", [True, False])
def test_weights_are_those_without_vllm(
    mode: str, correction: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Seen(build(GRPOTrainer, vllm=False), monkeypatch)
    without = Seen(build(ShearGRPOTrainer, vllm=False, mode=mode), monkeypatch)
    trainer = build(
        ShearGRPOTrainer, vllm=True, mode=mode, vllm_importance_sampling_correction=correction
    )
    found = Seen(trainer, monkeypatch)
    client = trainer.vllm_generation.vllm_client
    assert client.steps == grpo.STEPS
    assert len(client.received) == len(list(trainer.model.parameters()))
    # trl's own forward for the correction is enough
    assert found.extra == (grpo.STEPS if mode == "score" and not correction else 0)
    # later steps start from other parameters, since ratios change the loss
    assert torch.equal(found.states[0], without.states[0])
    assert torch.equal(found.weights[0], without.weights[0])
    assert bool((found.weights[0] != 1).any())
    batch, unweighted = found.inputs[0], plain.inputs[0]["advantages"]
    mask = batch["completion_mask"].bool()
    assert bool((unweighted != 0).any())
    if mode == "score":  # in loss mode the adapter gives trl's loss a dictionary of its own
        wanted = unweighted[:, None].expand(mask.shape)[mask] * found.weights[0]
        assert torch.equal(batch["advantages"][mask], wanted)
    if correction:
        ratio = batch["importance_sampling_ratio"].expand(mask.shape)[mask]
        assert bool((ratio != 1).any())
        assert bool(ratio.isfinite().all())
        assert not torch.equal(found.parameters, without.parameters)
    else:
        assert torch.equal(found.parameters, without.parameters)
    assert not torch.equal(found.parameters, plain.parameters)


@pytest.mark.parametrize("mode", ["score", "loss"])
def test_weights_of_one_change_nothing(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = Seen(build(GRPOTrainer, vllm=True), monkeypatch).parameters
    real = distributed.span_weights

    def ones(*args: Any, **kwargs: Any) -> Any:
        found = real(*args, **kwargs)
        return found._replace(weights=torch.ones_like(found.weights))

    monkeypatch.setattr(distributed, "span_weights", ones)
    assert torch.equal(
        Seen(build(ShearGRPOTrainer, vllm=True, mode=mode), monkeypatch).parameters, wanted
    )


def test_micro_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """The forward for the correction goes chunk by chunk; the weights do not notice."""
    config = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    whole = Seen(build(ShearGRPOTrainer, vllm=True), monkeypatch)
    parts = Seen(build(ShearGRPOTrainer, vllm=True, mode="auto", **config), monkeypatch)
    assert parts.extra == 0
    assert len(parts.inputs) == 4 * grpo.STEPS
    torch.testing.assert_close(parts.states[0], whole.states[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(parts.weights[0], whole.weights[0], rtol=0, atol=5e-6)
