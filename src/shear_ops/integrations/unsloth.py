"""What differs from trl where Unsloth (2026.10.9) has replaced trl's GRPOTrainer.

Import unsloth first, as it wants; then ShearGRPOTrainer and attach of shear_ops.integrations.trl
work as in trl, in score mode, and need two settings in the environment before the import:

    UNSLOTH_GRPO_SEQ_PACKING=0 UNSLOTH_GRPO_PREFIX_GROUPER=0 python train.py

Without them Unsloth packs rollouts into passes with other rows than the batch, and SHEAR refuses.

Unsloth moves the padding on a prompt's left to the right end of its row, in the pass for
log-probabilities and in the loss, and takes every token with the padding's id for padding. So
completions do not begin in one column: hidden states are taken, and weighted advantages laid out,
where Unsloth has the tokens. Its own loss has no pass that could be recorded, so that score mode
costs one extra forward without gradients per generation batch where Unsloth makes none for the
old log-probabilities or the reference.

Tested on the CPU: the trainer that Unsloth generates from trl 1.15.0, around a plain transformers
model, all parameters and LoRA with a reference, scoring under torch.inference_mode. From source
only: Unsloth's own patched models, a GPU, vLLM, several processes. Not supported: images and video,
apply="gradient".
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..training.settings import only_advantages, refuse

SWITCHES = ("UNSLOTH_GRPO_SEQ_PACKING", "UNSLOTH_GRPO_PREFIX_GROUPER")
TRAINER = "UnslothGRPOTrainer"

_Base: Any = object  # a mixin, which calls the methods of what it goes before


def generated(trainer: type) -> type | None:
    """The class that Unsloth generated, among a trainer's class and its bases."""
    return next((cls for cls in trainer.__mro__ if cls.__name__ == TRAINER), None)


class UnslothLayout(_Base):  # type: ignore[misc]
    """For ShearMixin, which it goes before: tokens are where Unsloth moves them."""

    def _shear_choose_mode(self, wanted: str) -> str:
        refuse(refusals(type(self), wanted))
        return "score"

    def _shear_choose_apply(self, wanted: str) -> str:
        why = "Unsloth's loss makes log-probabilities from hidden states itself"
        refuse([only_advantages(self.shear_config, why)])
        return "advantages"

    def _shear_recorded(self, input_ids: Tensor, attention_mask: Tensor, completion: int) -> Tensor:
        return scored(input_ids, attention_mask, completion, self._shear_pad)

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        refuse(
            (
                name in inputs[0],
                f"prompts must be text with Unsloth, got a column {name}: its pass for "
                "log-probabilities has another layout with images",
            )
            for name in ("image", "images")
        )
        return super()._generate_and_score_completions(inputs)  # type: ignore[no-any-return]

    def _shear_completion(self, batch: dict[str, Any]) -> Tensor:
        return tokens(batch["completion_ids"], batch["completion_mask"], self._shear_pad)

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As the trainer's, whose loss is here and not in _compute_loss."""
        return super().compute_loss(model, aligned(inputs, self._shear_pad), *args, **kwargs)

    @property
    def _shear_pad(self) -> int:
        return int(self.processing_class.pad_token_id)


def refusals(trainer: type, mode: str) -> Iterator[tuple[object, str]]:
    """What SHEAR cannot work with in Unsloth's switches and a mode of ShearConfig."""
    # as Unsloth read them when it was imported: the environment may say something else by now
    settings = vars(sys.modules[generated(trainer).__module__])
    for name in SWITCHES:
        yield (
            settings.get(f"{name}_ON", False),
            f"{name} must be 0 when unsloth is imported, got 1: packed passes have other "
            "rows than the batch, so that hidden states cannot be assigned to tokens",
        )
    yield (
        mode == "loss",
        "mode must be 'score' or 'auto' with Unsloth, got 'loss': its loss makes no pass "
        "that could be recorded",
    )


def tokens(completion_ids: Tensor, mask: Tensor, pad: int) -> Tensor:
    """Those of the tokens (B, C) with mask that Unsloth does not take for padding."""
    return mask.bool() & (completion_ids != pad)


def scored(input_ids: Tensor, mask: Tensor, completion: int, pad: int) -> Tensor:
    """(B, S): where a pass over rows (B, S) has the completions of its last columns.

    Args:
        mask: (B, S), of the tokens that count.
        completion: columns of the completion.
        pad: the padding's id.
    """
    kept = tokens(input_ids[:, -completion:], mask[:, -completion:], pad)
    prompts = input_ids[:, :-completion]
    return _places(prompts, kept, prompts.shape[1], pad)


def aligned(inputs: dict[str, Any], pad: int) -> dict[str, Any]:
    """A batch whose advantages (B, C) are laid out as Unsloth's loss has the tokens."""
    prompts, advantages = inputs["prompt_ids"], inputs["advantages"]
    before = int((prompts == pad).sum(1).max())
    for name in ("ref_per_token_logps", "old_per_token_logps"):
        if inputs.get(name) is not None:  # of the whole generation batch, with longer prompts
            before = inputs[name].shape[1] - advantages.shape[1]
    kept = inputs["completion_ids"] != pad
    places = _places(prompts, kept, before, pad)
    laid_out = advantages.new_zeros(places.shape)
    laid_out[places] = advantages[kept]
    return {**inputs, "advantages": laid_out}


def _places(prompts: Tensor, kept: Tensor, before: int, pad: int) -> Tensor:
    """(B, before + C): the kept tokens (B, C) of each row without gaps, after its prompt."""
    first = before - (prompts == pad).sum(1, keepdim=True)
    columns = torch.arange(before + kept.shape[1], device=kept.device)
    return (columns >= first) & (columns < first + kept.sum(1, keepdim=True))
