"""SHEAR in ms-swift 4.6.0, ``swift rlhf --rlhf_type grpo``: a plugin of two lines.

    # shear.py, where reward functions of your own may be registered, too
    from shear_ops.integrations.swift import register
    register(correctness="accuracy")  # the reward function, as on the command line

    swift rlhf --rlhf_type grpo --external_plugins shear.py --reward_funcs accuracy format ...

``register`` takes the fields of RewardSettings; ``spans`` and ``weighting`` may be dictionaries.
Name a file of your own, never this one: ms-swift puts a plugin's folder first on the path of
imports, and this folder has modules named like trainers.

Hidden states come from the pass for the old log-probabilities, which ms-swift makes for every
micro-batch: no extra forward. Groups may be split over micro-batches and ranks; states are
regrouped over the whole world. ``overlong_filter`` makes truncated rollouts ignored ones.

Weights multiply advantages; with importance_sampling_level "sequence" the gradient of the
log-probabilities (``register(apply=...)``; a KL term is not scaled).

Tested on a CPU, with the pipeline of that command and rollouts by transformers: full parameters and
LoRA, with a reference, loss_type grpo, bnpo, dr_grpo, dapo, cispo and sapo at every level of
importance sampling, groups split over micro-batches and two processes, num_iterations,
dynamic_sample, evaluation. Run with stubs: padding_free (without the check for flash attention),
masks with holes as tools make them. From source only: a GPU, vLLM (colocate, server,
async_generate), scheduled turns, images, DeepSpeed, FSDP2, loss_type fipo and
off_policy_sequence_mask_delta (both of which 4.6.0 itself refuses).

Steps log ``shear/weight_mean`` and others; if they do not, SHEAR is off. It is with Megatron and
Ray, which have trainers of their own and are not supported. Refused: the Liger loss,
loss_type "real", sequence_parallel_size, deepspeed_autotp_size, teachers, schedulers that make
several samples of one request, and what docs/trainers.md has in its table of losses.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from itertools import islice, zip_longest
from typing import TYPE_CHECKING, Any

import swift
import torch
from swift.rlhf_trainers import GRPOTrainer
from swift.rlhf_trainers.utils import get_even_process_data
from swift.trainers import TrainerFactory
from torch import Tensor

from ..training.apply import reference_beside, scale_gradient
from ..training.capture import HiddenCapture
from ..training.metrics import log_weights
from ..training.round import Rollouts, Round, lay_back
from ..training.settings import RewardSettings, refuse

OLDEST_SWIFT = (4, 6)

# a mixin at run time; for type checkers what it is mixed into
_Base: Any = GRPOTrainer if TYPE_CHECKING else object


class ShearMixin(_Base):  # type: ignore[misc]
    """Applies token weights in the loss of ms-swift's GRPOTrainer; put it before that.

    Logs over all completion tokens of a generation batch ``shear/weight_mean``, ``weight_p95``,
    ``weight_max``, ``mixed_groups``, the share of groups with both labels (the others have weight
    1), and ``stopped``, the share of solved span pairs that had not converged (see log_weights).
    """

    shear_settings = RewardSettings()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Take the trainer's arguments; settings are the class's.

        Raises:
            ValueError: for a setting of ms-swift that token weights cannot work with.
        """
        self._shear_apply = apply_of(kwargs["args"], self.shear_settings.apply)
        refuse(refusals(kwargs["args"], kwargs["template"], kwargs, self._shear_apply))
        self._shear_capture: HiddenCapture | None = None
        self._shear_round: Round | None = None
        super().__init__(*args, **kwargs)

    def _prepare_rewards(self, reward_funcs: Any, *args: Any, **kwargs: Any) -> None:
        given = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
        typed = [name if isinstance(name, str) else None for name in given]
        super()._prepare_rewards(reward_funcs, *args, **kwargs)  # replaces names by functions
        # reward models and environments come after the functions
        names = [name or own for name, own in zip_longest(typed, self.reward_func_names)]
        self._shear_correctness = self.shear_settings.position_of_correctness(names)

    def _prepare_batch_inputs(self, samples: Any) -> Any:
        refuse(refusals_of_samples(self, samples))
        settings = self.shear_settings
        if self._shear_capture is None:  # not earlier: the model was not wrapped yet
            self._shear_capture = HiddenCapture(self.model, align=settings.align)
        # places among the rollouts of all ranks, as ms-swift deals out their advantages
        places = get_even_process_data(self, range(len(self._rewards_per_func)))
        rewards = self._rewards_per_func[places.start : places.stop, self._shear_correctness]
        size = self.num_generations if self.model.training else self.num_generations_eval
        self._shear_rollouts = Rollouts.scored(
            rewards,
            settings.threshold,
            sample_ids=places,
            group_ids=[place // size for place in places],
            ignored=[s.is_truncated for s in samples] if self.overlong_filter else None,
            training=self.model.training,
        )
        self._shear_round = Round(settings, group_size=size)
        return super()._prepare_batch_inputs(samples)

    def _get_per_token_logps_and_entropies(
        self, model: Any, model_inputs: Any, grpo_batch: Any, *args: Any, **kwargs: Any
    ) -> Any:
        compute = super()._get_per_token_logps_and_entropies
        if (weights := getattr(grpo_batch, "shear_weights", None)) is not None:  # of the loss
            logps, entropies = compute(model, model_inputs, grpo_batch, *args, **kwargs)
            if grpo_batch.ref_per_token_logps is not None:  # read after this forward
                grpo_batch.ref_per_token_logps = reference_beside(
                    grpo_batch.ref_per_token_logps, logps, weights
                )
            return scale_gradient(logps, weights), entropies
        made, capture = self._shear_round, self._shear_capture
        # passes of a batch that has old log-probabilities are the reference's or the loss's
        if made is None or capture is None or grpo_batch.old_per_token_logps is not None:
            return compute(model, model_inputs, grpo_batch, *args, **kwargs)
        mask = grpo_batch.completion_mask
        wanted = _flattened(grpo_batch) if self.template.padding_free else mask
        result, recording = capture.record(
            wanted, lambda: compute(model, model_inputs, grpo_batch, *args, **kwargs)
        )
        rollouts = self._shear_rollouts.at(range(len(made), len(made) + len(mask)))
        made.add(recording.hidden, mask.sum(1), rollouts)
        return result

    def _compute_loss_and_metrics(self, model: Any, model_inputs: Any, grpo_batch: Any) -> Any:
        # a copy: the reference's log-probabilities get a gradient, once per loss
        return super()._compute_loss_and_metrics(model, model_inputs, copy(grpo_batch))

    def _postprocess_batch(self, samples: Any, batch_encoded_inputs: Any) -> None:
        super()._postprocess_batch(samples, batch_encoded_inputs)
        made, self._shear_round = self._shear_round, None
        if made is None or len(made) != len(samples):
            raise RuntimeError(
                f"passes for old log-probabilities gave the states of {len(made or ())} rollouts, "
                f"wanted {len(samples)}: ms-swift {swift.__version__} makes them elsewhere"
            )
        found = made.finish(self.state.global_step)
        rows = iter(found.weights.values())  # as added: micro-batch by micro-batch
        for batch in (encoded["grpo_batch"] for encoded in batch_encoded_inputs):
            mask = batch.completion_mask
            weights = lay_back(islice(rows, len(mask)), mask)
            if self._shear_apply == "advantages":
                batch.advantages = batch.advantages * weights
            else:
                batch.shear_weights = weights
        metrics = self._metrics["train" if self.model.training else "eval"]
        log_weights(self.accelerator, torch.cat(list(found.weights.values())), found, metrics)


class ShearGRPOTrainer(ShearMixin, GRPOTrainer):  # type: ignore[misc]
    """ms-swift's GRPOTrainer with SHEAR's token weights; settings are those of register()."""


def register(**settings: Any) -> None:
    """Make ``swift rlhf --rlhf_type grpo`` train with ShearGRPOTrainer.

    For a trainer of your own, put ShearMixin before it, set its shear_settings, and name it in
    ``TrainerFactory.TRAINER_MAPPING["grpo"]`` yourself.

    Args:
        settings: the fields of RewardSettings, as RewardSettings.parse takes them.

    Raises:
        TypeError, ValueError: naming the field, the value seen and the value wanted.
        RuntimeError: for an older ms-swift.
    """
    if tuple(int(part) for part in swift.__version__.split(".")[:2]) < OLDEST_SWIFT:
        raise RuntimeError(f"ms-swift must be 4.6 or later, got {swift.__version__}")
    ShearGRPOTrainer.shear_settings = RewardSettings.parse(settings)
    TrainerFactory.TRAINER_MAPPING["grpo"] = f"{__name__}.{ShearGRPOTrainer.__name__}"


def _flattened(batch: Any) -> Tensor:
    """The completion mask (B, T) of a padding_free batch as (1, S), like its forward's rows.

    The forward's last S tokens are the last seq_lengths of each rollout, one after another.
    """
    rows = zip(batch.completion_mask, batch.seq_lengths.tolist(), strict=True)
    return torch.cat([row[len(row) - length :] for row, length in rows])[None]


def apply_of(args: Any, wanted: str) -> str:
    """How weights are applied, where the settings want "auto" or one of the two ways."""
    if wanted != "auto":
        return wanted
    return "gradient" if args.importance_sampling_level == "sequence" else "advantages"


def refusals(
    args: Any, template: Any, kwargs: dict[str, Any], apply: str
) -> Iterator[tuple[object, str]]:
    """What SHEAR cannot work with in ms-swift's arguments and a trainer's own.

    Where weights are applied as apply says.
    """
    levels = ["token", "sequence_token", *(["sequence"] if apply == "gradient" else [])]
    deepspeed = args.deepspeed if isinstance(args.deepspeed, dict) else {}
    parallel = deepspeed.get("tensor_parallel", {}).get("autotp_size", 1)
    replicas = "token weights are computed over pure data parallelism"
    teacher = "a teacher's advantages are no credit for a reward"
    rules: list[tuple[str, Any, list[Any], str]] = [
        ("use_liger_kernel", args.use_liger_kernel, [False],
         "the Liger loss takes one advantage per rollout"),
        ("importance_sampling_level", args.importance_sampling_level, levels,
         "with one ratio per rollout, token weights reduce to their mean (use apply='gradient')"),
        ("loss_type", args.loss_type,
         ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "fipo"],
         "only losses that multiply advantages token by token can use token weights"),
        ("sequence_parallel_size", template.sequence_parallel_size, [1], replicas),
        ("deepspeed_autotp_size", parallel, [1], replicas),
        ("advantage_reweight", args.advantage_reweight, [None],
         "it is another method's token weight"),
        *((name, kwargs.get(name), [None, False], teacher)
          for name in ("teacher_model", "teacher_model_server", "teacher_use_disable_adapter")),
    ]  # fmt: skip
    for name, value, wanted, why in rules:
        listed = " or ".join(map(repr, wanted))
        yield value not in wanted, f"{name} must be {listed} with SHEAR, got {value!r}: {why}"


def refusals_of_samples(trainer: Any, samples: Any) -> Iterator[tuple[object, str]]:
    """What SHEAR cannot work with in rollouts."""
    yield (
        trainer.dynamic_num_samples,
        "multi_turn_scheduler must make one sample of each request with SHEAR, got several: "
        "parts of one trajectory have no correctness of their own",
    )
    yield (
        any(sample.teacher_prompt or sample.teacher_images is not None for sample in samples),
        "dataset must have no column teacher_prompt or teacher_images with SHEAR: a teacher's "
        "advantages are no credit for a reward",
    )
