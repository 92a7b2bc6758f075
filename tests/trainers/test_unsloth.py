"""The trainer that Unsloth generates from trl's, around a plain transformers model on the CPU.

Stubbed: Unsloth's look for a GPU (its own switch UNSLOTH_ALLOW_CPU), and its patched model, whose
kernels need one: the tiny model gets Unsloth's two functions that switch between training and
generation. Its torch.compile of the loss is off, for time.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from shear_ops import SpanConfig, distributed, span_weights

CACHE = tempfile.TemporaryDirectory()  # of generated code, which else goes where pytest was started
os.environ |= {
    "UNSLOTH_COMPILE_LOCATION": CACHE.name,
    "UNSLOTH_ALLOW_CPU": "1",
    "UNSLOTH_GRPO_SEQ_PACKING": "0", "UNSLOTH_GRPO_PREFIX_GROUPER": "0",
}  # fmt: skip
os.environ.setdefault("UNSLOTH_COMPILE_DISABLE", "1")
pytest.importorskip(
    "unsloth", reason="unsloth is not installed (make trainer-unsloth makes an environment with it)"
)
from unsloth import FastLanguageModel  # noqa: E402
from unsloth.models.rl import PatchFastRL  # noqa: E402

os.environ["UNSLOTH_ALLOW_CPU"] = "0"  # with it, PatchFastRL leaves trl alone
PatchFastRL(FastLanguageModel=FastLanguageModel)
from datasets import Dataset  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402
from trl import GRPOConfig, GRPOTrainer  # noqa: E402

from shear_ops.integrations import unsloth as layout  # noqa: E402
from shear_ops.integrations.trl import ShearConfig, ShearGRPOTrainer, ShearMixin, attach  # noqa: E402

SPANS = SpanConfig(span=4, stride=2)
SHEAR = ShearConfig(correctness="odd", spans=SPANS)


def odd(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Every other rollout is correct: all groups have both labels."""
    return [float(place % 2) for place in range(len(completion_ids))]


def low(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [0.1 * (ids[0] < 20) for ids in completion_ids]


def prompts() -> Any:
    """Of unequal lengths: Unsloth moves their padding."""
    return Dataset.from_list([{"prompt": "1 + 2 = " * (1 + i % 3)} for i in range(8)])


def model(lora: bool = False) -> Any:
    made = tiny.model()
    if lora:
        config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        made = get_peft_model(made, config)
    for name in ("for_training", "for_inference"):
        setattr(made, name, MethodType(getattr(FastLanguageModel, name), made))
    return made


@pytest.fixture(autouse=True)
def work_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def build(
    cls: Any = ShearGRPOTrainer, *, shear: ShearConfig = SHEAR, lora: bool = False, **config: Any
) -> Any:
    arguments = {
        "per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 12, "max_steps": 2,
        "learning_rate": 1e-2, "warmup_ratio": 0.0, "logging_steps": 1, "gradient_accumulation_steps": 1, "seed": 1,
        "bf16": False, **config,
    }  # fmt: skip
    args = GRPOConfig(
        "out", report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True, **arguments
    )
    keywords = {} if cls is GRPOTrainer else {"shear_config": shear}
    return cls(
        model=model(lora), processing_class=tiny.tokenizer(), reward_funcs=[low, odd], args=args,
        train_dataset=prompts(), **keywords,
    )  # fmt: skip


def train(trainer: Any) -> Tensor:
    trainer.train()
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def logged(trainer: Any, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def test_this_is_unsloth() -> None:
    assert GRPOTrainer.__name__ == "UnslothGRPOTrainer"
    assert "compute_loss" in vars(GRPOTrainer.__mro__[1])
    assert layout.generated(type(build())) is GRPOTrainer


@pytest.mark.parametrize(
    "config",
    [{}, {"num_iterations": 2, "max_steps": 4}, {"per_device_train_batch_size": 4, "steps_per_generation": 2},
     {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}, {"loss_type": "dr_grpo"},
     {"mask_truncated_completions": True}],
    ids=str,
)  # fmt: skip
def test_weights_of_one_change_nothing(
    config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = torch.cat([p.detach().flatten() for p in model().parameters()])
    wanted = train(build(GRPOTrainer, **config))
    assert not torch.equal(wanted, before)
    weighted = build(**config)
    assert not torch.equal(train(weighted), wanted)
    assert any(mean != 1 for mean in logged(weighted, "shear/weight_mean"))
    real = distributed.span_weights

    def ones(*args: Any, **kwargs: Any) -> Any:
        found = real(*args, **kwargs)
        return found._replace(weights=torch.ones_like(found.weights))

    monkeypatch.setattr(distributed, "span_weights", ones)
    assert torch.equal(train(build(**config)), wanted)
    assert torch.equal(train(attach(build(GRPOTrainer, **config), SHEAR)), wanted)


@pytest.mark.parametrize("align", ["token", "predictor"])
@pytest.mark.parametrize(
    "config",
    [{}, {"num_iterations": 2}, {"per_device_train_batch_size": 4, "steps_per_generation": 2},
     {"lora": True, "beta": 0.1}, {"lora": True, "beta": 0.1, "num_iterations": 2}],
    ids=str,
)  # fmt: skip
def test_loss_has_the_weights_of_each_rollout(
    align: str, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against one forward per rollout, without padding, and span_weights; in the loss's layout."""
    trainer = build(shear=ShearConfig(correctness="odd", spans=SPANS, align=align), **config)
    real, wanted = trainer._weigh, {}  # advantage times weight by token, of a rollout

    def weigh(batch: dict[str, Any], recording: Any) -> None:
        wanted.clear()
        rows, states = [], []
        for row in range(len(batch["advantages"])):
            prompt, completion = (
                batch[f"{name}_ids"][row][batch[f"{name}_mask"][row].bool()]
                for name in ("prompt", "completion")
            )
            completion = completion[completion != 0]  # padding to Unsloth, wherever it is
            ids = torch.cat([prompt, completion])[None]
            with torch.no_grad():
                hidden = trainer.model(ids, output_hidden_states=True).hidden_states[-1][0]
            end = len(hidden) - (align == "predictor")
            states.append(hidden[end - len(completion) : end])
            rows.append(completion.tolist())
        lengths = [len(ids) for ids in rows]
        weights = span_weights(
            torch.cat(states), cu_seqlens=torch.tensor([0, *lengths]).cumsum(0),
            group_ids=batch["shear_samples"] // 4, labels=batch["shear_samples"] % 2,
            config=SPANS,
        ).split(lengths)  # fmt: skip
        for ids, advantage, factors in zip(rows, batch["advantages"], weights, strict=True):
            wanted[tuple(ids)] = advantage * factors
        assert len(wanted) == len(rows)
        assert recording.hidden.is_inference()  # which autograd would refuse in the loss
        real(batch, recording)

    trainer._weigh = weigh
    generated = sys.modules["UnslothGRPOTrainer"]
    loss, seen = generated.UnslothEfficientGRPO.apply, []

    def apply(*args: Any) -> Any:
        ids, mask, advantages = args[5:8]
        assert ids.shape == mask.shape == advantages.shape
        for row, here in enumerate(mask.bool()):
            expected = wanted[tuple(ids[row][here].tolist())]
            torch.testing.assert_close(advantages[row][here], expected, rtol=2e-3, atol=1e-5)
            seen.append(expected)
        widths.add(ids.shape[1])
        return loss(*args)

    widths: set[int] = set()
    monkeypatch.setattr(generated.UnslothEfficientGRPO, "apply", apply)
    # a micro-batch of whole groups: prompts without padding, among log-probabilities with some
    monkeypatch.setattr(generated, "shuffle_sequence_dict", lambda batch: batch)
    train(trainer)
    assert len(seen) >= 8
    assert max(widths) > 12  # prompts of unequal lengths were in one batch
    assert sum(bool((row != row[0]).any()) for row in seen) > len(seen) / 2


def test_evaluation() -> None:
    trainer = build(per_device_eval_batch_size=4)
    trainer.eval_dataset = prompts()
    trainer.evaluate()
    assert logged(trainer, "eval_shear/weight_max")[0] > 0
    assert torch.isfinite(torch.tensor(logged(trainer, "eval_loss")[0]))


def test_padding_inside_completions() -> None:
    """Unsloth takes every token with the padding's id, here 0, for padding."""
    prompt = torch.tensor([[0, 0, 5], [6, 7, 8]])
    completion = torch.tensor([[11, 0, 12, 0], [13, 14, 15, 16]])
    advantages = torch.tensor([[1.0, 9, 2, 9], [3, 4, 5, 6]])
    inputs = {"prompt_ids": prompt, "completion_ids": completion, "advantages": advantages}
    found = layout.aligned(inputs, 0)["advantages"]
    assert found.tolist() == [[1, 2, 0, 0, 0, 0], [0, 0, 3, 4, 5, 6]]
    ids = torch.cat([prompt, completion], 1)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 0], [1] * 7])
    where = layout.scored(ids, mask, 4, 0)
    packed = torch.tensor([[5, 11, 12, 0, 0, 0, 0], [6, 7, 8, 13, 14, 15, 16]])
    generated = sys.modules["UnslothGRPOTrainer"]
    assert torch.equal(generated.left_pack_padding(ids, 0), packed)
    assert packed[where].tolist() == [11, 12, 13, 14, 15, 16]


def test_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="mode must be 'score' or 'auto' with Unsloth, got 'loss'"):
        build(shear=ShearConfig(correctness="odd", mode="loss"))
    with pytest.raises(ValueError, match="apply must be auto or advantages, got gradient: Unsloth"):
        build(shear=ShearConfig(correctness="odd", apply="gradient"))
    with pytest.raises(ValueError, match="prompts must be text with Unsloth, got a column image"):
        build()._generate_and_score_completions([{"prompt": "1 + 1 =", "image": 0}])
    mixed = type("Mixed", (ShearMixin, GRPOTrainer), {})
    with pytest.raises(TypeError, match="UnslothLayout must come before ShearMixin"):
        build(mixed)
    plain = build(GRPOTrainer)
    for name in layout.SWITCHES:
        with monkeypatch.context() as patch:
            patch.setattr(sys.modules["UnslothGRPOTrainer"], f"{name}_ON", True)
            with pytest.raises(ValueError, match=f"{name} must be 0 when unsloth is imported"):
                attach(plain, SHEAR)
    assert type(plain) is GRPOTrainer
