"""The rollouts of a call: tensor arguments checked, padded rollouts packed, and back.

Every check of a tensor argument is here, once: shapes, dtypes and devices in Batch.of, values
(offsets, labels) in Batch.check_values, which asks csrc/problem.cpp. The operators make the checks
of values themselves, for every caller alike; NaN and Inf are found where states are read.
Errors name the argument, the value seen and the value wanted.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _C

Integers = Tensor | Sequence[int]

# What torch.ops.shear reads; other integers are converted.
OP_INTEGER_DTYPES = (torch.int64, torch.int32, torch.int8, torch.bool)
INTEGER_DTYPES = (
    *OP_INTEGER_DTYPES, torch.uint8, torch.int16, torch.uint16, torch.uint32, torch.uint64
)  # fmt: skip
STATE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


# The place in the text of csrc/problem.cpp, not_finite().
_PLACE = re.compile(r"token (\d+) of rollout (\d+) \(group (-?\d+)\), hidden\[\d+\]")


class Row(NamedTuple):
    """What is known of a rollout without its states."""

    group: int
    label: int
    tokens: int


class Batch(NamedTuple):
    """B rollouts one after the other, N tokens in all; the integers are on the CPU.

    Attributes:
        hidden: (N, d). cu_seqlens: (B + 1,). group_ids, labels: (B,).
        mask: (B, T) bool of rollouts that were given padded, else None.
    """

    hidden: Tensor
    cu_seqlens: Tensor
    group_ids: Tensor
    labels: Tensor
    mask: Tensor | None

    @classmethod
    def of(
        cls,
        hidden: Tensor,
        *,
        cu_seqlens: Integers | None,
        mask: Tensor | None,
        group_ids: Integers,
        labels: Integers,
    ) -> Batch:
        """Check layouts, dtypes and devices, and pack: tokens where mask is set, row by row.

        Args:
            hidden: (N, d) with cu_seqlens, or (B, T, d) with mask.
            cu_seqlens: (B + 1,) int32 or int64 offsets of the rollouts, from 0 to N.
            mask: (B, T) bool or 0/1; 1 where a token is valid. It may have holes.
            group_ids, labels: (B,) integers.

        Raises:
            TypeError, ValueError: naming the argument, the value seen and the value wanted.
            RuntimeError: for what would have to be copied while a graph is captured.
        """
        packed, offsets, valid = _pack(hidden, cu_seqlens, mask)
        batch = offsets.shape[0] - 1
        return cls(
            hidden=packed,
            cu_seqlens=offsets,
            group_ids=as_integers("group_ids", group_ids, batch),
            labels=as_integers("labels", labels, batch),
            mask=valid,
        )

    def check_values(self) -> Batch:
        """Return self, or raise ValueError for offsets or labels that no operator takes.

        For those who read the values themselves. Operators check what they are given.
        """
        _C.check_batch(
            self.cu_seqlens.tolist(),
            self.group_ids.tolist(),
            self.labels.tolist(),
            tokens=self.hidden.shape[0],
        )
        return self

    def check_finite(self) -> None:
        """Raise ValueError if a state is NaN or Inf, in the words of the operators."""
        bad = ~self.hidden.isfinite().all(1)
        if bool(bad.any()):
            token = int(bad.nonzero()[0])
            raise ValueError(
                _C.not_finite(token, self.cu_seqlens.tolist(), self.group_ids.tolist())
            )

    @contextmanager
    def in_callers_words(self) -> Iterator[None]:
        """Where an operator's error names a token of padded rollouts, name its row and column."""
        try:
            yield
        except ValueError as error:
            found = _PLACE.search(str(error))
            if self.mask is None or found is None:
                raise
            token, row, group = (int(number) for number in found.groups())
            column = int(self.mask[row].nonzero()[token])  # the mask may have holes
            place = f"token {column} of rollout {row} (group {group}), hidden[{row}, {column}]"
            raise ValueError(_PLACE.sub(place, str(error))) from None

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the tensor arguments of torch.ops.shear and of the reference, in their order."""
        return self.hidden, self.cu_seqlens, self.group_ids, self.labels

    def rows(self) -> list[Row]:
        """Return a row for every rollout; for checked values."""
        columns = (self.group_ids, self.labels, self.cu_seqlens.diff())
        return [Row(*row) for row in zip(*(c.long().tolist() for c in columns), strict=True)]

    def restore(self, weights: Tensor) -> Tensor:
        """Bring weights (N,) to the layout of the input: (N,), or (B, T) with 1 where masked."""
        if self.mask is None:
            return weights
        out = weights.new_ones(self.mask.shape)
        out[self.mask] = weights
        return out


def _pack(
    hidden: Tensor, cu_seqlens: Integers | None, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return hidden (N, d), offsets (B + 1,), and the mask as bools if there is one."""
    check_states("hidden", hidden, (2, 3))
    if hidden.dim() == 2:
        if cu_seqlens is None or mask is not None:
            raise ValueError("hidden (N, d) is packed: give cu_seqlens and no mask")
        offsets = as_integers("cu_seqlens", cu_seqlens)
        if offsets.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"cu_seqlens must be int32 or int64, got {offsets.dtype}")
        if offsets.shape[0] == 0:
            raise ValueError("cu_seqlens must have at least one entry (0), got none")
        return hidden, offsets, None
    if mask is None or cu_seqlens is not None:
        raise ValueError(
            "hidden (B, T, d) is padded: give mask (B, T) and no cu_seqlens; "
            "without padding that is mask=torch.ones(B, T, dtype=torch.bool)"
        )
    if capturing(hidden):
        raise RuntimeError(
            "hidden must be packed (N, d), with cu_seqlens, while a graph is captured: "
            f"got shape {tuple(hidden.shape)}"
        )
    valid = check_mask(mask, hidden)
    lengths = valid.sum(1).cpu()
    offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    return hidden[valid], offsets, valid


def check_states(name: str, states: object, dims: tuple[int, ...]) -> Tensor:
    """Raise unless states is a float tensor whose dimension count is in dims and whose d >= 1."""
    if not isinstance(states, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(states).__name__}")
    if states.dtype not in STATE_DTYPES:
        raise TypeError(f"{name} must be float32, float16 or bfloat16, got {states.dtype}")
    check_dense(name, states)
    _check_has_data(name, states)
    if states.dim() not in dims:
        wanted = " or ".join(f"{d}-d" for d in dims)
        raise ValueError(f"{name} must be {wanted}, got shape {tuple(states.shape)}")
    # compiled, a size may be data: the operators check it again
    if not torch.compiler.is_compiling() and states.shape[-1] < 1:
        raise ValueError(f"{name} must have at least one dimension, got {tuple(states.shape)}")
    return states


def check_dense(name: str, tensor: Tensor) -> None:
    """Raise TypeError unless a tensor is strided."""
    if tensor.is_nested or tensor.layout != torch.strided:
        seen = "a nested one" if tensor.is_nested else tensor.layout
        raise TypeError(f"{name} must be a dense (strided) tensor, got {seen}")


def _check_has_data(name: str, tensor: Tensor) -> None:
    if tensor.device.type == "meta":
        raise ValueError(f"{name} is on meta, which has no data: give a tensor on a CPU or GPU")


def check_op_states(name: str, states: Tensor) -> None:
    """Raise unless states is a tensor of states as torch.ops.shear takes it, on any device."""
    if states.dim() != 2 or states.shape[1] < 1:
        raise ValueError(f"{name} must be a (tokens, dim) tensor with dim >= 1")
    if states.dtype not in STATE_DTYPES:
        raise ValueError(f"{name} must be float32, float16 or bfloat16, got {states.dtype}")


def check_op_pair(x: Tensor, y: Tensor) -> None:
    """Raise unless x and y are two rollouts as torch.ops.shear takes them."""
    check_op_states("x", x)
    check_op_states("y", y)
    if x.dtype != y.dtype or x.shape[1] != y.shape[1] or x.device != y.device:
        raise ValueError("x and y must have one dtype and dim, and be on one device")


def check_op_cost(cost: Tensor) -> None:
    """Raise unless cost is a batch of problems as torch.ops.shear takes it."""
    if cost.dim() != 3 or cost.dtype != torch.float32:
        raise ValueError("cost must be a (B, n, m) float32 tensor")


def check_op_integers(name: str, integers: Tensor, like: Tensor) -> None:
    """Raise unless integers are as torch.ops.shear takes them: on the CPU, or like's device."""
    if integers.dim() != 1:
        raise ValueError(f"{name} must be a 1-d tensor")
    if integers.dtype not in OP_INTEGER_DTYPES:
        raise ValueError(f"{name} must be int64, int32, int8 or bool, got {integers.dtype}")
    if integers.device.type not in ("cpu", like.device.type):
        wanted = "" if like.device.type == "cpu" else f" or on {like.device}"
        raise ValueError(f"{name} must be on the CPU{wanted}, got {integers.device}")


def as_integers(name: str, values: Integers, size: int | None = None) -> Tensor:
    """Return a 1-d integer tensor on the CPU, given as a tensor or a sequence, or raise."""
    if isinstance(values, Tensor):
        tensor = values
    else:
        try:
            tensor = torch.as_tensor(values, device="cpu")  # whatever the default device is
        except (TypeError, ValueError, RuntimeError) as error:  # by what is in it
            hint = "; group_ids_from_uids makes them of strings" if name == "group_ids" else ""
            raise TypeError(f"{name} must be int64 integers, got {_short(values)}{hint}") from error
        if tensor.numel() == 0:
            tensor = tensor.long()
    if tensor.dtype not in INTEGER_DTYPES:
        hint = "; labels_from_rewards makes labels of rewards" if name == "labels" else ""
        raise TypeError(f"{name} must be integer or bool, got {tensor.dtype}{hint}")
    check_dense(name, tensor)
    _check_has_data(name, tensor)
    if tensor.dim() != 1:
        raise ValueError(f"{name} must be 1-d, got shape {tuple(tensor.shape)}")
    if size is not None and tensor.shape[0] != size:
        raise ValueError(f"{name} must have {size} entries, got {tensor.shape[0]}")
    if tensor.dtype not in OP_INTEGER_DTYPES:
        wide, tensor = tensor, tensor.long()
        if wide.dtype is torch.uint64 and not torch.compiler.is_compiling() and (tensor < 0).any():
            raise ValueError(f"{name} must be below 2^63, got {max(wide.tolist())}")
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
        and torch.backends.cuda.is_built()  # type: ignore[no-untyped-call]  # a fake tensor needs no CUDA
        and not torch.compiler.is_compiling()
        and torch.cuda.is_current_stream_capturing()
    )


def check_mask(mask: object, hidden: Tensor) -> Tensor:
    """Return mask as a bool tensor of shape (B, T) on hidden's device."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a torch.Tensor, got {type(mask).__name__}")
    check_dense("mask", mask)
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
    if mask.dtype not in INTEGER_DTYPES:
        raise TypeError(f"mask must be bool or integer, got {mask.dtype}")
    if mask.dtype is torch.bool:
        return mask
    if not torch.compiler.is_compiling() and not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError("mask must be 0 or 1 everywhere, got other values")
    return mask != 0
