"""Link: what the ranks of a process group tell each other. One process is a group of one."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

LONGEST_TEXT = 2000  # of an error, in characters
PIECE_BYTES = 2**26  # of an exchange between ranks

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
        rows_of: Callable[[Key, int, int], Tensor],
        into: Callable[[Key], Tensor],
        columns: int,
        dtype: torch.dtype,
    ) -> int:
        """Move rows between ranks; moves are the same on all ranks, in the same order.

        In pieces of at most PIECE_BYTES that a rank sends and as many that arrive at it: beside
        what the caller holds, a rank needs memory for one piece of each.

        Args:
            moves: all of them, also those of other ranks.
            rows_of: rows begin to end, on any device, of a key whose source is this rank. It is
                asked for each row once, a key's rows in order.
            into: the (rows, columns) tensor that takes a key whose target is this rank.
            columns, dtype: of all tensors.

        Returns:
            The bytes that this rank sent.
        """
        bytes_sent = 0
        for piece in _pieces(moves, max(1, PIECE_BYTES // (columns * dtype.itemsize))):
            leaving = sorted((p for p in piece if p.source == self.rank), key=lambda p: p.target)
            coming = sorted((p for p in piece if p.target == self.rank), key=lambda p: p.source)
            sent, arrived = (
                torch.empty(sum(map(len, parts)), columns, dtype=dtype, device=self.wire)
                for parts in (leaving, coming)
            )
            for part, rows in zip(leaving, torch.split(sent, [*map(len, leaving)]), strict=True):
                rows.copy_(rows_of(part.key, part.begin, part.end))
            dist.all_to_all_single(
                output=arrived.view(torch.uint8),  # every backend knows bytes
                input=sent.view(torch.uint8),
                output_split_sizes=[
                    sum(len(part) for part in coming if part.source == r) for r in range(self.size)
                ],
                input_split_sizes=[
                    sum(len(part) for part in leaving if part.target == r) for r in range(self.size)
                ],
                group=self.group,
            )
            for part, rows in zip(coming, torch.split(arrived, [*map(len, coming)]), strict=True):
                into(part.key)[part.begin : part.end].copy_(rows)
            bytes_sent += sent.numel() * sent.element_size()
        return bytes_sent


@dataclass(frozen=True)
class _Part(Generic[Key]):
    """Rows begin to end of a move."""

    key: Key
    begin: int
    end: int
    source: int
    target: int

    def __len__(self) -> int:
        return self.end - self.begin


def _pieces(moves: Iterable[Move[Key]], most: int) -> list[list[_Part[Key]]]:
    """Cut moves so that no rank sends or receives more than most rows in a piece.

    Every row is in the first piece that has room for it at both ends.
    """
    pieces: list[list[_Part[Key]]] = []
    room: list[dict[tuple[str, int], int]] = []  # rows left, by piece and end
    for move in moves:
        ends = ("source", move.source), ("target", move.target)
        begin = place = 0
        while begin < move.rows:
            if place == len(pieces):
                pieces.append([])
                room.append({})
            left = room[place]
            rows = min(move.rows - begin, *(left.get(end, most) for end in ends))
            if rows:
                pieces[place].append(_Part(move.key, begin, begin + rows, move.source, move.target))
                left |= {end: left.get(end, most) - rows for end in ends}
            begin, place = begin + rows, place + 1
    return pieces
