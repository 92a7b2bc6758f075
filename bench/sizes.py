"""How large everything that is measured is, and how long it may take."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch


@dataclass(frozen=True)
class Layer:
    """Shapes of a transformer layer; the defaults are those of Qwen2.5-7B."""

    dim: int = 3584
    inner: int = 18944
    heads: int = 28
    kv_heads: int = 4


@dataclass(frozen=True)
class Sizes:
    """How large everything is, and how long it may take; the defaults are the paper's sizes."""

    tokens: int = 3000
    dim: int = 3584
    slice_spans: int = 2  # of the paper group, each against all of its opposing spans
    small: tuple[int, int] = (400, 256)  # tokens, d
    problems: int = 1000
    sample: int = 40  # of them, on which settings are tried
    threads: tuple[int, int] = (1500, 3584)
    growth_tokens: tuple[int, ...] = (1000, 2000, 4000, 8000)  # at growth_dim
    growth_dim: int = 1024
    growth_dims: tuple[int, ...] = (512, 1024, 2048, 4096, 8192)  # at growth_length
    growth_length: int = 1000
    peak: int = 2048
    repeats: int = 5
    limit_s: float = 30.0  # not repeated after this long in all; in a race, after half of it
    give_up_s: float = 8.0  # a ladder ends where a setting takes longer than this on the sample
    compiled: bool = True  # the hand-written loops
    backend: str | None = None  # None: the one that is chosen for the device
    growth_dtype: torch.dtype = torch.float32
    growth_rollouts: tuple[int, ...] = ()  # at growth_length and growth_dim; 8 elsewhere
    solver_tokens: int = 3000  # of each of the two rollouts whose pairs are all solved
    rates: tuple[int, int] = (4096, 4096)  # programs, rounds of the loops that find the ceilings
    groups: int = 64  # per training step
    layer: Layer = Layer()
    layers: int = 28
    micro: tuple[str, ...] = ()  # arguments of pytest: which of the single functions
    # of the entry survivors, None: those that come with the package; of rounding, beside those
    rollouts: Path | None = None
    rounding_dims: tuple[int, ...] = (16, 64, 65, 128, 256, 512, 1024, 4096, 8192)
    rounding_pairs: int = 300  # of spans, of every kind of states


QUICK = Sizes(
    tokens=300, dim=64, small=(125, 32), problems=16, sample=8, threads=(200, 64),
    growth_tokens=(200, 400), growth_dim=32, growth_dims=(32, 64), growth_length=200,
    peak=256, repeats=2, limit_s=2.0, give_up_s=1.0, compiled=False,
    solver_tokens=125, rates=(2, 4), groups=1, layer=Layer(64, 128, 4, 2),
    micro=("-k", "test_sinkhorn and (not peers or kernel)"), rounding_dims=(64,), rounding_pairs=2,
)  # fmt: skip
GPU = Sizes(
    growth_tokens=(1000, 2000, 4000, 8000, 16000), growth_dim=2048,
    growth_dims=(2048, 3584, 8192), growth_length=3000, growth_rollouts=(8, 16),
    growth_dtype=torch.bfloat16, peak=8192, limit_s=6.0, give_up_s=2.0,
)  # fmt: skip
GPU_QUICK = replace(
    QUICK, tokens=125, small=(100, 32), growth_tokens=(100,), growth_length=100, growth_dims=(32,),
    growth_rollouts=(4,), problems=4, sample=2, repeats=1, give_up_s=0.3,
)  # fmt: skip
