"""SHEAR in trl's GRPOTrainer (trl 0.29 to 1.16): ShearGRPOTrainer, ShearMixin and attach.

Token weights need the policy's hidden states of whole groups. They come from a forward that the
trainer does anyway, where there is one:

- loss mode: the forward of the loss. Possible where a generation batch is one micro-batch
  (steps_per_generation = 1, num_iterations = 1): no extra forward.
- score mode: the forward for the old log-probabilities, which trl needs if generation and
  optimisation are not aligned, or with vLLM; else one extra forward without gradients per
  generation batch.

Where that forward draws random numbers, as dropout does in any form, states of equal tokens would
differ: they come from one more forward, in evaluation mode, and a warning says so. The first
forward is made twice, to see noise that shows in no other way (HiddenCapture.record).

Groups may lie on several ranks: states are regrouped over the whole world (shear_ops.distributed).

With Unsloth, which replaces trl's trainer, see shear_ops.integrations.unsloth.

Tested on CPUs with trl 0.29.0, 1.0.0, 1.9.0 and 1.16.0: all losses; two ranks equal one process
under DDP, FSDP2 (also with LoRA and a reference; accelerate was told that the CPU is an
accelerator) and, with trl 1.16.0, DeepSpeed ZeRO-2 and ZeRO-3; prompts with an image (Qwen2-VL).
Runs with stubs: use_vllm with a server, whose answers are made up (not with trl 1.0.0). From
source only: FSDP1 and a vLLM engine in the same process, which need a GPU.

Weights multiply advantages where the loss takes them per token; with importance_sampling_level
"sequence", and in trl's GMPO and GSPO-token, the gradient of the log-probabilities, which makes
that of "sequence" GSPO-token's (ShearConfig(apply=...); docs/trainers.md has a table of losses). A
KL term (beta) is not scaled.

Not supported, and refused: trl before 0.29; use_liger_kernel where trl's Liger loss takes one
advantage per rollout and makes the log-probabilities itself; with apply="gradient" and beta,
use_bias_correction_kl (trl's default from 1.16 on); other trainers of trl with a loss of their own;
subclasses that filter, add or reorder rollouts after they were scored. The loss of a subclass of
your own has to take advantages of shape (B, C), or, with apply="gradient", to read the reference's
log-probabilities after its forward of the policy.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import trl
from torch import Tensor
from trl import GRPOTrainer

from ..ops.api import labels_from_rewards
from ..training.apply import reference_beside, scale_gradient, weighted
from ..training.capture import HiddenCapture, Recording, evaluating
from ..training.metrics import log_weights
from ..training.round import Rollouts, lay_back, watch, weigh
from ..training.settings import RewardSettings, refuse
from .unsloth import UnslothLayout, generated

MODES = ("auto", "loss", "score")
OLDEST_TRL = (0, 29)
TAKES = "advantages.dim() == 1"  # in the source of trl's loss, which takes (B, C) as a courtesy
READ = ("trl.experimental.gmpo", "trl.experimental.gspo_token")  # losses of their own

Trainer = TypeVar("Trainer")

# a mixin at run time; for type checkers what it is mixed into
_Base: Any = GRPOTrainer if TYPE_CHECKING else object


@dataclass(frozen=True)
class ShearConfig(RewardSettings):
    """How token weights are made in a GRPOTrainer.

    Args:
        threshold, align, spans, weighting, apply, correctness: as in RewardSettings.
        mode: ``"loss"``, ``"score"`` (see the module), or ``"auto"``: loss where it is possible.

    Raises:
        TypeError, ValueError: naming the field, the value seen and the value wanted.
    """

    mode: str = "auto"

    def __post_init__(self) -> None:
        """Check every field; correctness is checked by the trainer, which knows the names."""
        super().__post_init__()
        if self.mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {self.mode!r}")


class ShearMixin(_Base):  # type: ignore[misc]
    """Applies token weights in the loss of a GRPOTrainer; put it before the trainer.

    Other weights, as of the entropy, compose by token_weights; rewards per token of your own as
    advantages (B, C) in the batch of a trainer that the mixin goes before.

    Logs over all completion tokens of a generation batch ``shear/weight_mean``, ``weight_p95``,
    ``weight_max``, ``mixed_groups``, the share of groups with both labels (the others have weight
    1), and ``stopped``, the share of solved span pairs that had not converged (see log_weights).
    """

    def __init__(self, *args: Any, shear_config: ShearConfig | None = None, **kwargs: Any) -> None:
        """Take the trainer's arguments and shear_config."""
        super().__init__(*args, **kwargs)
        self._start_shear(shear_config)

    def _start_shear(self, config: ShearConfig | None) -> None:
        self.shear_config = config = ShearConfig() if config is None else config
        if not isinstance(config, ShearConfig):
            raise TypeError(f"shear_config must be a ShearConfig, got {config!r}")
        self._shear_apply = self._shear_choose_apply(config.apply)
        refuse(refusals(self, self._shear_apply))
        if generated(type(self)) and not isinstance(self, UnslothLayout):
            raise TypeError(
                "UnslothLayout must come before ShearMixin where Unsloth generated the trainer, "
                f"got {type(self).__name__} without it: use attach"
            )
        self._shear_correctness = config.position_of_correctness(self.reward_func_names)
        self._shear_mode = self._shear_choose_mode(config.mode)
        self._shear_capture: HiddenCapture | None = None
        self._shear_scoring = False
        self._shear_recording: Recording | None = None
        self._shear_inputs: dict[str, Any] | None = None

    def _calculate_rewards(
        self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: list[list[int]]
    ) -> Tensor:
        rewards: Tensor = super()._calculate_rewards(
            inputs, prompts, completions, completion_ids_list
        )
        # (all ranks' rollouts, functions), and what they are of: trl has neither anywhere else
        self._shear_rewards, self._shear_scored = rewards, completion_ids_list
        return rewards

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        if self._shear_capture is None:  # not earlier: the model was not wrapped yet
            self._shear_capture = HiddenCapture(self.model, align=self.shear_config.align)
        training = self.model.training
        # in evaluation a micro-batch need not hold whole groups
        self._shear_scoring = self._shear_mode == "score" or not training
        self._shear_recording = None
        try:
            batch: dict[str, Any] = super()._generate_and_score_completions(inputs)
            self._shear_check_rows(batch["completion_ids"])
            size = batch["completion_ids"].shape[0]
            first = self.accelerator.process_index * size
            samples = torch.arange(first, first + size, device=batch["completion_ids"].device)
            rewards = self._shear_rewards[first : first + size, self._shear_correctness]
            batch["shear_samples"] = samples
            batch["shear_labels"] = labels_from_rewards(rewards, self.shear_config.threshold)
            if self._shear_scoring:
                if self._shear_recording is None:
                    self._forward_for_shear(batch, training)
                recording: Recording | None = self._shear_recording  # set by that forward
                if recording is None:
                    raise self._shear_no_forward("log-probabilities", "")
                batch["shear_weights"] = self._weigh(batch, recording)
                del batch["shear_samples"], batch["shear_labels"]
                if self._shear_apply == "advantages":
                    weights = self._shear_taken(batch, None)
                    batch["advantages"] = weighted(batch["advantages"], weights)
            return batch
        finally:
            self._shear_scoring, self._shear_recording = False, None

    def _shear_check_rows(self, completion_ids: Tensor) -> None:
        """Raise unless the rows of a batch are the rollouts that were scored, in their order."""
        rows, scored = completion_ids.tolist(), [list(ids) for ids in self._shear_scored]
        same = (row[: len(ids)] == ids for row, ids in zip(rows, scored, strict=False))
        if len(rows) != len(scored) or not all(same):
            raise RuntimeError(
                f"{type(self).__name__} filtered, added or reordered rollouts after they were "
                f"scored ({len(scored)} scored, {len(rows)} in the batch): which of "
                "them are correct, and whose group they are in, is not known any more"
            )

    def _forward_for_shear(self, batch: dict[str, Any], training: bool) -> None:
        # through trl's own method, which knows how this model wants images, chunks and autocast
        wanted = inspect.signature(super()._get_per_token_logps_and_entropies).parameters
        args = self.args
        with torch.no_grad(), evaluating(self.model):  # dropout would tell equal tokens apart
            self._get_per_token_logps_and_entropies(
                self.model,
                torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1),
                torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1),
                batch["completion_ids"].shape[1],
                batch_size=args.per_device_train_batch_size
                if training
                else args.per_device_eval_batch_size,
                **{name: value for name, value in batch.items() if name in wanted},
            )

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int,
        *args: Any, **kwargs: Any,
    ) -> Any:  # fmt: skip
        compute = super()._get_per_token_logps_and_entropies
        rest = (model, input_ids, attention_mask, logits_to_keep, *args)
        inputs, capture = self._shear_inputs, self._shear_capture
        wanted = inputs is not None or (self._shear_scoring and self._shear_recording is None)
        if not wanted or capture is None or model is self.ref_model or capture.reference_pass:
            return compute(*rest, **kwargs)
        if inputs is not None and "shear_weights" in inputs:
            result = compute(*rest, **kwargs)
        else:
            mask = self._shear_recorded(input_ids, attention_mask, logits_to_keep)
            result, recording = capture.record(mask, lambda: compute(*rest, **kwargs))
            if inputs is None:
                self._shear_recording = recording
                return result
            inputs["shear_weights"] = self._weigh(inputs, recording)
        self._shear_inputs = None
        logps, entropies, *others = result
        weights = self._shear_taken(inputs, entropies)
        # trl reads advantages and the reference's log-probabilities after this forward
        if self._shear_apply == "advantages":
            inputs["advantages"] = weighted(inputs["advantages"], weights)
            return result
        reference = inputs.get("ref_per_token_logps")
        if reference is not None:
            inputs["ref_per_token_logps"] = reference_beside(reference, logps, weights)
        return scale_gradient(logps, weights), entropies, *others

    def token_weights(
        self, weights: Tensor, batch: dict[str, Any], entropies: Tensor | None
    ) -> Tensor:
        """The weights that are applied; override it to multiply SHEAR's with others.

        Called once per micro-batch, where weights multiply the advantages or the gradient.

        Args:
            weights: (B, C) SHEAR's, 1 where there is no token.
            batch: what trl has of the rollouts: completion_ids, completion_mask, advantages, ...,
                and (B, ...) tensors that _generate_and_score_completions of yours put there.
            entropies: (B, C) of the policy in the forward of the loss; None where weights multiply
                when rollouts are scored (score mode with apply="advantages").

        Returns:
            (B, C), constants of at least 0.
        """
        return weights

    def _shear_taken(self, batch: dict[str, Any], entropies: Tensor | None) -> Tensor:
        """Take the weights out of a batch, as token_weights wants them applied."""
        given = batch.pop("shear_weights")
        detached = None if entropies is None else entropies.detach()
        weights = self.token_weights(given, batch, detached)
        if weights.shape != given.shape:
            raise ValueError(
                f"token_weights must return {tuple(given.shape)}, got {tuple(weights.shape)}"
            )
        return weights

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        if not {"shear_samples", "shear_weights"} & inputs.keys():  # weighted when scored
            return super()._compute_loss(model, inputs)  # type: ignore[no-any-return]
        self._shear_inputs = inputs = dict(inputs)  # trl may use its own again
        try:
            loss: Tensor = super()._compute_loss(model, inputs)
            if self._shear_inputs is not None:
                raise self._shear_no_forward(
                    "a loss",
                    ": use ShearConfig(mode='score')"
                    if self._shear_apply == "advantages"
                    else ", whose log-probabilities apply='gradient' needs",
                )
        finally:
            self._shear_inputs = None
        return loss

    def _shear_no_forward(self, what: str, advice: str) -> RuntimeError:
        if self._shear_capture is not None and self._shear_capture.reference_pass:
            advice = (
                ": the adapter that was active at the first step is disabled, or another one named "
                "'ref' is active, which is the reference's"
            )
        return RuntimeError(
            f"{type(self).__name__} computed {what} without a forward of the policy that could be "
            f"recorded{advice}"
        )

    def _shear_choose_mode(self, wanted: str) -> str:
        whole = self.args.steps_per_generation == 1 and self.args.num_iterations == 1
        if wanted == "loss" and not whole:
            raise ValueError(
                "mode must be 'score' or 'auto' where generation batches are split or used again "
                f"(steps_per_generation = {self.args.steps_per_generation}, num_iterations = "
                f"{self.args.num_iterations}), got 'loss': it needs whole groups in one micro-batch"
            )
        return wanted if wanted != "auto" else "loss" if whole else "score"

    def _shear_choose_apply(self, wanted: str) -> str:
        if wanted != "auto":
            return wanted
        token_level = self.importance_sampling_level == "token"
        takes = token_level and _takes_token_advantages(type(self))
        return "advantages" if takes else "gradient"

    def _shear_recorded(self, input_ids: Tensor, attention_mask: Tensor, completion: int) -> Tensor:
        """Where a forward over rows (B, S) has the tokens of their last columns, the completion."""
        return attention_mask[:, -completion:]

    def _shear_completion(self, batch: dict[str, Any]) -> Tensor:
        """(B, C): the tokens of the completions of a batch."""
        return batch["completion_mask"].bool()  # type: ignore[no-any-return]

    def _weigh(self, batch: dict[str, Any], recording: Recording) -> Tensor:
        """Token weights (B, C) of a batch."""
        completion = self._shear_completion(batch)
        mask = completion & batch["tool_mask"].bool() if "tool_mask" in batch else completion
        training, samples = self.model.training, batch["shear_samples"].tolist()
        group_size = self.num_generations if training else self.num_generations_eval
        found = weigh(
            self.shear_config,
            recording.hidden[mask[completion]],
            mask.sum(1),
            Rollouts(samples, [i // group_size for i in samples], batch["shear_labels"].tolist()),
            self.state.global_step,
        )
        rewards = self._shear_rewards[:, self._shear_correctness]
        if training:
            watch.step(rewards, self.shear_config.threshold, found.mixed_groups > 0)
        metrics = self._metrics["train" if training else "eval"]
        log_weights(self.accelerator, found.weights, found, metrics)
        return lay_back([found.weights], mask)


def mixins(trainer: type) -> tuple[type, ...]:
    """What goes before a class of GRPO trainers."""
    return (UnslothLayout, ShearMixin) if generated(trainer) else (ShearMixin,)


class ShearGRPOTrainer(*mixins(GRPOTrainer), GRPOTrainer):  # type: ignore[misc]
    """GRPOTrainer with SHEAR's token weights; takes shear_config=ShearConfig(...) besides."""


def attach(trainer: Trainer, shear_config: ShearConfig | None = None) -> Trainer:
    """Turn a GRPOTrainer that somebody else built into a SHEAR trainer, in place.

    Training is bit-identical to that of a ShearGRPOTrainer.

    Args:
        trainer: a trl.GRPOTrainer or an instance of a subclass, before train(). A subclass that
            filters or reorders scored rollouts raises in train(); its loss has to take advantages
            of shape (B, C).
        shear_config: default ShearConfig().

    Raises:
        TypeError: for another trainer, or another configuration.
        ValueError: as ShearGRPOTrainer. The trainer stays as it was.
    """
    if not isinstance(trainer, GRPOTrainer):
        raise TypeError(f"trainer must be a trl.GRPOTrainer, got {type(trainer).__name__}")
    if isinstance(trainer, ShearMixin):
        raise TypeError("trainer must not have SHEAR already")
    plain = type(trainer)
    trainer.__class__ = type(f"Shear{plain.__name__}", (*mixins(plain), plain), {})
    try:
        trainer._start_shear(shear_config)
    except Exception:
        trainer.__class__ = plain
        raise
    return trainer


def _owner_of_loss(trainer: type) -> type:
    return next(
        cls for cls in trainer.__mro__ if cls is not ShearMixin and "_compute_loss" in vars(cls)
    )


def _own_loss(trainer: type) -> type | None:
    """The class of trl's, below GRPOTrainer, whose loss a trainer takes."""
    owner = _owner_of_loss(trainer)
    return owner if owner is not GRPOTrainer and owner.__module__.startswith("trl.") else None


def _takes_token_advantages(trainer: type) -> bool:
    """Whether the loss of a trainer takes advantages (B, C): somebody's own is trusted to."""
    owner = _owner_of_loss(trainer)
    if owner is GRPOTrainer and not generated(trainer):
        return TAKES in inspect.getsource(owner._compute_loss)
    return _own_loss(trainer) is None


def refusals(trainer: Any, apply: str) -> Iterator[tuple[object, str]]:
    """What SHEAR cannot work with in a trainer, where weights are applied as apply says."""
    version = tuple(int(part) for part in trl.__version__.split(".")[:2])
    yield (
        version < OLDEST_TRL,
        f"trl must be 0.29 or later, got {trl.__version__}: earlier losses take one advantage "
        "per rollout",
    )
    per_token = apply == "advantages"
    yield (
        per_token and trainer.importance_sampling_level != "token",
        "importance_sampling_level must be 'token' with apply='advantages', got "
        f"{trainer.importance_sampling_level!r}: with one ratio per rollout, token weights "
        "reduce to their mean (use apply='gradient')",
    )
    owner = _own_loss(type(trainer))
    read = owner is not None and owner.__module__.startswith(READ)
    yield (
        owner is not None and not read,
        f"trainer must not be trl's {owner and owner.__name__}: its loss is its own, and was not "
        "read",
    )
    yield (
        per_token and not _takes_token_advantages(type(trainer)),
        f"apply must be 'auto' or 'gradient' for trl's {(owner or GRPOTrainer).__name__}, got "
        "'advantages': its loss takes one advantage per rollout",
    )
    yield (
        trainer.args.use_liger_kernel and hasattr(trainer, "compute_liger_loss"),
        "use_liger_kernel must be False, got True: trl's Liger loss takes one advantage per "
        "rollout, and makes the log-probabilities itself (newer versions of trl leave the loss "
        "alone)",
    )
    yield (
        not per_token
        and owner is None
        and trainer.beta != 0
        and getattr(trainer.args, "use_bias_correction_kl", False),
        "use_bias_correction_kl must be False with apply='gradient' and beta, got True: it "
        "multiplies the KL term with the ratio, and token weights would scale that ratio's "
        "gradient",
    )
