"""SHEAR in slime (Megatron ranks), as of August 2026: two functions that the command line names.

    --custom-megatron-before-log-prob-hook-path shear_ops.integrations.slime.before_log_prob
    --custom-advantage-function-path shear_ops.integrations.slime.advantages
    --custom-config-path shear.yaml
    --custom-megatron-init-path shear_ops.integrations.slime.check  # refuses at the start

shear.yaml (slime makes attributes of its arguments from it; without it all defaults hold)::

    shear:
      threshold: 0.5  # a rollout is correct if its raw reward is at least this
      spans: {span: 100, stride: 25}

The keys are the fields of Settings, SpanConfig and Weighting. The hidden states are those after the
final layer norm, on the last pipeline stage, in the pass for the old log-probabilities. Advantages
are GRPO's times the weights, returns are GRPO's. slime logs means of ``rollout/shear_weights`` and
``rollout/shear_stopped``.

slime skips that pass with one optimizer step per rollout, ``--kl-coef 0`` and its own policy loss.
To have it, name the same loss as a custom one::

    --loss-type custom_loss
    --custom-loss-function-path slime.backends.megatron_utils.loss.policy_loss_function

Groups are ``sample_indices // n_samples_per_prompt``, as slime's own data sources number samples.
Labels come from ``raw_reward``; None and NaN take no part. slime trains on truncated rollouts with
their reward, so they have a label, too; samples with ``remove_sample``, and tokens whose loss mask
is 0, take no part. Steps for ``weighting.warmup_steps`` count from the start of the process.

Memory: between the pass and the advantages a rank keeps its part of all states, prompts included:
tokens * d * 2 bytes in bfloat16, divided by the ranks of sequence and context parallelism. The
ranks of a tensor- and context-parallel group share the computation.

Tested on the CPU: Megatron's GPTModel with tensor, sequence and pipeline parallelism (megatron-core
0.16). Run with stubs: slime, and context parallelism, in both layouts. From source only: Ray, the
passes inside slime, Transformer Engine, virtual pipeline stages, a GPU. Not supported: what check()
refuses: gspo, ppo and others, apply gradient, ``--normalize-advantages``,
``--use-rollout-logprobs``, packing other than ``--qkv-format thd``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from numbers import Real
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import mpu
from slime.utils.ppo_utils import get_grpo_returns
from torch import Tensor, nn

from ..training.capture import HiddenCapture
from ..training.round import Rollouts, Round, lay_back
from ..training.settings import Settings, only_advantages, refuse
from .megatron import Layout, final_norm, own_part

ESTIMATORS = ("grpo", "cispo")
FIELDS = (
    "kl", "loss_masks", "micro_batch_indices", "num_microbatches", "partition", "raw_reward",
    "response_lengths", "rewards", "sample_indices", "tokens", "total_lengths",
)  # fmt: skip


class _Recorder:
    """The states of one pass, micro-batch by micro-batch: (tokens, 1, d), a rank's part of them."""

    def __init__(self) -> None:
        self.states: list[Tensor] = []
        self.steps = 0  # of the optimizer, before this rollout
        self._capture: HiddenCapture | None = None
        self._recording = ExitStack()

    def start(self, model: Sequence[nn.Module]) -> None:
        """Record the forwards from here on."""
        norm = final_norm(model)
        if self._capture is None or self._capture.backbone is not norm:
            self._capture = HiddenCapture(model[-1], backbone=norm)
        self.states = self._recording.enter_context(self._capture.whole())

    def stop(self) -> None:
        """Record no more."""
        self._recording.close()


_recorder = _Recorder()


def check(args: Any) -> Settings:
    """Settings in args.shear, checked together with slime's own arguments.

    Raises:
        TypeError, ValueError: for settings that are wrong, or that SHEAR cannot work with.
    """
    section = getattr(args, "shear", None)
    if not isinstance(section, Mapping) and section is not None:
        raise TypeError(f"shear must be a section of --custom-config-path, got {section!r}")
    settings = Settings.parse(section or {})
    refuse(refusals(args, settings))
    return settings


def refusals(args: Any, settings: Settings) -> Iterator[tuple[object, str]]:
    """What SHEAR cannot work with in slime's arguments."""
    layout, warmup = getattr(args, "qkv_format", "thd"), settings.weighting.warmup_steps
    yield (
        args.advantage_estimator not in ESTIMATORS,
        f"--advantage-estimator must be {' or '.join(ESTIMATORS)}, got "
        f"{args.advantage_estimator}: token weights multiply GRPO's advantages, and with gspo's "
        "one ratio per rollout they reduce to their mean",
    )
    yield (
        args.normalize_advantages,
        "--normalize-advantages must be off, got on: it whitens after the weights, which can "
        "turn the sign of an advantage",
    )
    yield (
        args.use_rollout_logprobs and not args.get_mismatch_metrics,
        "--use-rollout-logprobs must be off, got on: it skips the pass for the old "
        "log-probabilities, which gives the hidden states (--get-mismatch-metrics keeps it)",
    )
    yield only_advantages(settings, "slime's loss makes log-probabilities from the logits itself")
    yield layout != "thd", f"--qkv-format must be thd, got {layout}: only packed samples are read"
    yield (
        warmup and getattr(args, "release_train", False),
        f"shear.weighting.warmup_steps must be 0 with --release-train, got {warmup}: it starts "
        "the count of steps again every rollout",
    )


def before_log_prob(args: Any, model: Sequence[nn.Module], store_prefix: str) -> None:
    """Record the hidden states of the actor's pass, on the last pipeline stage.

    Args:
        args: slime's arguments.
        model: the chunks of the model that are on this rank.
        store_prefix: "" for the actor, else another model: its states are not recorded.

    Raises:
        TypeError, ValueError: as check; ValueError if the model has no final layer norm.
    """
    check(args)
    _recorder.stop()  # the pass before this one is over
    if store_prefix == "" and mpu.is_pipeline_last_stage(ignore_virtual=True):
        _recorder.start(model)


def advantages(args: Any, rollout_data: dict[str, Any]) -> None:
    """Write advantages, returns and shear_weights, lists of (R,) float32, into rollout_data.

    And shear_stopped, the share of span pairs whose distance had not converged, for every rollout.

    Collective over the last pipeline stage, where slime calls it after the pass.

    Args:
        args: slime's arguments.
        rollout_data: what slime has of this rank's rollouts.

    Raises:
        TypeError, ValueError: as check; for rewards that are no numbers; for a custom data source
            that numbers samples in another way than slime's.
        RuntimeError: if there was no pass for the old log-probabilities.
    """
    settings = check(args)
    _recorder.stop()
    if missing := [name for name in FIELDS if name not in rollout_data]:
        raise ValueError(f"rollout_data must have {', '.join(missing)}: update slime")
    weights, stopped = _weights(args, settings, rollout_data)
    _recorder.steps += len(rollout_data["num_microbatches"])
    kl = rollout_data["kl"]
    rewards = torch.tensor(rollout_data["rewards"], dtype=torch.float32, device=kl[0].device)
    rollout_data["returns"] = returns = get_grpo_returns(rewards, kl)
    rollout_data["advantages"] = [a * w for a, w in zip(returns, weights, strict=True)]
    rollout_data["shear_weights"] = weights
    rollout_data["shear_stopped"] = [stopped] * len(weights)


def _weights(args: Any, settings: Settings, data: dict[str, Any]) -> tuple[list[Tensor], float]:
    """Weights of the response tokens (R,), or of those of them that are this context rank's.

    Beside them PairCounts.stopped_share of all ranks.
    """
    micro_batches, recorded = data["micro_batch_indices"], _recorder.states
    if len(recorded) != len(micro_batches):
        raise RuntimeError(
            f"the pass for the old log-probabilities must have {len(micro_batches)} micro-batches, "
            f"got {len(recorded)}: slime skips it with one step per rollout, --kl-coef 0 and "
            "--loss-type policy_loss (then use --loss-type custom_loss --custom-loss-function-path "
            "slime.backends.megatron_utils.loss.policy_loss_function), or "
            "--custom-megatron-before-log-prob-hook-path does not name before_log_prob"
        )
    # every rank of a tensor- and context-parallel group has all rollouts and takes its share
    team = mpu.get_tensor_and_context_parallel_group()
    process_group = mpu.get_tensor_and_data_parallel_group(with_context_parallel=True)
    rollouts = Rollouts.scored(
        _rewards(data),
        settings.threshold,
        sample_ids=data["partition"],
        group_ids=_groups(args, data),
        process_group=process_group,
    )
    made = Round(settings)
    masks = [mask.bool() for mask in data["loss_masks"]]
    layout = Layout(args.sequence_parallel, getattr(args, "allgather_cp", False))
    for members in micro_batches:
        stream, start = layout.gather(recorded.pop(0)), 0
        for i in members:
            total = data["total_lengths"][i]
            if i % dist.get_world_size(team) == dist.get_rank(team):
                first = total - data["response_lengths"][i] - (settings.align == "predictor")
                wanted = first + masks[i].nonzero()[:, 0]
                rank, place = layout.places(wanted, total)
                made.add(stream[rank, start + place], [len(wanted)], rollouts.at([i]))
            start += layout.rows(total)
    finished = made.finish(_recorder.steps, process_group)
    found = finished.weights
    flat = torch.cat(
        [
            lay_back([found[sample]], mask)
            if sample in found
            else torch.zeros(len(mask), device=mask.device)
            for mask, sample in zip(masks, data["partition"], strict=True)
        ]
    )
    dist.all_reduce(flat, group=team)  # exact: all but one are 0
    whole = torch.split(flat, [len(mask) for mask in masks])
    parts = [own_part(row, total) for row, total in zip(whole, data["total_lengths"], strict=True)]
    return parts, finished.pairs.stopped_share


def _rewards(data: dict[str, Any]) -> Tensor:
    # raw_reward is of all ranks, unlike the rest; partition says which are ours
    rewards = [data["raw_reward"][i] for i in data["partition"]]
    for reward in rewards:
        if reward is not None and not isinstance(reward, Real):
            raise TypeError(f"raw_reward must be a number (see --reward-key), got {reward!r}")
    values = [float("nan") if reward is None else float(reward) for reward in rewards]
    return torch.tensor(values, dtype=torch.float64, device="cpu")


def _groups(args: Any, data: dict[str, Any]) -> list[int]:
    for index in data["sample_indices"]:
        if not isinstance(index, int):
            raise TypeError(f"sample_indices must be integers, got {index!r}")
    groups = [index // args.n_samples_per_prompt for index in data["sample_indices"]]
    source = getattr(args, "data_source_path", "slime.")
    if source.startswith("slime."):
        return groups
    prompts: dict[int, Tensor] = {}
    lengths = zip(data["total_lengths"], data["response_lengths"], strict=True)
    for group, tokens, (total, response) in zip(groups, data["tokens"], lengths, strict=True):
        prompt = tokens[: total - response]
        if not torch.equal(prompts.setdefault(group, prompt), prompt):
            raise ValueError(
                "--data-source-path must number samples as slime's own, so that sample_indices // "
                f"n_samples_per_prompt is the prompt, got {source}: prompts of group {group} differ"
            )
    return groups
