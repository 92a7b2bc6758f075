"""A small causal transformer: pre-norm, rotary positions, key/value cache, no dropout."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class ModelConfig:
    vocabulary: int
    width: int = 128
    layers: int = 4
    heads: int = 4
    context: int = 512


class Cache:
    """Keys and values of the tokens read so far, [B, heads, context, width/heads] per layer."""

    def __init__(self, config: ModelConfig, batch: int, device: torch.device) -> None:
        shape = (
            2,
            config.layers,
            batch,
            config.heads,
            config.context,
            config.width // config.heads,
        )
        self.keys, self.values = torch.zeros(shape, device=device)
        self.length = 0


class Block(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.width
        self.heads = config.heads
        self.norm_in = nn.RMSNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.norm_mid = nn.RMSNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor, rotary: Tensor, cache: Cache | None, layer: int) -> Tensor:
        qkv = self.qkv(self.norm_in(x)).unflatten(-1, (3, self.heads, -1))  # [B, T, 3, heads, c]
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        q, k = rotate(q, rotary), rotate(k, rotary)
        if cache is not None:
            end = cache.length + x.shape[1]
            cache.keys[layer, :, :, cache.length : end] = k
            cache.values[layer, :, :, cache.length : end] = v
            k, v = cache.keys[layer, :, :, :end], cache.values[layer, :, :, :end]
        # Several new tokens come only with an empty cache, one new token sees all of the cache.
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=x.shape[1] > 1)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm_mid(x))))


class Transformer(nn.Module):
    rotary: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocabulary, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width)
        self.lm_head = nn.Linear(config.width, config.vocabulary, bias=False)
        self.register_buffer("rotary", rotary_table(config), persistent=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                # Residual branches start small, so that depth does not inflate the states.
                branch = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(
                    parameter, std=0.02 / (2 * config.layers) ** 0.5 if branch else 0.02
                )

    def hidden(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        """Last-layer hidden states [B, T, width] after the final norm: the input of `lm_head`."""
        begin = 0 if cache is None else cache.length
        rotary = self.rotary[:, begin : begin + tokens.shape[1]]
        x = self.embed(tokens)
        for layer, block in enumerate(self.blocks):
            x = block(x, rotary, cache, layer)
        if cache is not None:
            cache.length += tokens.shape[1]
        return self.norm(x)

    def forward(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        return self.lm_head(self.hidden(tokens, cache))


def rotary_table(config: ModelConfig) -> Tensor:
    half = config.width // config.heads // 2
    frequency = 1000.0 ** -(torch.arange(half) / half)
    angle = torch.arange(config.context)[:, None] * frequency  # [context, c/2]
    return torch.stack((angle.cos(), angle.sin()))


def rotate(x: Tensor, rotary: Tensor) -> Tensor:
    cos, sin = rotary
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


@torch.inference_mode()
def sample(
    model: Transformer, prompts: Tensor, *, limit: int, end: int, generator: torch.Generator
) -> list[list[int]]:
    """Completions at temperature 1 of prompts [B, P], each up to and including `end`."""
    cache = Cache(model.config, len(prompts), prompts.device)
    done = torch.zeros(len(prompts), dtype=torch.bool)
    drawn, fresh = [], prompts
    for _ in range(limit):
        # Drawn on the CPU: the generator's stream is then the same on every device.
        probability = model(fresh, cache)[:, -1].softmax(-1).cpu()
        token = torch.multinomial(probability, 1, generator=generator)
        drawn.append(token)
        done |= token[:, 0] == end
        if done.all():
            break
        fresh = token.to(prompts.device)
    rows = torch.cat(drawn, dim=1).tolist()
    return [row[: row.index(end) + 1] if end in row else row for row in rows]
