"""Losses of trl, and what token weights on advantages and on gradients do in each: a table.

One step with trl's own loss on a batch with ratios that are clipped on both sides, advantages of
both signs and weights that are 0, 1 and above. The table is the one in docs/trainers.md.
"""

from __future__ import annotations

import inspect
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from shear_ops import HiddenCapture

trl = pytest.importorskip("trl", reason="trl is not installed")
from trl import GRPOTrainer  # noqa: E402

from grpo import SPANS, build, logged, train  # noqa: E402
from losses import EQUAL, check, difference, row  # noqa: E402
from shear_ops.integrations.trl import ShearConfig, ShearGRPOTrainer, ShearMixin, attach  # noqa: E402
from test_trl import LOSSES, work_here  # noqa: E402, F401

SEQUENCE = {"importance_sampling_level": "sequence"}
ROWS: dict[str, dict[str, Any]] = {
    **{name: {"loss_type": name} for name in LOSSES},
    "dapo, `delta`": {"loss_type": "dapo", "delta": 1.1},
    "dapo, `top_entropy_quantile`": {"loss_type": "dapo", "top_entropy_quantile": 0.5},
    "dapo, `entropy_coef`": {"loss_type": "dapo", "entropy_coef": 0.1},
    "dapo, `off_policy_mask_threshold`": {"loss_type": "dapo", "off_policy_mask_threshold": 0.01},
    "dapo, `beta`": {"loss_type": "dapo", "beta": 0.5, "use_bias_correction_kl": False},
    "dapo, `beta`, `use_bias_correction_kl`": {
        "loss_type": "dapo", "beta": 0.5, "use_bias_correction_kl": True
    },
    **{f"{name}, sequence level": {"loss_type": name, **SEQUENCE} for name in LOSSES},
    "grpo, sequence level, `beta`": {
        "loss_type": "grpo", "beta": 0.5, "use_bias_correction_kl": False, **SEQUENCE
    },
    "GMPO": {"trainer": "gmpo.GMPOTrainer"},
    "GMPO, `beta`": {"trainer": "gmpo.GMPOTrainer", "beta": 0.5},
    "GSPO-token": {
        "trainer": "gspo_token.GRPOTrainer", "loss_type": "grpo",
        "importance_sampling_level": "sequence_token",
    },
}  # fmt: skip


def plain(trainer: str | None = None, **config: Any) -> Any:
    """A trainer with an option of ROWS; skips what this trl does not have."""
    loss_type, level = config.get("loss_type"), config.pop("importance_sampling_level", "token")
    if loss_type and f'"{loss_type}"' not in inspect.getsource(GRPOTrainer._compute_loss):
        pytest.skip(f"trl {trl.__version__} has no loss {loss_type}")
    if missing := set(config) - set(inspect.signature(trl.GRPOConfig).parameters):
        pytest.skip(f"trl {trl.__version__} has no {', '.join(missing)}")
    beta = config.pop("beta", 0.0)  # later: no reference model is needed here
    made = build(GRPOTrainer, **config)
    made.beta, made.importance_sampling_level = beta, level
    if trainer:
        module, _, name = f"trl.experimental.{trainer}".rpartition(".")
        made.__class__ = getattr(pytest.importorskip(module), name)
    return made


def log_probabilities(trainer: Any, batch: Any, which: int = 0, **options: Any) -> Tensor:
    """Of a batch's completions; with which = 1 the entropies."""
    ids, mask = (
        torch.cat([batch[f"prompt_{what}"], batch[f"completion_{what}"]], 1)
        for what in ("ids", "mask")
    )
    columns = batch["completion_ids"].shape[1]
    return GRPOTrainer._get_per_token_logps_and_entropies(
        trainer, trainer.model, ids, mask, columns, **options
    )[which]


def batch_of(trainer: Any) -> dict[str, Any]:
    """Scored rollouts of a policy that is far from the one that is trained."""
    generator = torch.Generator().manual_seed(5)
    lengths = torch.tensor([12, 3, 9, 12, 7, 1, 12, 10])
    mask = (torch.arange(12) < lengths[:, None]).long()
    prompts = torch.randint(3, 20, (8, 3), generator=generator)
    completions = torch.randint(3, 20, mask.shape, generator=generator) * mask
    rows = {
        "prompt_ids": prompts, "prompt_mask": torch.ones_like(prompts),
        "completion_ids": completions, "completion_mask": mask,
    }  # fmt: skip
    logps = log_probabilities(trainer, rows).detach()
    noise = torch.randn(2, *mask.shape, generator=generator)
    whole = torch.linspace(-0.4, 0.4, len(mask))[:, None]  # of a rollout: sequence ratios clip, too
    weights = 2 * torch.rand(mask.shape, generator=generator)
    weights[:, ::5] = 0
    reference = {"ref_per_token_logps": logps + 0.5 * noise[1]} if trainer.beta else {}
    return {
        **rows, **reference,
        "advantages": torch.tensor([1.3, -0.4, -0.9, 0.2, 0.8, -1.1, 0.5, -0.6]),
        "old_per_token_logps": logps + 0.3 * noise[0] + whole, "num_items_in_batch": mask.sum(),
        "shear_weights": torch.where(mask.bool(), weights, 1.0),
    }  # fmt: skip


def step(trainer: Any, batch: dict[str, Any]) -> Tensor:
    """What a step of gradient descent adds to the parameters."""
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train().zero_grad()
    trainer._compute_loss(trainer.model, dict(batch)).backward()
    return -0.5 * torch.cat([p.grad.flatten() for p in trainer.model.parameters()])


def weighted_step(trainer: Any, way: str, batch: dict[str, Any]) -> Tensor | str:
    """As step, with weights applied one way; or why this way is refused."""
    cls = type(trainer)
    try:
        attach(trainer, ShearConfig(apply=way, spans=SPANS))
    except ValueError as error:
        return str(error)
    trainer._shear_capture = HiddenCapture(trainer.model)
    found = step(trainer, batch)
    trainer._shear_capture.remove()
    trainer.__class__ = cls
    return found


def scaled_by_hand(trainer: Any, batch: dict[str, Any]) -> Tensor:
    """The step that weights on gradients must make: w * dL/dlogp, by the gradient of trl's loss.

    The KL term, which is not to be weighted, by the difference to a loss with beta = 0.
    """
    compute = type(trainer)._get_per_token_logps_and_entropies
    seen: list[Tensor] = []

    def keep(*args: Any, **kwargs: Any) -> Any:
        result = compute(trainer, *args, **kwargs)
        seen.append(result[0])
        seen[-1].retain_grad()
        return result

    trainer._get_per_token_logps_and_entropies = keep
    gradients = []
    for beta in (trainer.beta, 0.0):
        whole, trainer.beta = trainer.beta, beta
        trainer._compute_loss(trainer.model, dict(batch)).backward(retain_graph=True)
        gradients.append(seen[-1].grad)
        trainer.beta = whole
    del trainer._get_per_token_logps_and_entropies
    whole_gradient, policy = gradients
    wanted = batch["shear_weights"] * policy + (whole_gradient - policy)
    trainer.model.zero_grad()
    seen[-1].backward(wanted)
    return -0.5 * torch.cat([p.grad.flatten() for p in trainer.model.parameters()])


def measured(name: str) -> dict[str, Tensor | str]:
    """The step of a loss of ROWS by every way of applying weights."""
    trainer = plain(**ROWS[name])
    batch = batch_of(trainer)
    found = {way: weighted_step(trainer, way, batch) for way in ("advantages", "gradient", "auto")}
    if isinstance(found["gradient"], Tensor):
        unweighted = step(trainer, {k: v for k, v in batch.items() if k != "shear_weights"})
        assert difference(unweighted, found["gradient"]) > 0.1  # weights matter
        if "entropy_coef" not in name:  # whose gradient does not come from log-probabilities
            assert difference(scaled_by_hand(trainer, batch), found["gradient"]) < EQUAL
    return found


def test_table_of_losses() -> None:
    """What this trl has of it, and all of it as in the docs for the trl of `make test`."""
    rows = {}
    for name in ROWS:
        with suppress(pytest.skip.Exception):
            rows[name] = row(name, measured(name))
    assert len(rows) > 10
    if trl.__version__ == "1.16.0":
        check("trl", rows.values())


def test_sequence_level_is_gspo_token() -> None:
    """By the formula of its paper: sg[s] * p / sg[p] as the ratio, advantages A * w per token."""
    trainer = plain(loss_type="grpo", **SEQUENCE)
    batch = batch_of(trainer)
    found = weighted_step(trainer, "gradient", batch)
    trainer.model.zero_grad()
    mask, lengths = batch["completion_mask"], batch["completion_mask"].sum(1, keepdim=True)
    logp = log_probabilities(trainer, batch)
    ratio = torch.exp(
        ((logp - batch["old_per_token_logps"]) * mask).sum(1, keepdim=True) / lengths
    ).detach()
    token_ratio = ratio * torch.exp(logp - logp.detach())
    advantages = batch["advantages"][:, None] * batch["shear_weights"]
    low, high = 1 - trainer.epsilon_low, 1 + trainer.epsilon_high
    objective = torch.minimum(token_ratio * advantages, token_ratio.clamp(low, high) * advantages)
    (-(objective * mask).sum(1) / lengths[:, 0]).mean().backward()
    wanted = -0.5 * torch.cat([p.grad.flatten() for p in trainer.model.parameters()])
    assert difference(found, wanted) < EQUAL
    assert bool((ratio < low).any() & (ratio > high).any())


def test_clips_and_advantages_are_those_that_test() -> None:
    """The table would say little of ratios that are all within their bounds."""
    trainer = plain(loss_type="dapo")
    step(trainer, batch_of(trainer))
    for side in ("low", "high"):
        assert trainer._metrics["train"][f"clip_ratio/{side}_mean"][0] > 0.05


@pytest.mark.parametrize(
    "config", [{"loss_type": "dapo"}, {"loss_type": "grpo", **SEQUENCE}], ids=str
)
@pytest.mark.parametrize("mode", ["score", "loss"])
def test_training(config: dict[str, Any], mode: str) -> None:
    """By train(): the second step of a batch has ratios that are not 1."""
    config = {**config, "optim": "sgd", "learning_rate": 0.5, "max_steps": 4}
    if mode == "score":
        config["num_iterations"] = 2
    way = ShearConfig(mode=mode, apply="gradient", spans=SPANS)
    trainer = build(ShearGRPOTrainer, shear=way, **config)
    found = train(trainer)
    assert max(logged(trainer, "shear/weight_max")) > 1
    without = train(build(GRPOTrainer, **config))
    assert (found - without).abs().max() > 1e-3
    if "importance_sampling_level" not in config:
        way = ShearConfig(mode=mode, apply="advantages", spans=SPANS)
        wanted = train(build(ShearGRPOTrainer, shear=way, **config))
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


class Own(GRPOTrainer):  # type: ignore[misc]
    """Somebody's trainer with advantages per token."""

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        batch = super()._generate_and_score_completions(inputs)
        columns = torch.arange(batch["completion_ids"].shape[1])
        batch["advantages"] = batch["advantages"][:, None] * 0.9**columns
        batch["own_weights"] = 2.0 - batch["completion_ids"] % 2
        return batch


@pytest.mark.parametrize("way", ["advantages", "gradient"])
def test_other_weights_and_token_advantages_compose(way: str) -> None:
    """In token_weights, which has the entropies of the loss; advantages (B, C) stay what they are."""
    trainer = plain(loss_type="dapo")
    batch = batch_of(trainer)
    batch["advantages"] = batch["advantages"][:, None] * 0.9 ** torch.arange(12)
    own = torch.rand(8, 12, generator=torch.Generator().manual_seed(6))
    entropies = log_probabilities(trainer, batch, compute_entropy=True, which=1).detach()
    product = {**batch, "shear_weights": batch["shear_weights"] * own * entropies}
    wanted = weighted_step(trainer, way, product)

    class Others(ShearMixin):
        def token_weights(self, weights: Tensor, batch: Any, entropies: Tensor) -> Tensor:
            return weights * batch["own_weights"] * entropies

    trainer.__class__ = type("Both", (Others, GRPOTrainer), {})
    trainer._start_shear(ShearConfig(apply=way, spans=SPANS))
    trainer._shear_capture = HiddenCapture(trainer.model)
    found = step(trainer, {**batch, "own_weights": own})
    assert difference(found, wanted) < EQUAL
    Others.token_weights = lambda self, weights, batch, entropies: weights[:1]
    with pytest.raises(ValueError, match=r"token_weights must return \(8, 12\), got \(1, 12\)"):
        step(trainer, batch)


@pytest.mark.parametrize("mode", ["score", "loss"])
def test_training_with_other_weights(mode: str) -> None:
    seen = []

    class Others(ShearMixin):
        def token_weights(self, weights: Tensor, batch: Any, entropies: Tensor | None) -> Tensor:
            seen.append(entropies is None)
            return weights * batch["own_weights"]

    parameters = []
    for way in ("advantages", "gradient"):
        trainer = build(GRPOTrainer, optim="sgd", learning_rate=0.5)
        trainer.__class__ = type("Both", (Others, Own), {})
        trainer._start_shear(ShearConfig(mode=mode, apply=way, spans=SPANS))
        parameters.append(train(trainer))
    torch.testing.assert_close(*parameters, rtol=0, atol=1e-5)
    assert seen == [mode == "score"] * 2 + [False] * 2
    trainer = build(GRPOTrainer, optim="sgd", learning_rate=0.5)
    trainer.__class__ = Own
    assert (parameters[0] - train(trainer)).abs().max() > 1e-3


def test_evaluation_with_gradients() -> None:
    """A loss without gradients is that without weights."""
    losses = []
    for cls in (GRPOTrainer, ShearGRPOTrainer):
        keywords = (
            {"shear": ShearConfig(apply="gradient", spans=SPANS)} if cls is not GRPOTrainer else {}
        )
        trainer = build(cls, per_device_eval_batch_size=4, **keywords)
        trainer.eval_dataset = tiny.prompts(2)
        torch.manual_seed(3)
        trainer.evaluate()
        losses.append(logged(trainer, "eval_loss"))
    assert losses[0] == losses[1]


def test_refuses() -> None:
    for row_name, way, message in (
        (
            "grpo, sequence level",
            "advantages",
            r"importance_sampling_level must be 'token' with apply",
        ),
        (
            "dapo, `beta`, `use_bias_correction_kl`",
            "gradient",
            "use_bias_correction_kl must be False",
        ),
        ("GMPO", "advantages", "apply must be 'auto' or 'gradient' for trl's GMPOTrainer"),
    ):
        with suppress(pytest.skip.Exception):
            trainer = plain(**ROWS[row_name])
            with pytest.raises(ValueError, match=message):
                attach(trainer, ShearConfig(apply=way))
    trainer = build(GRPOTrainer)
    trainer.__class__ = type("Other", (GRPOTrainer,), {
        "__module__": "trl.experimental.other", "_compute_loss": GRPOTrainer._compute_loss,
    })  # fmt: skip
    with pytest.raises(ValueError, match="trainer must not be trl's Other: its loss is its own"):
        attach(trainer)


def test_trl_without_its_courtesy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A later trl may take one advantage per rollout only: (B, 1, C) would broadcast in silence."""
    compute = GRPOTrainer._compute_loss

    def without(self: Any, model: Any, inputs: Any) -> Tensor:
        assert inputs["advantages"].dim() < 2
        return compute(self, model, inputs)

    options = {"optim": "sgd", "learning_rate": 0.5}
    shear = ShearConfig(spans=SPANS)
    wanted = train(build(ShearGRPOTrainer, shear=shear, **options))
    monkeypatch.setattr(GRPOTrainer, "_compute_loss", without)
    found = train(build(ShearGRPOTrainer, shear=shear, **options))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="for trl's GRPOTrainer, got 'advantages': its loss takes"):
        build(ShearGRPOTrainer, shear=ShearConfig(apply="advantages"))


def test_loss_that_makes_its_own_log_probabilities() -> None:
    class Fused(GRPOTrainer):  # type: ignore[misc]
        def _compute_loss(self, model: Any, inputs: Any) -> Tensor:
            return sum(p.sum() for p in model.parameters()) * 0

    for mode in ("score", "loss"):
        trainer = build(GRPOTrainer)
        trainer.__class__ = Fused
        with pytest.raises(RuntimeError, match="could be recorded, whose log-probabilities apply="):
            attach(trainer, ShearConfig(mode=mode, apply="gradient")).train()
