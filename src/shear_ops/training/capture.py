"""HiddenCapture: the hidden states of a policy's own forward passes, without extra memory."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..ops.batch import check_states, mask_as_bool

ALIGNMENTS = ("token", "predictor")


class HiddenCapture:
    """Records last-layer hidden states with a forward hook on a model's backbone.

    The backbone is found below DDP, FSDP, DeepSpeed, torch.compile and PEFT, as transformers'
    ``base_model``. Its output is the input of the LM head, also where a trainer fuses the head with
    the log-probabilities, so logits are neither needed nor kept. Passes of a PEFT model with its
    adapters disabled, or with the adapter "ref" active, are the reference's and not recorded.

    Make it once, before the first forward: torch.compile does not see hooks that come later.
    Outside recording() the hook does nothing.

    Args:
        model: the policy, wrapped or not.
        backbone: module whose output (or its ``last_hidden_state``, or its first element) is
            (B, S, d), for models that are not from transformers.
        align: ``"token"``: the state at a token, after reading it (the paper's); ``"predictor"``:
            the state one position earlier, which predicted it.

    Raises:
        TypeError, ValueError: naming the argument, the value seen and the value wanted.
    """

    def __init__(
        self, model: nn.Module, *, backbone: nn.Module | None = None, align: str = "token"
    ) -> None:
        """Find the backbone and hook it."""
        if align not in ALIGNMENTS:
            raise ValueError(f"align must be one of {', '.join(ALIGNMENTS)}, got {align!r}")
        if not isinstance(backbone, (nn.Module, type(None))):
            raise TypeError(f"backbone must be a torch.nn.Module, got {type(backbone).__name__}")
        self.backbone = find_backbone(model) if backbone is None else backbone
        self._shift = ALIGNMENTS.index(align)
        self._recording: Recording | None = None
        self._whole: list[Tensor] | None = None
        self._handle = self.backbone.register_forward_hook(self._hook)

    def remove(self) -> None:
        """Remove the hook from the model."""
        self._handle.remove()

    @property
    def reference_pass(self) -> bool:
        """Whether a forward now would be the reference's (PEFT adapters off, or "ref" active)."""
        peft = sys.modules.get("peft.tuners.tuners_utils")
        if peft is None:
            return False
        # by class: transformers' PreTrainedModel has methods of the same names
        for module in self.backbone.modules():
            if isinstance(module, peft.BaseTunerLayer):
                return bool(module.disable_adapters) or "ref" in module.active_adapters
        return False

    @contextmanager
    def recording(self, mask: Tensor) -> Iterator[Recording]:
        """Record the forwards inside the block; together they process mask's rows, in its order.

        Args:
            mask: (B, C) bool or 0/1: 1 where the state of a token is wanted, for the last C
                positions of the B rows that the forwards process, all at once or in chunks.
                In a packed layout that is (1, S).

        Yields:
            Recording: empty until the block has ended.

        Raises:
            RuntimeError: at the end of the block, unless exactly B rows were processed.
        """
        if self._recording is not None:
            raise RuntimeError("recording is already on")
        self._recording = recording = Recording(mask, self._shift)
        try:
            yield recording
        finally:
            self._recording = None
        recording.close()

    @contextmanager
    def whole(self) -> Iterator[list[Tensor]]:
        """Collect the outputs (B, S, d) of the forwards inside the block, detached, unselected.

        For layouts that are known only after the forward; the caller empties the list as it goes.
        """
        if self._whole is not None:
            raise RuntimeError("whole is already on")
        collected: list[Tensor] = []
        self._whole = collected
        try:
            yield collected
        finally:
            self._whole = None

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _hook(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if (self._recording is None and self._whole is None) or self.reference_pass:
            return
        hidden = _last_hidden_state(output)
        if self._recording is not None:
            self._recording.add(hidden)
        if self._whole is not None:
            self._whole.append(hidden.detach())


class Recording:
    """States of a block of forwards, in the packed layout.

    Attributes:
        hidden: (N, d), detached; the states where mask is set, row by row.
        cu_seqlens: (B + 1,) int64 on the CPU, offsets of the rows in hidden.
    """

    def __init__(self, mask: Tensor, shift: int) -> None:
        """Expect the rows of mask, with states shifted to the left."""
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            seen = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(f"mask must be a (B, C) tensor, got {seen}")
        self.hidden = torch.empty(0, 1)
        self._mask, self._shift = mask_as_bool(mask), shift
        self._parts: list[Tensor] = []
        self._rows = 0
        self.cu_seqlens = nn.functional.pad(self._mask.sum(1).cumsum(0), (1, 0)).cpu()

    def add(self, hidden: Tensor) -> None:
        """Keep the wanted states of one forward, hidden (b, S, d)."""
        check_states("the backbone's output", hidden, (3,))
        rows, (length, columns) = hidden.shape[0], (hidden.shape[1], self._mask.shape[1])
        mask = self._mask[self._rows : self._rows + rows]
        self._rows += rows
        if self._rows > self._mask.shape[0]:
            return  # close() raises, after the forward: an error here would look like the model's
        first = length - columns - self._shift
        if first < 0:
            if length < columns or bool(mask[:, 0].any()):
                raise ValueError(
                    f"mask must fit the last {length} positions of a forward"
                    f"{', from the second on' if self._shift else ''}, got {columns} columns"
                )
            mask, first = mask[:, 1:], 0
        # boolean indexing copies: the graph and the rest of the states are free to go
        self._parts.append(hidden.detach()[:, first : first + mask.shape[1]][mask])

    def close(self) -> None:
        """Join the parts; raise RuntimeError unless the forwards had mask's rows."""
        if self._rows != self._mask.shape[0]:
            raise RuntimeError(
                f"the policy's forwards processed {self._rows} rows while recording, wanted "
                f"{self._mask.shape[0]} (reference passes do not count)"
            )
        if self._parts:
            self.hidden = torch.cat(self._parts) if len(self._parts) > 1 else self._parts[0]
        self._parts = []


def find_backbone(model: nn.Module) -> nn.Module:
    """Return the module below wrappers and the LM head whose output is the last hidden state.

    Raises:
        TypeError: if model is no torch.nn.Module.
        ValueError: if below the wrappers there is no transformers model, or for one that PEFT tunes
            by prompts or prefixes.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    while (inner := _inner(model)) is not None:
        if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
            raise ValueError(
                "model must not be tuned by prompts or prefixes, got "
                f"{type(model.active_peft_config).__name__}: its reference passes look like those "
                "of the policy; LoRA and other adapters work"
            )
        model = inner
    backbone = getattr(model, "base_model", None)
    if not isinstance(backbone, nn.Module):
        raise ValueError(
            f"model must be a transformers model, wrapped or not, got {type(model).__name__}: "
            "for others give backbone=, the module whose output is the last hidden state"
        )
    return backbone


def _inner(model: nn.Module) -> nn.Module | None:
    if hasattr(model, "get_base_model"):  # PEFT
        return cast(nn.Module, model.get_base_model())  # type: ignore[operator]
    for name in ("_orig_mod", "module"):  # torch.compile; DDP, DeepSpeed, FSDP1
        if isinstance(inner := getattr(model, name, None), nn.Module):
            return inner
    return None


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and back: of every module that was training, not of those that were not."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _last_hidden_state(output: Any) -> Tensor:
    if isinstance(output, (tuple, list)):
        output = output[0]
    hidden = getattr(output, "last_hidden_state", output)
    if not isinstance(hidden, Tensor):
        raise TypeError(f"the backbone's output must be a tensor, got {type(hidden).__name__}")
    if hasattr(hidden, "full_tensor"):
        raise TypeError(
            "the backbone's output is a DTensor: give backbone=, a module after which the hidden "
            "states are whole on every rank"
        )
    return hidden
