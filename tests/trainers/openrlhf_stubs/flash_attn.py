"""Stands for flash-attn's functions that remove and restore padding."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import cuda_calls  # noqa: F401
import einops
import torch
from torch import Tensor


def _unpad_input(hidden: Tensor, mask: Tensor) -> Any:
    lengths = mask.sum(1, dtype=torch.int32)
    indices = mask.flatten().nonzero().flatten()
    offsets = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    return hidden.flatten(0, 1)[indices], indices, offsets, int(lengths.max()), lengths


def _pad_input(hidden: Tensor, indices: Tensor, batch: int, length: int) -> Tensor:
    padded = hidden.new_zeros(batch * length, *hidden.shape[1:])
    return padded.index_copy(0, indices, hidden).unflatten(0, (batch, length))


for name, values in {
    "bert_padding": {
        "index_first_axis": lambda rows, indices: rows[indices],
        "pad_input": _pad_input,
        "rearrange": einops.rearrange,
        "unpad_input": _unpad_input,
    },
    "utils": {},
    "utils.distributed": {"all_gather": None},
}.items():
    made = sys.modules[f"flash_attn.{name}"] = ModuleType(f"flash_attn.{name}")
    made.__dict__.update(values)
