"""Policy losses of verl, and what token weights on advantages and on gradients do in each.

The loss is verl's ppo_loss, with the KL term and the entropy beside the policy loss.
"""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip(
    "verl", reason="verl is not installed (make trainer-verl makes an environment with it)"
)
from omegaconf import OmegaConf
from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY
from verl.workers.config import FSDPActorConfig
from verl.workers.utils.losses import ppo_loss

from losses import EQUAL, check, difference, row
from shear_ops.integrations import verl as integration
from test_verl import CONFIG, SIZE, data, engine, jagged  # noqa: F401

OPTIONS: dict[str, dict[str, Any]] = {
    "dro": {"dro_beta": 0.5},
    "clip_cov": {"clip_cov_lb": 0.001, "clip_cov_ratio": 0.2},
    "kl_cov": {"kl_cov_ratio": 0.2},
}
CLIPS = {"dppo_tv": 0.005, "dppo_kl": 0.002}  # of divergences, which are small here
SELECTING = ("clip_cov", "kl_cov")
ROWS = [name for name in POLICY_LOSS_REGISTRY if name != "bypass_mode"]  # has no pass for states
BESIDE = {"use_kl_loss": True, "kl_loss_coef": 0.5, "entropy_coeff": 0.1}


def scored() -> Any:
    """What verl's driver makes of rollouts: ratios that clip, advantages of both signs, weights."""
    batch = data(use_remove_padding=True, use_dynamic_bsz=False, global_batch_size=SIZE)
    generator = torch.Generator().manual_seed(2)
    lengths = batch["responses"].offsets().diff().tolist()

    def each(make: Any) -> Tensor:
        return jagged([make(i, n) for i, n in enumerate(lengths)])

    rows = torch.linspace(-0.4, 0.4, SIZE)
    batch["old_log_probs"] = each(
        lambda i, n: rows[i] + 0.3 * torch.randn(n, generator=generator) - 3.4
    )
    batch["ref_log_prob"] = each(lambda i, n: torch.randn(n, generator=generator) - 3.4)
    batch["advantages"] = each(lambda i, n: torch.full((n,), (-1.0) ** i * (0.3 + 0.1 * i)))
    weights = each(lambda i, n: 2 * torch.rand(n, generator=generator) * (torch.arange(n) % 5 > 0))
    batch[integration.FIELD] = weights
    return batch


def step(made: Any, loss_mode: str, way: str | None, **more: Any) -> Tensor:
    """What a step of gradient descent adds to the parameters, weights applied a way or not."""
    batch = scored()
    weights = batch[integration.FIELD]
    if way == "advantages":
        pairs = zip(batch["advantages"].unbind(), weights.unbind(), strict=True)
        batch["advantages"] = jagged([a * w for a, w in pairs])
    policy_loss = {"loss_mode": loss_mode, **OPTIONS.get(loss_mode, {})}
    clip = CLIPS.get(loss_mode, 0.2)
    config = FSDPActorConfig(
        strategy="fsdp2", ppo_micro_batch_size_per_gpu=2, rollout_n=4,
        clip_ratio=clip, clip_ratio_low=clip, clip_ratio_high=clip,
        policy_loss=OmegaConf.create({"clip_cov_ub": 5.0, "ppo_kl_coef": 1.0, **policy_loss}), **more,
    )  # fmt: skip
    made._shear_scales = way == "gradient"
    made.optimizer_zero_grad = made.module.zero_grad
    made.optimizer_step = lambda: 0.0
    made.is_mp_src_rank_with_outputs = lambda: True
    torch.manual_seed(4)  # clip_cov draws tokens
    metrics = made.train_batch(batch, partial(ppo_loss, config=config))["metrics"]
    if loss_mode not in ("sapo", "gpg", "kl_cov", "dro"):  # which do not clip, or do not say so
        assert metrics["actor/pg_clipfrac"].aggregate() > 0.02  # else a table would say little
    return -0.5 * torch.cat([p.grad.flatten() for p in made.module.parameters()])


def chosen(loss_mode: str, way: str) -> str:
    """The way that a configuration leads to; or why it is refused."""
    given = {"policy_loss": {"loss_mode": loss_mode}}
    config = OmegaConf.merge(
        CONFIG, {"shear": {"apply": way}, "actor_rollout_ref": {"actor": given}}
    )
    try:
        return str(json.loads(integration.flag_of(config, 0))["apply"])
    except ValueError as error:
        return str(error)


def test_table_of_losses(engine: Any) -> None:  # noqa: F811
    """With a KL term and an entropy beside the policy loss, whose gradients are not weighted."""
    rows = []
    for name in ROWS:
        found: dict[str, Tensor | str] = {}
        for way in ("advantages", "gradient", "auto"):
            taken = chosen(name, way)
            found[way] = taken if " " in taken else step(engine, name, taken, **BESIDE)
        without = step(engine, name, None, **BESIDE)
        assert any(
            isinstance(result, Tensor) and difference(without, result) > 0.01
            for result in found.values()
        )
        rows.append(row(name, found, name in SELECTING))
    check("verl", rows)


def test_terms_beside_the_policy_loss_are_not_scaled(engine: Any) -> None:  # noqa: F811
    """The step of both is the sum of those of each, in the loss that only gradients can weight."""
    whole = step(engine, "geo_mean", "gradient", **BESIDE)
    policy = step(engine, "geo_mean", "gradient")
    plain = step(engine, "geo_mean", None, **BESIDE) - step(engine, "geo_mean", None)
    assert difference(whole - policy, plain) < 10 * EQUAL  # differences of larger numbers
    assert difference(step(engine, "geo_mean", None), policy) > 0.1


def test_update_of_what_the_engine_cannot_scale(engine: Any) -> None:  # noqa: F811
    batch = scored()
    engine._shear_scales = True
    engine.optimizer_zero_grad = engine.module.zero_grad

    def other(model_output: Any, data: Any, dp_group: Any = None) -> Any:
        return model_output["log_probs"].values().sum(), {}

    with pytest.raises(
        RuntimeError, match="apply=gradient needs a loss with a policy loss of verl"
    ):
        engine.train_batch(batch, other)
    del batch[integration.FIELD]
    with pytest.raises(RuntimeError, match="the data of an update must have shear_weights"):
        engine.train_batch(batch, other)


def test_the_pass_says_what_the_update_does(engine: Any) -> None:  # noqa: F811
    for way in ("gradient", "advantages"):
        flag = integration.flag_of(OmegaConf.merge(CONFIG, {"shear": {"apply": way}}), 0)
        engine.infer_batch(data(use_remove_padding=True, use_dynamic_bsz=False, shear=flag))
        assert engine._shear_scales == (way == "gradient")
