"""SHEAR over the training step around it: one layer of a transformer, times the layers."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import shear_ops

from .contest import Entry
from .problems import CONFIG, synthetic_group
from .sizes import Layer, Sizes
from .timing import alternate, ratio, summary

DISTINCT = 4  # groups of states that are made; a step's groups repeat them


class Block(nn.Module):
    """Pre-norm layer with grouped-query attention and a gated feed-forward net, causal."""

    def __init__(self, shape: Layer) -> None:
        """Make the weights."""
        super().__init__()
        self.shape = shape
        self.head = shape.dim // shape.heads
        wide = (shape.heads + 2 * shape.kv_heads) * self.head
        self.norm_in, self.norm_mid = nn.RMSNorm(shape.dim), nn.RMSNorm(shape.dim)
        self.qkv = nn.Linear(shape.dim, wide)
        self.out = nn.Linear(shape.dim, shape.dim, bias=False)
        self.gate_up = nn.Linear(shape.dim, 2 * shape.inner, bias=False)
        self.down = nn.Linear(shape.inner, shape.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """States (B, T, d) to states."""
        counts = [self.shape.heads, self.shape.kv_heads, self.shape.kv_heads]
        heads = self.qkv(self.norm_in(x)).unflatten(-1, (-1, self.head)).transpose(1, 2)
        q, k, v = heads.split(counts, 1)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        gate, up = self.gate_up(self.norm_mid(x)).chunk(2, -1)
        result: Tensor = x + self.down(F.silu(gate) * up)
        return result


def overhead(sizes: Sizes) -> Entry:
    """SHEAR of a step's groups over forward and backward of all layers for these groups.

    One layer is measured on one group and multiplied with layers and groups: no embedding, LM head,
    optimizer, sampling or communication, all of which would make the share smaller.
    """
    shape = sizes.layer
    block = Block(shape).to(torch.bfloat16)
    states = torch.randn(8, sizes.tokens, shape.dim).bfloat16().requires_grad_()
    gradient = torch.randn_like(states)

    def layer() -> None:
        block(states).backward(gradient)
        block.zero_grad()
        states.grad = None

    shear = partial(shear_ops.span_weights, **_step(sizes), config=CONFIG, backend=sizes.backend)
    layer()
    shear()  # compiles
    samples = alternate({"one layer, one group": layer, "shear_ops": shear}, 5, sizes.limit_s)
    step = [seconds * sizes.layers * sizes.groups for seconds in samples["one layer, one group"]]
    return {
        "sizes": {
            "groups": sizes.groups, "rollouts": 8, "tokens": sizes.tokens, "layers": sizes.layers,
            **vars(shape),
        },
        "times": {name: summary(seconds) for name, seconds in samples.items()},
        "step_s": summary(step),
        "share": ratio(samples["shear_ops"], step),
    }  # fmt: skip


def _step(sizes: Sizes) -> dict[str, Any]:
    """Arguments of one call for all groups of a step, clustered states in bfloat16."""
    made = [
        synthetic_group("clustered", sizes.tokens, sizes.layer.dim, seed=seed)
        for seed in range(min(DISTINCT, sizes.groups))
    ]
    chosen = [made[g % len(made)].to(torch.bfloat16).arguments() for g in range(sizes.groups)]
    lengths = torch.full((8 * sizes.groups,), sizes.tokens)
    return {
        "hidden": torch.cat([group["hidden"] for group in chosen]),
        "cu_seqlens": F.pad(lengths.cumsum(0), (1, 0)).cpu(),
        "group_ids": torch.arange(sizes.groups, device="cpu").repeat_interleave(8),
        "labels": torch.cat([group["labels"].cpu() for group in chosen]),
    }
