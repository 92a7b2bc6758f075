"""Typed errors of the public functions: the argument, the value seen, the value wanted.

Shapes, dtypes and devices are checked here; values (offsets, labels, NaN) where they are read,
in csrc/problem.cpp and the backends, for every caller alike.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# What torch.ops.shear reads; other integers are converted.
OP_INTEGER_DTYPES = (torch.int64, torch.int32, torch.int8, torch.bool)
STATE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def check_states(name: str, states: object, dims: tuple[int, ...]) -> Tensor:
    """Raise unless states is a float tensor whose dimension count is in dims and whose d >= 1."""
    if not isinstance(states, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(states).__name__}")
    if states.dtype not in STATE_DTYPES:
        raise TypeError(f"{name} must be float32, float16 or bfloat16, got {states.dtype}")
    if states.layout != torch.strided:
        raise TypeError(f"{name} must be a dense (strided) tensor, got {states.layout}")
    if states.dim() not in dims:
        wanted = " or ".join(f"{d}-d" for d in dims)
        raise ValueError(f"{name} must be {wanted}, got shape {tuple(states.shape)}")
    if states.shape[-1] < 1:
        raise ValueError(f"{name} must have at least one dimension, got {tuple(states.shape)}")
    return states


def as_integers(name: str, values: Tensor | Sequence[int], size: int | None = None) -> Tensor:
    """Return a 1-d integer tensor on the CPU, given as a tensor or a sequence, or raise."""
    if isinstance(values, Tensor):
        tensor = values
    else:
        try:
            tensor = torch.as_tensor(values)
        except (TypeError, ValueError, RuntimeError) as error:  # by what is in it
            hint = "; group_ids_from_uids makes them of strings" if name == "group_ids" else ""
            raise TypeError(f"{name} must be int64 integers, got {_short(values)}{hint}") from error
        if tensor.numel() == 0:
            tensor = tensor.long()
    if tensor.is_floating_point() or tensor.is_complex():
        hint = "; labels_from_rewards makes labels of rewards" if name == "labels" else ""
        raise TypeError(f"{name} must be integer or bool, got {tensor.dtype}{hint}")
    if tensor.dim() != 1:
        raise ValueError(f"{name} must be 1-d, got shape {tuple(tensor.shape)}")
    if size is not None and tensor.shape[0] != size:
        raise ValueError(f"{name} must have {size} entries, got {tensor.shape[0]}")
    if tensor.dtype not in OP_INTEGER_DTYPES:
        tensor = tensor.long()
    if capturing(tensor):
        raise RuntimeError(
            f"{name} must be on the CPU while a graph is captured, got {tensor.device}"
        )
    return tensor.cpu()


def _short(values: object) -> str:
    text = repr(values)
    return text if len(text) <= 60 else f"{text[:60]}..."


def capturing(tensor: Tensor) -> bool:
    """Return whether the current stream is being captured in a graph, where nothing may wait."""
    return (
        tensor.is_cuda
        and not torch.compiler.is_compiling()
        and torch.cuda.is_current_stream_capturing()
    )


def check_mask(mask: object, hidden: Tensor) -> Tensor:
    """Return mask as a bool tensor of shape (B, T) on hidden's device."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a torch.Tensor, got {type(mask).__name__}")
    if mask.shape != hidden.shape[:2]:
        raise ValueError(
            f"mask must have hidden's first two dimensions {tuple(hidden.shape[:2])}, "
            f"got {tuple(mask.shape)}"
        )
    if mask.device != hidden.device:
        raise ValueError(f"mask must be on hidden's device {hidden.device}, got {mask.device}")
    return mask_as_bool(mask)


def mask_as_bool(mask: Tensor) -> Tensor:
    """Return a mask of bools or of 0 and 1 as bools, or raise."""
    if mask.dtype.is_floating_point or mask.dtype.is_complex:
        raise TypeError(f"mask must be bool or integer, got {mask.dtype}")
    if mask.dtype is torch.bool:
        return mask
    if not torch.compiler.is_compiling() and not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError("mask must be 0 or 1 everywhere, got other values")
    return mask != 0
