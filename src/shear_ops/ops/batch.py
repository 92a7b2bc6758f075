"""Padded rollouts to the packed layout and back: the only code that knows both."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .checks import as_integers, capturing, check_mask, check_states


class Packed(NamedTuple):
    """Rollouts one after the other: hidden (N, d), cu_seqlens (B + 1); mask (B, T) if padded."""

    hidden: Tensor
    cu_seqlens: Tensor
    mask: Tensor | None

    def restore(self, values: Tensor, fill: float) -> Tensor:
        """Bring values (N,) to the layout of the input: (N,), or (B, T) with fill where masked."""
        if self.mask is None:
            return values
        out = values.new_full(self.mask.shape, fill)
        out[self.mask] = values
        return out


def pack(hidden: Tensor, cu_seqlens: Tensor | None, mask: Tensor | None) -> Packed:
    """Check the layout of hidden and pack it: tokens where mask is set, rollout by rollout.

    Args:
        hidden: (N, d) with cu_seqlens, or (B, T, d) with mask.
        cu_seqlens: (B + 1,) int32 or int64 offsets of the rollouts, from 0 to N.
        mask: (B, T) bool or 0/1; 1 where a token is valid. It may have holes.
    """
    check_states("hidden", hidden, (2, 3))
    if hidden.dim() == 2:
        if cu_seqlens is None or mask is not None:
            raise ValueError("hidden (N, d) is packed: give cu_seqlens and no mask")
        offsets = as_integers("cu_seqlens", cu_seqlens)
        if offsets.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"cu_seqlens must be int32 or int64, got {offsets.dtype}")
        if offsets.shape[0] == 0:
            raise ValueError("cu_seqlens must have at least one entry (0), got none")
        return Packed(hidden, offsets, None)
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
    return Packed(hidden[valid], offsets, valid)
