"""A synthetic language: hidden states like those of a language model, for tests and benchmarks."""

from __future__ import annotations

import torch
from torch import Tensor


class Text:
    """Embeddings of words + a context that drifts + noise.

    Words come from a Zipf vocabulary, so that they repeat and rollouts have many tokens nearly in
    common: with independent states the transport problems mix much faster than real ones. The mean
    norm is about scale * sqrt(dim).
    """

    def __init__(
        self,
        seed: int,
        dim: int = 64,
        *,
        vocabulary: int = 50,
        drift: float = 0.4,
        noise: float = 0.25,
        scale: float = 1.0,
    ) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.dim = dim
        self.embeddings = scale * self.normal(vocabulary, dim)
        self.frequencies = 1 / torch.arange(1.0, vocabulary + 1)
        self.drift, self.noise = scale * drift, scale * noise

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers."""
        return torch.randn(shape, generator=self.generator)

    def words(self, *shape: int) -> Tensor:
        """Draw words: their numbers in the vocabulary."""
        count = torch.Size(shape).numel()
        drawn = torch.multinomial(self.frequencies, count, True, generator=self.generator)
        return drawn.view(shape)

    def context(self, rollouts: int, length: int) -> Tensor:
        """Contexts (rollouts, length, dim) that keep 0.9 of themselves from token to token."""
        contexts = torch.empty(rollouts, length, self.dim)
        now = self.normal(rollouts, self.dim)
        for t in range(length):
            now = 0.9 * now + 0.19**0.5 * self.normal(rollouts, self.dim)
            contexts[:, t] = self.drift * now
        return contexts

    def __call__(self, length: int) -> Tensor:
        """A rollout (length, dim)."""
        if length == 0:
            return torch.zeros(0, self.dim)
        states = self.embeddings[self.words(length)] + self.context(1, length)[0]
        return states + self.noise * self.normal(length, self.dim)

    def rollouts(self, *lengths: int) -> list[Tensor]:
        """Rollouts of these lengths."""
        return [self(length) for length in lengths]

    def batch(self, rollouts: int, length: int) -> Tensor:
        """Rollouts of one length, (rollouts, length, dim)."""
        words = self.words(rollouts, length)
        states = self.noise * self.normal(rollouts, length, self.dim)  # before the contexts
        states += self.embeddings[words]
        states += self.context(rollouts, length)
        return states
