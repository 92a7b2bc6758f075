"""Link: what the ranks of a process group tell each other. One process is a group of one."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Generic, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

LONGEST_TEXT = 2000  # of an error, in characters

Key = TypeVar("Key", bound=Hashable)
Result = TypeVar("Result")


class Move(NamedTuple, Generic[Key]):
    """Rows of a matrix that go from one rank to another; key names them."""

    key: Key
    rows: int
    source: int
    target: int

    def back(self) -> Move[Key]:
        """Return the move in the other direction."""
        return self._replace(source=self.target, target=self.source)


class Link:
    """The collectives of a process group that regrouping needs, on any backend.

    Args:
        process_group: None for the whole world, or for one process without torch.distributed.
        device: where the caller's tensors are, and where what arrives is put.
    """

    def __init__(self, process_group: dist.ProcessGroup | None, device: torch.device) -> None:
        """Find this process's rank, and which device the backend sends from."""
        self.group = process_group
        self.device = self.wire = device
        self.rank, self.size = 0, 1
        if not (dist.is_available() and dist.is_initialized()):
            if process_group is not None:
                raise ValueError("process_group is given, but torch.distributed is not initialised")
            return
        self.rank, self.size = dist.get_rank(process_group), dist.get_world_size(process_group)
        if self.rank < 0:
            raise ValueError("process_group must contain this process")
        backend = dist.get_backend(process_group)
        if backend == "gloo":
            self.wire = torch.device("cpu")
        elif backend == "nccl" and device.type == "cpu":
            self.wire = torch.device("cuda", torch.cuda.current_device())

    def gather(self, rows: Sequence[Sequence[int]], columns: int) -> list[list[list[int]]]:
        """Return every rank's rows of int64 columns, rank by rank; ranks may have any number."""
        if self.size == 1:
            return [[list(row) for row in rows]]
        counts = self._gather(torch.tensor([len(rows)], device="cpu"))
        lengths = [int(count) for count in counts]
        if max(lengths) == 0:
            return [[] for _ in lengths]
        padded = torch.zeros(max(lengths), columns, dtype=torch.int64, device="cpu")
        if rows:
            padded[: len(rows)] = torch.tensor(rows, dtype=torch.int64, device="cpu")
        parts = self._gather(padded)
        return [part[:n].tolist() for part, n in zip(parts, lengths, strict=True)]

    def _gather(self, tensor: Tensor) -> list[Tensor]:
        sent = tensor.to(self.wire)
        parts = [torch.empty_like(sent) for _ in range(self.size)]
        dist.all_gather(parts, sent, group=self.group)
        return [part.cpu() for part in parts]

    def agree(self, work: Callable[[], Result]) -> Result:
        """Run work on every rank; where it raised on one, raise on all of them.

        Raises:
            RuntimeError: on the ranks whose own work succeeded, with what another one said.
        """
        error: Exception | None = None
        try:
            result = work()
        except Exception as raised:
            error = raised
        failed = [r for r, ((flag,),) in enumerate(self.gather([[error is not None]], 1)) if flag]
        if not failed:
            return result
        text = "" if error is None else f"{type(error).__name__}: {error}"[:LONGEST_TEXT]
        texts = self.gather([[byte] for byte in text.encode()], 1)
        if error is not None:
            raise error
        said = bytes(byte for (byte,) in texts[failed[0]]).decode()
        raise RuntimeError(
            f"rank {failed[0]} of the process group could not compute token weights: {said}"
        )

    def exchange(
        self,
        moves: Sequence[Move[Key]],
        rows_of: Callable[[Key], Tensor],
        columns: int,
        dtype: torch.dtype,
    ) -> tuple[dict[Key, Tensor], int]:
        """Move rows between ranks; moves are the same on all ranks, in the same order.

        Args:
            moves: all of them, also those of other ranks.
            rows_of: the (rows, columns) tensor of a key whose source is this rank.
            columns, dtype: of all tensors.

        Returns:
            What arrived at this rank by key, views of one buffer, and the bytes that it sent.
        """
        if not moves:
            return {}, 0
        empty = torch.empty(0, columns, dtype=dtype, device=self.device)
        leaving = sorted((m for m in moves if m.source == self.rank), key=lambda m: m.target)
        coming = sorted((m for m in moves if m.target == self.rank), key=lambda m: m.source)
        sent = torch.cat([empty, *(rows_of(move.key) for move in leaving)]).to(self.wire)
        arrived = torch.empty(
            sum(move.rows for move in coming), columns, dtype=dtype, device=self.wire
        )
        dist.all_to_all_single(
            output=arrived.view(torch.uint8),  # every backend knows bytes
            input=sent.view(torch.uint8),
            output_split_sizes=[
                sum(move.rows for move in coming if move.source == r) for r in range(self.size)
            ],
            input_split_sizes=[
                sum(move.rows for move in leaving if move.target == r) for r in range(self.size)
            ],
            group=self.group,
        )
        parts = torch.split(arrived.to(self.device), [move.rows for move in coming])
        received = {move.key: part for move, part in zip(coming, parts, strict=True)}
        return received, sent.numel() * sent.element_size()
