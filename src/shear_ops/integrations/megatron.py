"""Where Megatron's ranks hold the hidden states, for trainers that are built on it.

The last pipeline stage has them, as (tokens, 1, d): the samples of a micro-batch one after another.
Sequence parallelism cuts this stream into one piece per tensor-parallel rank. Context parallelism
either cuts every sample, padded, into 2 * ranks chunks, of which a rank has one from the front and
its mirror image from the back (zigzag), or the stream into one piece per rank (contiguous).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import mpu
from torch import Tensor, nn


def final_norm(model: Sequence[nn.Module]) -> nn.Module:
    """Return the module whose output is the last hidden state, below DDP and Float16Module.

    Raises:
        ValueError: if no chunk of the model has one, as on all but the last pipeline stage.
    """
    for chunk in model:
        for module in chunk.modules():
            norm = getattr(getattr(module, "decoder", None), "final_layernorm", None)
            # the tower of a vision model has a decoder, too, but no output_layer
            if isinstance(norm, nn.Module) and hasattr(module, "output_layer"):
                return norm
    raise ValueError(
        "model must have decoder.final_layernorm beside output_layer on the last pipeline stage, "
        f"got {', '.join(type(chunk).__name__ for chunk in model)}"
    )


@dataclass(frozen=True)
class Layout:
    """How a rank's part of the stream is related to the samples.

    Args:
        sequence_parallel: whether tensor-parallel ranks have a piece each, or all of it.
        contiguous: whether context parallelism cuts the stream as a whole.
    """

    sequence_parallel: bool
    contiguous: bool = False

    @property
    def _zigzag(self) -> int:
        """Ranks that a sample is spread over in zigzag order."""
        return 1 if self.contiguous else int(mpu.get_context_parallel_world_size())

    def gather(self, states: Tensor) -> Tensor:
        """States (tokens, 1, d) of a rank -> of all context-parallel ranks, (ranks, tokens, d).

        Collective over tensor- and context-parallel ranks. One rank only where it is contiguous.
        """
        states = states[:, 0]
        if self.sequence_parallel:
            states = _all_gather(states, mpu.get_tensor_model_parallel_group()).flatten(0, 1)
        if mpu.get_context_parallel_world_size() == 1:
            return states[None]
        ranks = _all_gather(states, mpu.get_context_parallel_group())
        return ranks.flatten(0, 1)[None] if self.contiguous else ranks

    def rows(self, total: int) -> int:
        """Rows that a sample of total tokens has in each rank's stream."""
        return total if self._zigzag == 1 else 2 * _chunk(total, self._zigzag)

    def places(self, positions: Tensor, total: int) -> tuple[Tensor, Tensor]:
        """Rank, and row within the sample there, of positions in a sample of total tokens."""
        ranks = self._zigzag
        if ranks == 1:
            return torch.zeros_like(positions), positions
        size = _chunk(total, ranks)
        chunk = positions // size
        return _owner(chunk, ranks), positions % size + (chunk >= ranks) * size


def own_part(values: Tensor, total: int) -> Tensor:
    """Those of a response's values (R,) whose log-probabilities a rank has, in zigzag order.

    Args:
        values: one per token of the response, the last of the sample's total tokens.
    """
    ranks = int(mpu.get_context_parallel_world_size())
    if ranks == 1:
        return values
    predictors = torch.arange(total - len(values) - 1, total - 1, device=values.device)
    owner = _owner(predictors // _chunk(total, ranks), ranks)
    return values[owner == mpu.get_context_parallel_rank()]


def _chunk(total: int, ranks: int) -> int:
    return -(-total // (2 * ranks))


def _owner(chunk: Tensor, ranks: int) -> Tensor:
    return torch.minimum(chunk, 2 * ranks - 1 - chunk)


def _all_gather(states: Tensor, group: dist.ProcessGroup) -> Tensor:
    states = states.contiguous()
    parts = [torch.empty_like(states) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, states, group=group)
    return torch.stack(parts)
