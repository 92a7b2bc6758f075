"""HiddenCapture: the hidden states of a policy's own forward passes, without extra memory."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from ..ops.batch import check_states, mask_as_bool

ALIGNMENTS = ("token", "predictor")

Result = TypeVar("Result")


class HiddenCapture:
    """Records last-layer hidden states with a forward hook on a model's backbone.

    The backbone is found below DDP, FSDP, DeepSpeed, torch.compile and PEFT, as transformers'
    ``base_model``, or below that where it has the LM head in it. Its output is the input of the
    head, also where a trainer fuses the head with the log-probabilities, so logits are neither
    needed nor kept, and refused by their width. Passes of a PEFT model with its
    adapters disabled, or with the adapter "ref" active, are the reference's and not recorded; the
    adapter that is active when the capture is made is the policy's, whatever its name.

    Make it once, before the first forward: torch.compile does not see hooks that come later.
    Outside recording() the hook does nothing.

    Dropout of any kind makes states of equal tokens differ. It is noticed by the random numbers
    that a forward draws: record() takes the states from one more forward, in evaluation mode, and
    recording() warns.

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
        self.backbone = _below_head(find_backbone(model) if backbone is None else backbone)
        self._width = _width_of_states(self.backbone, model)
        self._shift = ALIGNMENTS.index(align)
        self._recording: Recording | None = None
        self._whole: list[Tensor] | None = None
        self._warned = False
        self._policy = self._active_adapters
        self._handle = self.backbone.register_forward_hook(self._hook)

    def remove(self) -> None:
        """Remove the hook from the model."""
        self._handle.remove()

    @property
    def reference_pass(self) -> bool:
        """Whether a forward now would be the reference's (PEFT adapters off, or "ref" active)."""
        active = self._active_adapters
        return active is not None and (not active or "ref" in set(active) - set(self._policy or ()))

    @property
    def _active_adapters(self) -> list[str] | None:
        """Of PEFT, none where they are disabled; None without PEFT."""
        peft = sys.modules.get("peft.tuners.tuners_utils")
        if peft is None:
            return None
        # by class: transformers' PreTrainedModel has methods of the same names
        for module in self.backbone.modules():
            if isinstance(module, peft.BaseTunerLayer):
                return [] if module.disable_adapters else list(module.active_adapters)
        return None

    def record(self, mask: Tensor, forward: Callable[[], Result]) -> tuple[Result, Recording]:
        """Record forward(). Where that draws random numbers, as dropout does, it is called again.

        The second time without gradients and with the backbone in evaluation mode, for the states.

        Args:
            mask: as in recording(). forward: the forwards of its rows; may be called twice.

        Returns:
            What the first call returned, and the states.

        Raises:
            RuntimeError: as recording().
        """
        with self._recorded(mask) as recording:
            result = forward()
        if recording.drew:
            self._warn(
                "hidden states are taken from one more forward, in evaluation mode. Without "
                "dropout there is none"
            )
            with torch.no_grad(), evaluating(self.backbone), self._recorded(mask) as recording:
                forward()
        return result, recording

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
        with self._recorded(mask) as recording:
            yield recording
        if recording.drew:
            self._warn(
                "hidden states of equal tokens differ. Record a forward in evaluation mode, or "
                "with HiddenCapture.record"
            )

    @contextmanager
    def _recorded(self, mask: Tensor) -> Iterator[Recording]:
        if self._recording is not None:
            raise RuntimeError("recording is already on")
        self._recording = recording = Recording(mask, self._shift)
        before = _generators()
        try:
            yield recording
        finally:
            self._recording = None
        recording.drew = not all(map(torch.equal, before, _generators()))
        recording.close()

    def _warn(self, consequence: str) -> None:
        """Say once what random numbers in a forward, as dropout draws them, mean."""
        if self._warned:
            return
        self._warned = True
        found = [f"{name} = {value:g}" for name, value in _dropouts(self.backbone).items()]
        where = f" (dropout: {', '.join(found)})" if found else ""
        warnings.warn(
            f"the policy's forwards draw random numbers{where}: {consequence}. Set dropout to 0 "
            "where the model is made, for example from_pretrained(..., attention_dropout=0.0) or "
            "LoraConfig(lora_dropout=0.0)",
            stacklevel=4,
        )

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
        if hidden.shape[-1] != (self._width or hidden.shape[-1]):
            raise ValueError(
                f"the backbone's output must be hidden states of {self._width} dimensions, as the "
                f"model's configuration says, got {tuple(hidden.shape)} from "
                f"{type(module).__name__}: give backbone=, the module whose output is the input of "
                "the LM head"
            )
        if self._recording is not None:
            self._recording.add(hidden)
        if self._whole is not None:
            self._whole.append(hidden.detach())


class Recording:
    """States of a block of forwards, in the packed layout.

    Attributes:
        hidden: (N, d), detached; the states where mask is set, row by row.
        cu_seqlens: (B + 1,) int64 on the CPU, offsets of the rows in hidden.
        drew: whether random numbers were drawn, as dropout does.
    """

    def __init__(self, mask: Tensor, shift: int) -> None:
        """Expect the rows of mask, with states shifted to the left."""
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            seen = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(f"mask must be a (B, C) tensor, got {seen}")
        self.hidden = torch.empty(0, 1, dtype=torch.float32, device="cpu")
        self.drew = False
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
                f"{self._mask.shape[0]} (reference passes do not count; where the model does not "
                "call its base_model, give backbone=)"
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
    *wrappers, inner = _unwrapped(model)
    for wrapper in wrappers:
        if getattr(getattr(wrapper, "active_peft_config", None), "is_prompt_learning", False):
            raise ValueError(
                "model must not be tuned by prompts or prefixes, got "
                f"{type(wrapper.active_peft_config).__name__}: its reference passes look like "
                "those of the policy; LoRA and other adapters work"
            )
    backbone = getattr(inner, "base_model", None)
    if not isinstance(backbone, nn.Module):
        raise ValueError(
            f"model must be a transformers model, wrapped or not, got {type(inner).__name__}: "
            "for others give backbone=, the module whose output is the last hidden state"
        )
    return backbone


def _unwrapped(model: nn.Module) -> list[nn.Module]:
    """The model and what it wraps, down to the innermost."""
    inner = _inner(model)
    return [model] if inner is None else [model, *_unwrapped(inner)]


def _inner(model: nn.Module) -> nn.Module | None:
    if hasattr(model, "get_base_model"):  # PEFT
        return cast(nn.Module, model.get_base_model())  # type: ignore[operator]
    for name in ("_orig_mod", "module"):  # torch.compile; DDP, DeepSpeed, FSDP1
        if isinstance(inner := getattr(model, name, None), nn.Module):
            return inner
    return None


def _below_head(module: nn.Module) -> nn.Module:
    """Module, or the part of it that has its embeddings but not its LM head.

    transformers' base_model is the whole language model where base_model_prefix names no part.

    Raises:
        ValueError: if the head is in module, and there is no such part.
    """
    model: Any = module
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    part = module
    while head is not None and _has(part, head):
        embeddings = model.get_input_embeddings()
        parts = [child for child in part.children() if _has(child, embeddings)]
        if len(parts) != 1 or parts[0] is embeddings:
            raise ValueError(
                f"model must have a module below its LM head, got {type(part).__name__}: give "
                "backbone=, the module whose output is the input of the LM head"
            )
        (part,) = parts
    return part


def _has(module: nn.Module, part: object) -> bool:
    return any(own is part for own in module.modules())


def _width_of_states(backbone: nn.Module, model: object) -> int | None:
    """Width of the last hidden states, if a configuration like those of transformers has it."""
    owners = [backbone, *(_unwrapped(model)[::-1] if isinstance(model, nn.Module) else ())]
    for owner in owners:
        config: Any = getattr(owner, "config", None)
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        for name in ("word_embed_proj_dim", "hidden_size"):  # OPT projects back to the former
            if isinstance(width := getattr(text, name, None), int):
                return width
    return None


def _generators() -> list[Tensor]:
    """States of torch's generators of random numbers, on the devices in use."""
    used = (module for module in (torch.cuda, torch.xpu) if module.is_initialized())
    return [torch.get_rng_state(), *(module.get_rng_state() for module in used)]


def _dropouts(model: nn.Module) -> dict[str, float]:
    """What says dropout in a model, and is not 0: its modules, their attributes, its config."""
    found: dict[str, Any] = dict(getattr(getattr(model, "config", None), "__dict__", {}))
    for path, module in model.named_modules():
        found |= vars(module)
        if isinstance(module, nn.modules.dropout._DropoutNd):
            own = [name for name in path.split(".") if "drop" in name]
            found[own[-1] if own else "dropout"] = module.p
    return {
        name: value
        for name, value in found.items()
        if "drop" in name and isinstance(value, float) and value > 0
    }


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
        raise TypeError(
            f"the backbone's output must be hidden states, got {type(hidden).__name__}: give "
            "backbone=, the module whose output is the input of the LM head"
        )
    if hasattr(hidden, "full_tensor"):
        raise TypeError(
            "the backbone's output is a DTensor: give backbone=, a module after which the hidden "
            "states are whole on every rank"
        )
    return hidden
