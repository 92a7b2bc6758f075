"""SHEAR in OpenRLHF 0.11.2: a command in place of ``python -m openrlhf.cli.train_ppo_ray``.

    python -m shear_ops.integrations.openrlhf --shear.threshold 0.5 \\
        --algo.advantage.estimator group_norm <other arguments of openrlhf.cli.train_ppo_ray>

It works with group_norm, which is GRPO, and other estimators that compare the rollouts of a prompt;
not with OpenRLHF's default, gae.

    --shear.threshold    a rollout is correct if its score is at least this
    --shear.align        as in HiddenCapture
    --shear.spans.*      fields of SpanConfig
    --shear.weighting.*  fields of Weighting

``scores`` come from the reward function, the reward server or the agent, before penalties for
length; NaN is unscorable. Truncated rollouts have labels like others: OpenRLHF trains on them.

The Ray actors of the policy and the trainers are replaced by subclasses before OpenRLHF's command
runs. Settings travel in its arguments; shear_ops must be installed on every node. The pass for
log-probabilities, which OpenRLHF makes anyway, also gives the hidden states; they are regrouped
over the data-parallel ranks right after it, before the reference runs. Advantages are multiplied
after whitening. Steps log ``shear/weight_mean``, ``weight_max``, ``mixed_groups``, ``stopped``.

Tested, on two CPU ranks with Ray, DeepSpeed and gloo: padded, packed and dynamic batches, LoRA with
ZeRO-3, tensor parallelism, rollouts of several turns; the command, synchronous with a colocated
reference and asynchronous. Stubs there: vLLM, flash-attn's padding, torch.cuda's calls. From
source only: a GPU, nccl, several nodes, images, liger, sleep modes, rloo and dr_grpo. Not
supported: gspo and apply="gradient"; gae, reinforce and flash_reinforce; the KL penalty in rewards;
reward models; ring attention.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Iterator
from importlib.metadata import version
from itertools import chain, islice
from typing import Any

import openrlhf.utils
import ray
import torch
from openrlhf.trainer import ppo_trainer, ppo_trainer_async
from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker
from openrlhf.trainer.ray import ppo_actor
from torch import Tensor

from ..training.capture import HiddenCapture
from ..training.metrics import of_weights
from ..training.round import Rollouts, Round, lay_back
from ..training.settings import Settings, only_advantages, refuse

GROUP_ESTIMATORS = ("group_norm", "dr_grpo", "rloo", "reinforce_baseline")


class ShearPolicy:
    """For subclasses of PolicyModelActor: passes for log-probabilities bank the hidden states."""

    strategy: Any
    actor: Any

    def init_model_from_pretrained(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """As PolicyModelActor."""
        super().init_model_from_pretrained(strategy, *args, **kwargs)  # type: ignore[misc]
        self._shear_capture = HiddenCapture(self.actor.model, align=strategy.args.shear.align)
        self._shear_round = Round(strategy.args.shear)

    def forward(
        self,
        sequences: Tensor,
        action_mask: Tensor,
        attention_mask: Tensor,
        shear_rollouts: Rollouts,
        **kwargs: Any,
    ) -> Any:
        """As PolicyModelActor; banks the states of the actions.

        Args:
            sequences, attention_mask: (B, S). action_mask: (B, S - 1), of the tokens after the
                first.
            shear_rollouts: the B of them.
        """
        mask = action_mask
        if self.actor.packing_samples:  # one row of all tokens that are not padding
            first = sequences.shape[1] - action_mask.shape[1]
            mask = torch.nn.functional.pad(action_mask, (first, 0))[attention_mask.bool()][None]
        with self._shear_capture.recording(mask) as recording:
            log_probs = super().forward(  # type: ignore[misc]
                sequences=sequences,
                action_mask=action_mask,
                attention_mask=attention_mask,
                **kwargs,
            )
        self._shear_round.add(recording.hidden, action_mask.bool().sum(1), shear_rollouts)
        return log_probs

    def shear_weights(self) -> tuple[dict[int, Tensor], float]:
        """Token weights of this actor's rollouts by sample id, on the CPU. Collective.

        Beside them PairCounts.stopped_share of all actors.
        """
        group = self.strategy.ds_device_mesh["dp"].get_group()
        found = self._shear_round.finish(self.actor.model.global_steps, group)
        weights = {sample: own.cpu() for sample, own in found.weights.items()}
        return weights, found.pairs.stopped_share


class ShearExperienceMaker(RemoteExperienceMaker):  # type: ignore[misc]
    """RemoteExperienceMaker that multiplies advantages with token weights."""

    def make_experience(self, samples_list: list[Any]) -> list[Any]:
        """As RemoteExperienceMaker, with shear_weights (B, S - 1) in info of the experiences."""
        rollouts = scored(self.args, samples_list)
        places = iter(range(len(rollouts)))
        parts = [rollouts.at(islice(places, len(samples.index))) for samples in samples_list]
        self._shear_rollouts, self._shear_mixed = parts, rollouts.mixed_share
        experiences: list[Any] = super().make_experience(samples_list)
        replicas = self.args.ds.ring_attn_size * self.args.ds.tensor_parallel_size
        weights: dict[int, Tensor] = {}
        for part, stopped in ray.get(self._shear_refs)[::replicas]:
            weights |= part
            self._shear_stopped = stopped  # of all actors, so the same from each
        for experience in experiences:
            experience.info["shear_weights"] = lay_back(
                [weights[i] for i in experience.index], experience.action_mask
            )
        return experiences

    def _dispatch_forward(self, group: Any, sync_condition: bool, **kwargs: Any) -> Any:
        if group is not self.actor_model_group:
            return super()._dispatch_forward(group, sync_condition, **kwargs)
        refs = super()._dispatch_forward(
            group, sync_condition, shear_rollouts=self._shear_rollouts, **kwargs
        )
        self._shear_refs = group.async_run_method(method_name="shear_weights")
        if sync_condition:  # other models run on the same GPUs: the bank must be empty by then
            ray.get(self._shear_refs)
            ray.get(group.async_run_method(method_name="empty_cache"))
        return refs

    def compute_advantages_and_returns(self, experiences: list[Any]) -> list[Any]:
        """As RemoteExperienceMaker; then multiplies the advantages."""
        weights = [experience.info.pop("shear_weights") for experience in experiences]
        experiences = super().compute_advantages_and_returns(experiences)
        taken = torch.cat(
            [
                part[experience.action_mask.bool()]
                for part, experience in zip(weights, experiences, strict=True)
            ]
        )
        logged = of_weights(taken) | {
            "shear/mixed_groups": self._shear_mixed,
            "shear/stopped": self._shear_stopped,
        }
        for experience, part in zip(experiences, weights, strict=True):
            experience.advantages = experience.advantages * part
            for name, value in logged.items():  # OpenRLHF logs means over rollouts
                experience.info[name] = torch.full((len(part),), value)
        return experiences


class ShearTrainer:
    """For subclasses of BasePPOTrainer: with a ShearExperienceMaker."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """As the trainer."""
        super().__init__(*args, **kwargs)
        trainer: Any = self
        trainer.experience_maker = ShearExperienceMaker(
            trainer.actor_model_group,
            trainer.critic_model_group,
            trainer.reward_model_group,
            trainer.reference_model_group,
            trainer.kl_ctl,
            trainer.strategy,
            trainer.tokenizer,
        )


def scored(args: Any, samples_list: list[Any]) -> Rollouts:
    """All rollouts of samples_list, in its order.

    Raises:
        ValueError: for samples without scores.
    """
    refuse(
        (
            samples.scores is None,
            "scores must be given with every rollout by the reward function, the reward server or "
            "the agent with shear.*, got none: they tell whether a rollout is correct",
        )
        for samples in samples_list
    )
    index = list(chain.from_iterable(samples.index for samples in samples_list))
    return Rollouts.scored(
        torch.cat([samples.scores for samples in samples_list]),
        args.shear.threshold,
        sample_ids=index,
        group_ids=[sample // args.rollout.n_samples_per_prompt for sample in index],
    )


def refusals(args: Any, settings: Settings) -> Iterator[tuple[object, str]]:
    """What SHEAR cannot work with in OpenRLHF's arguments."""
    found = version("openrlhf")
    yield (
        not found.startswith("0.11."),
        f"openrlhf must be 0.11 with shear.*, got {found}: others were not read",
    )
    estimator, loss, ring = (
        args.algo.advantage.estimator, args.actor.policy_loss_type, args.ds.ring_attn_size
    )  # fmt: skip
    yield (
        estimator not in GROUP_ESTIMATORS,
        f"algo.advantage.estimator must be one of {', '.join(GROUP_ESTIMATORS)} with shear.*, "
        f"got {estimator}: token weights compare the rollouts of a group",
    )
    yield (
        loss != "ppo",
        f"actor.policy_loss_type must be ppo with shear.*, got {loss}: with one ratio per "
        "rollout, token weights reduce to their mean",
    )
    yield only_advantages(settings, "OpenRLHF sends weights to its loss in the advantages only")
    yield (
        args.algo.kl.init_coef > 0 and not args.algo.kl.use_loss,
        "algo.kl.init_coef must be 0 with shear.*, or algo.kl.use_loss given, got "
        f"{args.algo.kl.init_coef}: with the penalty in the rewards, token weights would "
        "multiply it",
    )
    yield (
        not args.reward.remote_url,
        "reward.remote_url or train.agent_func_path must be given with shear.*, got neither: "
        "the reward of a model does not tell whether a rollout is correct",
    )
    yield (
        ring != 1,
        f"ds.ring_attn_size must be 1 with shear.*, got {ring}: each rank has a slice of the "
        "hidden states of every rollout",
    )


def install(settings: Settings) -> None:
    """Replace OpenRLHF's actor classes in this process, and its get_strategy, which checks first.

    Raises:
        ValueError: from get_strategy, for what is in refusals.
    """
    for module, name, mixin, gpus in (
        (ppo_actor, "PolicyModelActor", ShearPolicy, 1),
        (ppo_trainer, "PPOTrainer", ShearTrainer, 0),
        (ppo_trainer_async, "TrainingActor", ShearTrainer, 0),
    ):
        # actor classes cannot be subclassed, so the class below; and it must not be importable:
        # Ray sends that class by value, and a subclass found by name would have another base
        plain = getattr(module, name).__ray_metadata__.modified_class.__ray_actor_class__
        made = type(f"Shear{name}", (mixin, plain), {})
        setattr(module, name, ray.remote(num_gpus=gpus)(made))
    make = openrlhf.utils.get_strategy

    def get_strategy(args: Any) -> Any:
        refuse(refusals(args, settings))
        args.shear = settings
        return make(args)

    openrlhf.utils.get_strategy = get_strategy


def main() -> None:
    """Run OpenRLHF's command with SHEAR."""
    settings, sys.argv[1:] = Settings.take(
        sys.argv[1:],
        "python -m shear_ops.integrations.openrlhf",
        "<arguments of openrlhf.cli.train_ppo_ray>",
    )
    install(settings)
    runpy.run_module("openrlhf.cli.train_ppo_ray", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    # this file as a module, which Ray's processes can import: classes of __main__ they cannot
    from shear_ops.integrations.openrlhf import main as run

    run()
