"""One small mixed group with ragged rollouts, for tests in which the numbers do not matter."""

from __future__ import annotations

import torch

LENGTHS = (37, 0, 5, 64, 20)
CONFIG = {"span": 16, "stride": 5}


def arguments(dtype: torch.dtype = torch.float32, dim: int = 12) -> dict[str, torch.Tensor]:
    """Packed arguments of span_weights: four rollouts of group 7, one of group 9."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(sum(LENGTHS), dim, generator=generator).to(dtype)
    return {
        "hidden": hidden,
        "cu_seqlens": torch.tensor([0, *LENGTHS]).cumsum(0),
        "group_ids": torch.tensor([7, 7, 7, 7, 9]),
        "labels": torch.tensor([1, 0, 0, 1, 0]),
    }


def padded(packed: dict[str, torch.Tensor], holes: bool) -> dict[str, torch.Tensor]:
    """The same rollouts as (B, T, d) and mask, NaN where masked; with holes, valid tokens spread."""
    lengths = packed["cu_seqlens"].diff().tolist()
    width = max(lengths) + 9
    generator = torch.Generator().manual_seed(2)
    mask = torch.zeros(len(lengths), width, dtype=torch.bool)
    for i, length in enumerate(lengths):
        where = (
            torch.randperm(width, generator=generator)[:length] if holes else torch.arange(length)
        )
        mask[i, where] = True
    hidden = packed["hidden"].new_full((*mask.shape, packed["hidden"].shape[1]), torch.nan)
    hidden[mask] = packed["hidden"]
    rest = {k: packed[k] for k in ("group_ids", "labels")}
    return {"hidden": hidden, "mask": mask, **rest}
