"""SHEAR in trl's real GRPOTrainer, on tiny models: bit for bit where nothing should change."""

from __future__ import annotations

import inspect
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from shear_ops import HiddenCapture, Weighting, distributed, span_weights

trl = pytest.importorskip("trl", reason="trl is not installed")
from trl import GRPOTrainer  # noqa: E402

import grpo  # noqa: E402
from grpo import SPANS, build, logged, train  # noqa: E402
from shear_ops.integrations.trl import ShearConfig, ShearGRPOTrainer, attach  # noqa: E402
from shear_ops.training.round import Watch  # noqa: E402

LOSSES = ("dapo", "grpo", "dr_grpo", "bnpo", "cispo", "sapo", "vespo", "luspo")


@pytest.fixture(autouse=True)
def work_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    # transformers 4 writes bf16=True here and reads it as the default of every later trainer, also of spawned ranks
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")


@pytest.fixture
def ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """All weights 1, whatever the states."""
    real = distributed.span_weights

    def span_weights(*args: Any, **kwargs: Any) -> Any:
        found = real(*args, **kwargs)
        return found._replace(weights=torch.ones_like(found.weights))

    monkeypatch.setattr(distributed, "span_weights", span_weights)


def test_score_mode_is_like_loss_mode_when_shuffled() -> None:
    wanted = train(build(ShearGRPOTrainer, "score"))
    torch.testing.assert_close(train(build(ShearGRPOTrainer, "loss")), wanted, rtol=2e-3, atol=1e-4)


def skip_unknown(loss_type: str) -> None:
    if f'"{loss_type}"' not in inspect.getsource(GRPOTrainer._compute_loss):
        pytest.skip(f"trl {trl.__version__} has no loss {loss_type}")


@pytest.mark.parametrize("loss_type", LOSSES)
def test_weights_of_one_change_nothing(loss_type: str, ones: None) -> None:
    skip_unknown(loss_type)
    wanted = train(build(GRPOTrainer, loss_type=loss_type))
    for mode in ("score", "loss"):
        assert torch.equal(train(build(ShearGRPOTrainer, mode, loss_type=loss_type)), wanted)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_score_mode_equals_loss_mode(loss_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # another order of rows, as trl has it between scoring and loss, may change last bits in a GEMM
    monkeypatch.setattr("trl.trainer.grpo_trainer.shuffle_sequence_dict", lambda batch: batch)
    skip_unknown(loss_type)
    by_score = build(ShearGRPOTrainer, "score", loss_type=loss_type)
    wanted = train(by_score)
    by_loss = build(ShearGRPOTrainer, "loss", loss_type=loss_type)
    assert torch.equal(train(by_loss), wanted)
    assert max(logged(by_loss, "shear/weight_max")) > 1  # not vacuous
    for name in ("weight_mean", "weight_p95", "weight_max", "mixed_groups", "stopped"):
        one, other = (logged(trainer, f"shear/{name}") for trainer in (by_score, by_loss))
        assert one == pytest.approx(other, rel=1e-6)  # the order of the mean differs


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Arguments and result of every computation of weights."""
    seen: list[dict[str, Any]] = []
    real = distributed.span_weights

    def span_weights(hidden: Tensor, **kwargs: Any) -> Any:
        found = real(hidden, **kwargs)
        seen.append({"hidden": hidden, **kwargs, "weights": found.weights})
        return found

    monkeypatch.setattr(distributed, "span_weights", span_weights)
    return seen


def lora(**config: Any) -> Any:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    return peft.LoraConfig(
        r=4,
        target_modules=["q_proj", "v_proj"],
        task_type="CAUSAL_LM",
        init_lora_weights=False,
        **config,
    )


@pytest.mark.parametrize("kind", ["Qwen2", "Llama"])
@pytest.mark.parametrize("config", [{}, {"num_iterations": 2}])
def test_lora_takes_the_states_of_the_policy(
    kind: str, config: dict[str, Any], calls: list[dict[str, Any]]
) -> None:
    """The reference runs through the same module with the adapters off."""
    hidden = []
    for beta in (0.0, 0.1):
        calls.clear()
        trainer = build(
            ShearGRPOTrainer, "score", model=tiny.model(kind), peft=lora(), beta=beta, **config
        )
        train(trainer)
        hidden.append(calls[0]["hidden"])
        capture = trainer._shear_capture
    assert torch.equal(*hidden)
    ids = torch.arange(3, 12)[None]
    mask = torch.ones_like(ids)
    with torch.no_grad(), capture.recording(mask) as policy:
        trainer.model(ids)
    with torch.no_grad(), trainer.model.disable_adapter():
        reference = trainer.model(ids, output_hidden_states=True).hidden_states[-1][0]
    assert not torch.allclose(policy.hidden, reference, atol=1e-2)  # not vacuous


def test_reference_model(calls: list[dict[str, Any]], tmp_path: Path) -> None:
    tiny.model().save_pretrained(tmp_path / "tiny")
    hidden = []
    for beta in (0.0, 0.1):
        calls.clear()
        path = str(tmp_path / "tiny")
        train(build(ShearGRPOTrainer, "score", model=path, beta=beta, num_iterations=2))
        hidden.append(calls[0]["hidden"])
    assert torch.equal(*hidden)


@pytest.mark.parametrize(
    ("mode", "config", "extra"),
    [("score", {}, 2), ("score", {"num_iterations": 2}, 0), ("loss", {}, 0),
     ("auto", {}, 0), ("auto", {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}, 2)],
)  # fmt: skip
def test_extra_forwards(
    mode: str, config: dict[str, Any], extra: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = build(ShearGRPOTrainer, mode, **config)
    made = []
    real = trainer._forward_for_shear
    trainer._forward_for_shear = lambda *args: (made.append(1), real(*args))
    train(trainer)
    assert len(made) == extra
    assert max(logged(trainer, "shear/weight_max")) > 1


def test_weights_are_those_of_span_weights(calls: list[dict[str, Any]]) -> None:
    train(build(ShearGRPOTrainer, shear=ShearConfig(spans=SPANS)))
    for call in calls:
        wanted = span_weights(
            call["hidden"], cu_seqlens=call["cu_seqlens"], group_ids=call["group_ids"],
            labels=call["labels"], config=SPANS,
        )  # fmt: skip
        assert torch.equal(call["weights"], wanted)


def test_labels_come_from_the_named_function(calls: list[dict[str, Any]]) -> None:
    seen: list[float] = []

    def correct(completions: list[str], answer: list[str], **_: Any) -> list[float | None]:
        rewards = tiny.correct(completions, answer)
        seen.extend(rewards)
        return [None if i % 8 == 3 else reward for i, reward in enumerate(rewards)]

    for correctness in ("correct", 1):
        calls.clear()
        seen.clear()
        shear = ShearConfig(correctness=correctness, mode="score", spans=SPANS)
        trainer = build(ShearGRPOTrainer, rewards=[tiny.short, correct], shear=shear)
        assert bool(train(trainer).isfinite().all())
        labels = [label for call in calls for label in call["labels"]]
        assert labels == [-1 if i % 8 == 3 else int(reward) for i, reward in enumerate(seen)]


def test_all_correct_is_plain_grpo() -> None:
    """Also where other rewards give advantages."""
    rewards = [lambda completions, **_: [1.0] * len(completions), tiny.short]
    wanted = train(build(GRPOTrainer, rewards=rewards))
    trainer = build(ShearGRPOTrainer, rewards=rewards, shear=ShearConfig(correctness=0))
    assert torch.equal(train(trainer), wanted)
    assert not torch.equal(wanted, torch.cat([p.flatten() for p in tiny.model().parameters()]))
    assert logged(trainer, "shear/mixed_groups") == [0, 0]


@pytest.mark.parametrize(
    "config",
    [{"mask_truncated_completions": True}, {"bf16": True}, {"scale_rewards": "batch"}, {"delta": 1.5},
     {"off_policy_mask_threshold": 0.5}, {"top_entropy_quantile": 0.5}, {"gradient_checkpointing": False},
     {"per_device_train_batch_size": 4, "steps_per_generation": 2}],
    ids=str,
)  # fmt: skip
def test_options_of_trl(config: dict[str, Any], calls: list[dict[str, Any]]) -> None:
    trainer = build(ShearGRPOTrainer, **config)
    before = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    after = train(trainer)
    assert bool(after.isfinite().all())
    assert not torch.equal(before, after)
    if "mask_truncated_completions" in config:  # trl masks the whole rollout
        assert any(bool((call["cu_seqlens"].diff() == 0).any()) for call in calls)
    else:
        assert any(bool((call["weights"] != 1).any()) for call in calls)


def test_evaluation() -> None:
    trainer = build(ShearGRPOTrainer, per_device_eval_batch_size=4)
    trainer.eval_dataset = tiny.prompts(2)
    trainer.evaluate()
    assert logged(trainer, "eval_shear/weight_max")[0] > 0
    assert torch.isfinite(torch.tensor(logged(trainer, "eval_loss")[0]))


def test_attach_equals_subclass() -> None:
    wanted = train(build(ShearGRPOTrainer))
    trainer = attach(build(GRPOTrainer), ShearConfig(spans=SPANS))
    assert type(trainer).__name__ == "ShearGRPOTrainer"
    assert torch.equal(train(trainer), wanted)


def test_weighting_takes_the_optimizer_step() -> None:
    shear = ShearConfig(spans=SPANS, weighting=Weighting(mean_one=True, warmup_steps=2))
    trainer = build(ShearGRPOTrainer, shear=shear, max_steps=4)
    train(trainer)
    highest = logged(trainer, "shear/weight_max")
    assert highest[0] == 1
    assert max(highest[1:]) > 1


def test_refuses() -> None:
    for config, shear, message in (
        (
            {"importance_sampling_level": "sequence"},
            {"apply": "advantages"},
            "importance_sampling_level must be 'token'",
        ),
        ({"steps_per_generation": 2}, {"mode": "loss"}, "mode must be 'score' or 'auto'"),
        ({"num_iterations": 2}, {"mode": "loss"}, "mode must be 'score' or 'auto'"),
        ({}, {"correctness": "right"}, r"one of the reward functions \(correct\), got 'right'"),
        ({}, {"correctness": 1}, r"one of the reward functions \(correct\), got 1"),
    ):
        with pytest.raises(ValueError, match=message):
            build(ShearGRPOTrainer, shear=ShearConfig(**shear), **config)
        plain = build(GRPOTrainer, **config)
        with pytest.raises(ValueError, match=message):
            attach(plain, ShearConfig(**shear))
        assert type(plain) is GRPOTrainer
    with pytest.raises(ValueError, match=r"2 functions \(correct, short\): say which"):
        build(ShearGRPOTrainer, rewards=[tiny.correct, tiny.short])
    with pytest.raises(ValueError, match="mode must be one of auto, loss, score, got 'fast'"):
        ShearConfig(mode="fast")
    with pytest.raises(TypeError, match=r"trainer must be a trl.GRPOTrainer, got int"):
        attach(3)
    with pytest.raises(TypeError, match="must not have SHEAR already"):
        attach(build(ShearGRPOTrainer))


def test_refuses_liger_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = build(GRPOTrainer)
    trainer.args.use_liger_kernel = True
    monkeypatch.setattr(GRPOTrainer, "compute_liger_loss", lambda self: None, raising=False)
    with pytest.raises(ValueError, match="use_liger_kernel must be False"):
        attach(trainer)


@pytest.mark.parametrize("mode", ["score", "loss"])
@pytest.mark.parametrize("what", ["reordered", "filtered"])
def test_subclass_that_moves_scored_rollouts(mode: str, what: str) -> None:
    class Moving(GRPOTrainer):  # type: ignore[misc]
        def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
            batch = super()._generate_and_score_completions(inputs)
            size = len(batch["completion_ids"])
            rows = torch.arange(size).flip(0) if what == "reordered" else torch.arange(size // 2)
            return {k: v[rows] if isinstance(v, Tensor) and v.ndim else v for k, v in batch.items()}

    trainer = build(GRPOTrainer)
    trainer.__class__ = Moving
    with pytest.raises(RuntimeError, match="ShearMoving filtered, added or reordered rollouts"):
        attach(trainer, ShearConfig(mode=mode, spans=SPANS)).train()


def test_refused_configuration_leaves_the_trainer_as_it_was() -> None:
    trainer = build(GRPOTrainer)
    for wrong in ({"threshold": 0.5}, SPANS):
        with pytest.raises(TypeError, match="shear_config must be a ShearConfig"):
            attach(trainer, wrong)
        assert type(trainer) is GRPOTrainer
    attach(trainer)


def test_no_dropout_in_the_forward_for_shear(calls: list[dict[str, Any]]) -> None:
    """Identical rollouts are at distance 0, also in a model that drops out."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    lora = peft.LoraConfig(
        r=4, lora_dropout=0.5, init_lora_weights=False, target_modules=["q_proj", "v_proj"]
    )
    model = tiny.model()
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    trainer = build(ShearGRPOTrainer, "score", model=model, peft=lora)
    capture = HiddenCapture(trainer.model)
    ids = torch.arange(3, 9).repeat(2, 1)
    batch = {"prompt_ids": ids[:, :2], "completion_ids": ids[:, 2:]}
    batch |= {"prompt_mask": torch.ones(2, 2).long(), "completion_mask": torch.ones(2, 4).long()}
    trainer.model.train()
    with capture.recording(batch["completion_mask"]) as recording:
        trainer._forward_for_shear(batch, True)
    first, second = recording.hidden.chunk(2)
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-5)
    assert all(module.training for module in trainer.model.modules())


@pytest.mark.parametrize("mode", ["loss", "score"])
@pytest.mark.parametrize("config", [{}, {"disable_dropout": True}, {"num_iterations": 2}], ids=str)
def test_dropout_that_is_no_module(
    mode: str, config: dict[str, Any], calls: list[dict[str, Any]]
) -> None:
    """Rollouts without a difference have weights near 0, whoever makes the forward."""
    if mode == "loss" and "num_iterations" in config:
        pytest.skip("loss mode needs one iteration")
    trainer = build(
        ShearGRPOTrainer, mode, model=tiny.model("Llama", attention_dropout=0.5),
        rewards=lambda completions, **_: [float(i % 2) for i in range(len(completions))], max_steps=1, **config,
    )  # fmt: skip
    trainer.model.generate = lambda input_ids, **_: torch.cat(
        [input_ids, torch.arange(3, 15).repeat(len(input_ids), 1)], 1
    )
    extra = mode == "loss" or "num_iterations" in config  # else the extra forward is SHEAR's own
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        train(trainer)
    assert sum("attention_dropout = 0.5" in str(warning.message) for warning in seen) == extra
    (call,) = calls
    assert set(call["labels"]) == {0, 1}
    rows = call["hidden"].unflatten(0, (-1, 12))[torch.tensor(call["sample_ids"]).argsort()]
    for group in rows.split(4):
        torch.testing.assert_close(group, group[:1].expand_as(group), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["loss", "score"])
def test_rewards_that_never_cross_the_threshold(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As trl's own example, minus the distance from a length."""
    monkeypatch.setattr("shear_ops.integrations.trl.watch", Watch())
    rewards = lambda completions, **_: [-float(len(c.split())) for c in completions]  # noqa: E731
    trainer = build(ShearGRPOTrainer, mode, rewards=rewards, max_steps=12)
    with pytest.warns(
        UserWarning, match=r"were from -\d+ to -\d.*threshold = 0.5 on: none"
    ) as seen:
        train(trainer)
    assert sum("no group had" in str(warning.message) for warning in seen) == 1


def test_evaluation_is_not_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its rollouts neither say that SHEAR is on, nor that it is off."""
    watched = Watch()
    monkeypatch.setattr("shear_ops.integrations.trl.watch", watched)
    trainer = build(ShearGRPOTrainer, per_device_eval_batch_size=4)
    trainer.eval_dataset = tiny.prompts(2)
    trainer.evaluate()
    assert (watched._steps, watched._over) == (0, False)
    train(trainer)
    assert watched._steps or watched._over


def test_policy_whose_adapter_is_named_ref(calls: list[dict[str, Any]]) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    for mode in ("loss", "score"):
        calls.clear()
        model = peft.get_peft_model(tiny.model(), lora(), adapter_name="ref")
        train(build(ShearGRPOTrainer, mode, model=model))
        assert any(bool((call["weights"] != 1).any()) for call in calls)


def test_disabled_adapters_are_named() -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    for mode in ("loss", "score"):
        model = peft.get_peft_model(tiny.model(), lora())
        trainer = build(ShearGRPOTrainer, mode, model=model)
        with (
            pytest.raises(RuntimeError, match=r"without a forward.*is disabled"),
            model.disable_adapter(),
        ):
            train(trainer)


def test_loss_without_a_forward_of_the_policy() -> None:
    class Fused(GRPOTrainer):  # type: ignore[misc]
        def _compute_loss(self, model: Any, inputs: Any) -> Tensor:
            return sum(p.sum() for p in model.parameters()) * 0

    trainer = build(GRPOTrainer)
    trainer.__class__ = Fused
    with pytest.raises(RuntimeError, match=r"use ShearConfig\(mode='score'\)"):
        attach(trainer, ShearConfig(mode="loss")).train()


def test_two_ranks_equal_one(tmp_path: Path) -> None:
    sequence = partial(dict, importance_sampling_level="sequence")  # weights on gradients
    modes: list[Any] = [("score", dict), ("loss", dict), ("score", sequence)]
    for alone, found in grpo.on_one_and_two_ranks(tmp_path, modes, modes):
        assert found[0].trainer == ("DistributedDataParallel", "MULTI_CPU")
        grpo.assert_equal_runs(alone, found)
