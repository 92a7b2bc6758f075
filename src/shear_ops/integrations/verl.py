"""SHEAR in verl 0.9.1 (V1 trainer, FSDP engine): a plugin that one configuration line turns on.

verl loads it in every process through the entry point group ``verl.plugins``. It does nothing until
the configuration has a ``shear`` section:

    python -m verl.trainer.main_ppo algorithm.adv_estimator=grpo +shear.threshold=0.5 ...

    +shear.threshold    a rollout is correct if the sum of its rm_scores is at least this
    +shear.align        as in HiddenCapture
    +shear.spans.*      fields of SpanConfig
    +shear.weighting.*  fields of Weighting; warmup_steps counts steps of the trainer
    +shear.apply        auto: gradient with policy_loss.loss_mode=geo_mean, else advantages

The pass for the old log-probabilities, which verl makes anyway, also gives the hidden states; they
are regrouped over the data-parallel group, and a field ``shear_weights`` per token goes back with
the log-probabilities. The driver multiplies the advantages with it; with apply=gradient, the engine
scales the gradient of the log-probabilities that the policy loss takes, and no other term (KL,
entropy, distillation).

Steps log ``shear/weight_mean``, ``weight_max``, ``stopped``. If they do not, the plugin is not on:
verl hides why, but VERL_USE_EXTERNAL_MODULES=shear_ops.integrations.verl shows it.

Tested: the engine on CPU, in all layouts (padding removed or not, dynamic batches or not). Run with
stubs: the driver's part. From source only: Ray workers, Ulysses, a GPU. Refused with an error:
Megatron and other engines, the legacy trainer and the experimental ones built on it,
``rollout_correction.bypass_mode`` (there is no such pass), and what docs/trainers.md has in its
table of losses.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial, wraps
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor
from verl.trainer.ppo.ray_trainer import RayPPOTrainer
from verl.trainer.ppo.v1 import trainer_base
from verl.utils import tensordict_utils as tu
from verl.workers.engine import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead
from verl.workers.utils import losses

from ..training.apply import scale_gradient
from ..training.capture import HiddenCapture
from ..training.groups import group_ids_from_uids
from ..training.metrics import of_weights
from ..training.round import Rollouts, Round, lay_back
from ..training.settings import Settings, refuse

FLAG = "shear"  # with the data of a pass: the section of the configuration, and the step, as JSON
FIELD = "shear_weights"
STOPPED = "shear_stopped"  # of all ranks, with every rollout
PER_ROLLOUT = ("geo_mean",)  # losses with one advantage per rollout
PENALIZED = ("dro", "kl_cov")  # losses with a penalty on the log-probabilities


class _Pass:
    """State of one pass for log-probabilities."""

    def __init__(self, flag: str, data: Any, engine: Any) -> None:
        sent = json.loads(flag)
        settings = Settings.parse(sent["section"])
        self.step = sent["step"]
        self.group = engine.get_data_parallel_group()
        rank = torch.distributed.get_rank(self.group) if torch.distributed.is_initialized() else 0
        scores = torch.stack([score.sum() for score in data["rm_scores"].unbind()])
        self.rollouts = Rollouts.scored(
            scores,
            settings.threshold,
            sample_ids=[(rank << 32) + place for place in range(len(scores))],
            group_ids=group_ids_from_uids([str(uid) for uid in tu.get(data, "uid")]).tolist(),
            process_group=self.group,
        )
        self.round = Round(settings)
        self.shift = settings.align == "predictor"

    def add(self, hidden: Tensor, micro_batch: Any) -> None:
        """Add the states (nnz, d) of a micro-batch's valid response tokens."""
        ends = micro_batch["input_ids"].offsets()[1:].tolist()
        masks = [mask.bool() for mask in micro_batch["response_mask"].unbind()]
        keep = torch.zeros(hidden.shape[0], dtype=torch.bool, device=hidden.device)
        for end, mask in zip(ends, masks, strict=True):
            keep[end - len(mask) - self.shift : end - self.shift] = mask.to(hidden.device)
        lengths = [int(mask.sum()) for mask in masks]
        rollouts = self.rollouts.at(micro_batch["shear_place"].tolist())
        self.round.add(hidden[keep], lengths, rollouts)

    def outputs(self, data: Any) -> dict[str, Tensor]:
        """Weights of all response tokens, jagged like the responses, and the share stopped."""
        finished = self.round.finish(self.step, self.group)
        found = finished.weights
        rows = [
            lay_back([found[sample]], mask.to(found[sample].device))
            for sample, mask in zip(
                self.rollouts.sample_ids, data["response_mask"].unbind(), strict=True
            )
        ]
        stopped = rows[0].new_tensor([finished.pairs.stopped_share])
        return {FIELD: _jagged(rows), STOPPED: _jagged([stopped] * len(rows))}


def _jagged(rows: list[Tensor]) -> Tensor:
    lengths = [len(row) for row in rows]
    return torch.nested.nested_tensor_from_jagged(
        torch.cat(rows),
        torch.tensor([0, *lengths], device=rows[0].device).cumsum(0),
        # without these, later padding is to the total number of tokens
        min_seqlen=min(lengths),
        max_seqlen=max(lengths),
    )


# the key with a vendor outranks the stock entry ("fsdp", "cuda")
@EngineRegistry.register(
    model_type="language_model", backend=["fsdp", "fsdp2"], device="cuda", vendor="nvidia"
)
class ShearFSDPEngine(FSDPEngineWithLMHead):  # type: ignore[misc]
    """FSDPEngineWithLMHead whose passes for log-probabilities also give token weights."""

    _shear_capture: HiddenCapture | None = None
    _shear_pass: _Pass | None = None
    _shear_states: list[Tensor]
    _shear_scales = False

    def infer_batch(self, data: Any, loss_function: Any = None) -> Any:
        """As FSDPEngineWithLMHead, with shear_weights where the data asks for them."""
        flag = tu.get_non_tensor_data(data, key=FLAG, default=None)
        if flag is None or loss_function is not None:
            return super().infer_batch(data, loss_function)
        if self._shear_capture is None:
            self._shear_capture = HiddenCapture(self.module)
        self._shear_pass = _Pass(flag, data, self)
        self._shear_scales = json.loads(flag)["apply"] == "gradient"  # in the updates that follow
        data["shear_place"] = torch.arange(len(self._shear_pass.rollouts))
        try:
            with self._shear_capture.whole() as self._shear_states:
                output = super().infer_batch(data, loss_function)
            output["model_output"].update(self._shear_pass.outputs(data))
        finally:
            self._shear_pass = None
            del data["shear_place"]
        return output

    def train_batch(self, data: Any, loss_function: Any) -> Any:
        """As FSDPEngineWithLMHead, with scaled gradients in the policy loss if apply says so."""
        if self._shear_scales:
            loss_function = partial(_scaled_loss, loss_function)
        return super().train_batch(data, loss_function)

    def prepare_model_outputs(
        self, output: Any, output_args: Any, micro_batch: Any, logits_processor_func: Any
    ) -> Any:
        """As FSDPEngineWithLMHead; banks the hidden states of the micro-batch."""
        if self._shear_pass is not None:
            (hidden,) = self._shear_states
            self._shear_states.clear()
            if tu.get_non_tensor_data(micro_batch, key="use_remove_padding", default=True):
                hidden = self._gather_and_unpad_packed(hidden.squeeze(0), output_args["pad_size"])
            else:
                lengths = micro_batch["input_ids"].offsets().diff().tolist()
                hidden = torch.cat([row[:n] for row, n in zip(hidden, lengths, strict=True)])
            self._shear_pass.add(hidden, micro_batch)
        return super().prepare_model_outputs(
            output, output_args, micro_batch, logits_processor_func
        )


def _scaled_loss(loss_function: Callable[..., Any], *, data: Any, **others: Any) -> Any:
    """A loss of verl, whose policy loss takes log-probabilities with scaled gradients."""
    if FIELD not in data:
        raise RuntimeError(f"the data of an update must have {FIELD}: verl sends other fields")
    rows = torch.nn.utils.rnn.pad_sequence(data[FIELD].unbind(), True, 1.0)
    real, taken = losses.get_policy_loss_fn, []

    def get_policy_loss_fn(name: str) -> Callable[..., Any]:
        policy_loss = real(name)

        def scaled(*, log_prob: Tensor, **rest: Any) -> Any:
            taken.append(name)
            more = max(log_prob.shape[1] - rows.shape[1], 0)
            weights = torch.nn.functional.pad(rows, (0, more), value=1.0).to(log_prob.device)
            return policy_loss(log_prob=scale_gradient(log_prob, weights), **rest)

        return scaled

    losses.get_policy_loss_fn = get_policy_loss_fn
    try:
        result = loss_function(data=data, **others)
    finally:
        losses.get_policy_loss_fn = real
    if not taken:
        raise RuntimeError(
            "apply=gradient needs a loss with a policy loss of verl, got another one"
        )
    return result


def flag_of(config: Any, step: int) -> str | None:
    """What the driver sends with the pass for old log-probabilities; None without a section.

    Raises:
        TypeError, ValueError: for settings that are wrong, or that SHEAR cannot work with.
    """
    section = config.get("shear", None)
    if section is None:
        return None
    if OmegaConf.is_config(section):
        section = OmegaConf.to_container(section, resolve=True)
    apply = Settings.parse(section).apply
    if apply == "auto":
        apply = "gradient" if _loss_mode(config) in PER_ROLLOUT else "advantages"
    refuse(refusals(config, apply))
    return json.dumps({"section": section, "step": step, "apply": apply})


def _loss_mode(config: Any) -> Any:
    return (config.actor_rollout_ref.actor.get("policy_loss", None) or {}).get("loss_mode")


def refusals(config: Any, apply: str) -> Iterator[tuple[object, str]]:
    """What SHEAR cannot work with in verl's configuration, where weights act as apply says."""
    actor = config.actor_rollout_ref.actor
    estimator, strategy = config.algorithm.adv_estimator, actor.strategy
    correction = config.algorithm.get("rollout_correction", None) or {}
    loss_mode = _loss_mode(config)
    yield (
        estimator != "grpo",
        f"algorithm.adv_estimator must be grpo with shear.*, got {estimator}",
    )
    yield (
        correction.get("bypass_mode", False),
        "algorithm.rollout_correction.bypass_mode must be False with shear.*, got True: it "
        "skips the pass for old log-probabilities, which gives the hidden states",
    )
    yield (
        strategy not in ("fsdp", "fsdp2"),
        "actor_rollout_ref.actor.strategy must be fsdp or fsdp2 with shear.*, got "
        f"{strategy}: only verl's FSDP engine gives the hidden states",
    )
    yield (
        apply == "advantages" and loss_mode in PER_ROLLOUT,
        "actor_rollout_ref.actor.policy_loss.loss_mode must be one with token-level advantages "
        f"with shear.apply=advantages, got {loss_mode}: it takes their mean over a rollout",
    )
    yield (
        apply == "gradient" and loss_mode in PENALIZED,
        "actor_rollout_ref.actor.policy_loss.loss_mode must not be one with a penalty of its own "
        f"on the log-probabilities with shear.apply=gradient, got {loss_mode}: token weights would "
        "scale the penalty's gradient",
    )


def _install(trainer: Any) -> None:
    """Wrap the methods of verl's V1 trainer that know the settings, the pass, the advantages."""
    old_log_prob, advantage = trainer._compute_old_log_prob, trainer._compute_advantage
    init = trainer.__init__

    @wraps(init)
    def checked_init(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        flag_of(self.config, 0)

    @wraps(old_log_prob)
    def compute_old_log_prob(self: Any, batch: Any, metrics: dict[str, Any]) -> Any:
        flag = flag_of(self.config, self.global_steps - 1)  # verl counts from 1
        if flag is None:
            return old_log_prob(self, batch, metrics)
        batch.extra_info[FLAG] = flag
        try:
            result = old_log_prob(self, batch, metrics)
        finally:
            batch.extra_info.pop(FLAG, None)
        result.extra_info.pop(FLAG, None)  # the reference's pass must not ask for weights
        return result

    @wraps(advantage)
    def compute_advantage(self: Any, batch: Any, metrics: dict[str, Any]) -> Any:
        batch = advantage(self, batch, metrics)
        flag = flag_of(self.config, self.global_steps - 1)
        if flag is None:
            return batch
        where = {"keys": batch.keys, "partition_id": batch.partition_id}
        fields = ["advantages", FIELD, STOPPED]
        data = trainer_base.tq.kv_batch_get(**where, select_fields=fields)
        advantages, weights = data["advantages"], data.pop(FIELD)
        weights = weights.to(advantages.device)
        metrics.update(of_weights(weights.values()))
        metrics["shear/stopped"] = data.pop(STOPPED).values().max().item()
        if json.loads(flag)["apply"] == "gradient":  # by the engine, in the update
            return batch
        rows = zip(advantages.unbind(), weights.unbind(), strict=True)
        data["advantages"] = torch.nested.as_nested_tensor(
            [row * factors for row, factors in rows], layout=torch.jagged
        )
        return trainer_base.tq.kv_batch_put(**where, fields=data)

    trainer.__init__ = checked_init
    trainer._compute_old_log_prob = compute_old_log_prob
    trainer._compute_advantage = compute_advantage


def _refuse(trainer: Any, name: str) -> None:
    """Wrap a method of the legacy trainer, which would train without the weights in silence."""
    method = getattr(trainer, name)

    @wraps(method)
    def refuse(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = method(self, *args, **kwargs)
        if self.config.get("shear", None) is not None:
            raise ValueError(
                f"shear.* needs verl's V1 trainer (trainer.use_v1=True), got {type(self).__name__}"
            )
        return result

    setattr(trainer, name, refuse)


_install(trainer_base.PPOTrainer)
_refuse(RayPPOTrainer, "__init__")
_refuse(RayPPOTrainer, "_update_actor")  # the experimental trainers do not call its __init__
