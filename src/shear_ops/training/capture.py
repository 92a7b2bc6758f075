"""HiddenCapture: the hidden states of a policy's own forward passes, without extra memory."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from ..ops.batch import check_states, mask_as_bool

ALIGNMENTS = ("token", "predictor")

PART = 4096  # rows
LEAST_NOISE = 3e-4  # of a norm: less is taken for rounding, whatever the dtype

Result = TypeVar("Result")


class HiddenCapture:
    """Records hidden states, of the last layer or another one, with a forward hook on a model.

    The backbone is found below DDP, FSDP, DeepSpeed, torch.compile and PEFT, as transformers'
    ``base_model``, or below that where it has the LM head in it; where a model calls only the
    decoder in it, as OPT does, that is recorded. Its output is the input of the head, also where a
    trainer fuses the head with the log-probabilities, so logits are neither needed nor kept, and
    refused by their width. Passes of a PEFT model with its adapters disabled, or with the adapter
    "ref" active, are the reference's and not recorded; the adapter that is active when the capture
    is made is the policy's, whatever its name.

    For the states of several layers make one for each, and record with all of them at once.

    Make it once, before the first forward: torch.compile does not see hooks that come later.
    Outside recording() the hook does nothing.

    Dropout, or noise of any other kind, makes states of equal tokens differ. It is noticed by the
    random numbers that a forward draws from torch's default generators: record() takes the states
    from one more forward, in evaluation mode, and recording() warns. Noise that is there as well,
    or that is drawn elsewhere (by numpy, or a generator of the model's own), shows only where the
    same forward is made twice. record() does that in its first call, and raises where the states
    differ; recording() and whole() cannot.

    Args:
        model: the policy, wrapped or not.
        backbone: module whose output (or its ``last_hidden_state``, or its first element) is
            (B, S, d), for models that are not from transformers.
        align: ``"token"``: the state at a token, after reading it (the paper's); ``"predictor"``:
            the state one position earlier, which predicted it.
        layer: index into what transformers calls ``hidden_states``: 0 the embeddings, as they enter
            the first layer; l the output of the l-th layer; -1 the states that enter the LM head,
            after the final norm (the paper's).

    Raises:
        TypeError, ValueError: naming the argument, the value seen and the value wanted.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        backbone: nn.Module | None = None,
        align: str = "token",
        layer: int = -1,
    ) -> None:
        """Find the backbone and hook it."""
        if isinstance(layer, bool) or not isinstance(layer, int):
            raise TypeError(f"layer must be an int, got {layer!r}")
        if align not in ALIGNMENTS:
            raise ValueError(f"align must be one of {', '.join(ALIGNMENTS)}, got {align!r}")
        if not isinstance(backbone, (nn.Module, type(None))):
            raise TypeError(f"backbone must be a torch.nn.Module, got {type(backbone).__name__}")
        self.backbone = _below_head(find_backbone(model) if backbone is None else backbone)
        self._shift = ALIGNMENTS.index(align)
        self._recording: Recording | None = None
        self._whole: list[Tensor] | None = None
        self._warned = False
        self._policy = self._active_adapters
        self._compared = False
        self._in_backbone = False
        decoder = _decoder_in(self.backbone, model)
        if layer != -1:
            layers = _layers_of(self.backbone if decoder is None else decoder, model)
            count = len(layers)
            if not -count - 1 <= layer <= count:
                raise ValueError(
                    f"layer must be in [{-count - 1}, {count}] for {count} layers, got {layer}"
                )
            place = layer % (count + 1)
            if place < count:
                self._width = _of_config(self.backbone, model, "hidden_size")
                self._handles = [
                    layers[place - 1].register_forward_hook(self._hook)
                    if place
                    else layers[0].register_forward_pre_hook(self._input_hook, with_kwargs=True)
                ]
                return
        # OPT projects back to the former
        self._width = _of_config(self.backbone, model, "word_embed_proj_dim", "hidden_size")
        self._handles = [self.backbone.register_forward_hook(self._hook)]
        if decoder is not None:  # called past the backbone by some models, as by OPT's
            self._handles += [
                self.backbone.register_forward_pre_hook(self._enter),
                decoder.register_forward_hook(self._decoder_hook),
            ]

    def remove(self) -> None:
        """Remove the hooks from the model."""
        for handle in self._handles:
            handle.remove()

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

        The first call of record() costs one forward more, without gradients, in the mode that the
        states are from: both must give the same. So does each one in which evaluation mode draws
        random numbers as well.

        Args:
            mask: as in recording(). forward: the forwards of its rows; may be called three times.

        Returns:
            What the first call returned, and the states.

        Raises:
            RuntimeError: as recording(); and where states of the same rows differ, relative to
                their norm and as a mean over the tokens of mask, by more than kernels of a forward
                with and without gradients do: 3e-4 in float32, 8e-3 in float16, 0.06 in bfloat16 or
                under autocast to it. Smaller noise, and noise that begins later or where the first
                mask is all 0, is not seen.
        """
        with self._recorded(mask) as recording:
            result = forward()
        drew = recording.drew
        if drew:
            self._warn(
                "hidden states are taken from one more forward, in evaluation mode. Without them "
                "there is none"
            )
            recording = self._again(mask, forward, evaluating(self.backbone))
        # as often on all ranks, whatever their rollouts: under FSDP a forward is collective
        if recording.drew or not self._compared:
            mode = evaluating(self.backbone) if drew else nullcontext()
            again = self._again(mask, forward, mode)
            self._check_equal(recording.hidden, again, " in evaluation mode" if drew else "")
            self._compared = True
        return result, recording

    def _again(
        self, mask: Tensor, forward: Callable[[], Any], mode: AbstractContextManager[None]
    ) -> Recording:
        with torch.no_grad(), mode, self._recorded(mask) as recording:
            forward()
        return recording

    def _check_equal(self, hidden: Tensor, again: Recording, where: str) -> None:
        """Raise if the states of two forwards of the same rows differ by more than rounding."""
        # in parts: a whole generation batch in float32 would be twice its size
        differences = torch.cat([
            _difference(hidden[first : first + PART], again.hidden[first : first + PART])
            for first in range(0, max(len(hidden), 1), PART)
        ])  # fmt: skip
        weights = {p.dtype for p in self.backbone.parameters() if p.is_floating_point()}
        eps = max([again.eps, *(torch.finfo(dtype).eps for dtype in weights)])
        mean = differences.nanmean().item()  # states that are NaN have an error of their own
        if mean > max(LEAST_NOISE, 8 * eps):
            most = differences.nan_to_num(0.0).max().item()
            names, _ = _noise(self.backbone)
            raise RuntimeError(
                f"two forwards of the same rows{where} gave states that differ by {mean:.2g} of "
                f"their norm (mean over tokens; at most {most:.2g}): noise "
                "that record() cannot take out, and token weights would be noise as well"
                f"{names}. Turn it off; or draw it from torch's default generators, and only where "
                "module.training is true, as dropout(x, p, training=self.training) does"
            )

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
        self._in_backbone = False  # a forward that raised has not left it
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
        names, advice = _noise(self.backbone)
        warnings.warn(
            f"the policy's forwards draw random numbers{names}: {consequence}. {advice}",
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
    def _enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._in_backbone = True

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _decoder_hook(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not self._in_backbone:  # which hands it on
            self._hook(module, args, output)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _input_hook(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._hook(module, args, args[0] if args else kwargs["hidden_states"])

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _hook(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._in_backbone = False
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
        eps: unit of rounding of the states, and of autocast around the backbone.
    """

    def __init__(self, mask: Tensor, shift: int) -> None:
        """Expect the rows of mask, with states shifted to the left."""
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            seen = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(f"mask must be a (B, C) tensor, got {seen}")
        self.hidden = torch.empty(0, 1, dtype=torch.float32, device="cpu")
        self.drew = False
        self.eps = 0.0
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
        dtypes = [hidden.dtype]
        if torch.is_autocast_enabled(hidden.device.type):
            dtypes.append(torch.get_autocast_dtype(hidden.device.type))
        self.eps = max(self.eps, *(torch.finfo(dtype).eps for dtype in dtypes))
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
                f"{self._mask.shape[0]} (reference passes do not count; where the model calls "
                "neither its base_model nor the decoder in it, give backbone=, the module whose "
                "output is the last hidden state)"
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


def _decoder_in(backbone: nn.Module, model: object) -> nn.Module | None:
    """The decoder of a model from transformers, if that is a part of its backbone."""
    for owner in (backbone, *(_unwrapped(model)[-1:] if isinstance(model, nn.Module) else ())):
        if hasattr(owner, "get_decoder"):
            found: Any = owner.get_decoder()
            if found is not backbone and _has(backbone, found):
                return cast(nn.Module, found)
    return None


def _has(module: nn.Module, part: object) -> bool:
    return any(own is part for own in module.modules())


def _of_config(backbone: nn.Module, model: object, *names: str) -> int | None:
    """The first of some integers that a configuration like those of transformers has."""
    owners = [backbone, *(_unwrapped(model)[::-1] if isinstance(model, nn.Module) else ())]
    for owner in owners:
        config: Any = getattr(owner, "config", None)
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        for name in names:
            if isinstance(value := getattr(text, name, None), int):
                return value
    return None


def _layers_of(decoder: nn.Module, model: object) -> nn.ModuleList:
    """The layers of a decoder: its first list of as many modules as its configuration says.

    Raises:
        ValueError: if there is none.
    """
    count = _of_config(decoder, model, "num_hidden_layers")
    for module in decoder.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise ValueError(
        f"layer must be -1 for {type(decoder).__name__}, in which no list of num_hidden_layers = "
        f"{count} layers was found: give backbone=, the layer whose output is wanted"
    )


def _generators() -> list[Tensor]:
    """States of torch's generators of random numbers, on the devices in use."""
    used = (module for module in (torch.cuda, torch.xpu) if module.is_initialized())
    return [torch.get_rng_state(), *(module.get_rng_state() for module in used)]


def _difference(a: Tensor, b: Tensor) -> Tensor:
    """Of two (n, d), row by row and relative to the norm."""
    difference, a, b = a.float() - b.float(), a.float(), b.float()
    norms = torch.maximum(torch.linalg.vector_norm(a, dim=1), torch.linalg.vector_norm(b, dim=1))
    relative: Tensor = torch.linalg.vector_norm(difference, dim=1) / norms.clamp_min(1e-30)
    return relative


def _noise(model: nn.Module) -> tuple[str, str]:
    """What says dropout, jitter or noise in a model and is not 0, and how to set it to 0.

    Of its modules, their attributes, their configurations: one name may have several values.
    """
    fields: dict[str, float] = {}
    others: dict[str, float] = {}

    def note(found: dict[str, float], named: dict[str, Any]) -> None:
        for name, value in named.items():
            if re.search("drop|jitter|noise", name) and isinstance(value, float) and value > 0:
                found[name] = value

    for path, module in model.named_modules():
        # from_pretrained reaches the model's own fields, not those of configurations in that
        own_config = getattr(getattr(module, "config", None), "__dict__", {})
        note(fields if module is model else others, own_config)
        note(others, vars(module))
        if isinstance(module, nn.modules.dropout._DropoutNd):
            own = [name for name in path.split(".") if "drop" in name]
            note(others, {own[-1] if own else "dropout": module.p})
    listed = ", ".join(f"{name} = {value:g}" for name, value in (others | fields).items())
    if not listed:
        return "", (
            "No module or configuration has a dropout, jitter or noise above 0: it is drawn in the "
            "code of the model, or is without effect"
        )
    calls = []
    if fields:
        calls.append(f"from_pretrained(..., {', '.join(f'{name}=0.0' for name in fields)})")
    if "lora_dropout" in others:
        calls.append("LoraConfig(lora_dropout=0.0)")
    example = f", for example {' and '.join(calls)}" if calls else ""
    return f" ({listed})", f"Set them to 0 where the model is made{example}"


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
