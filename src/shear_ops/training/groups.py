"""Group ids of rollouts from what a trainer has instead of integers."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from operator import index

import torch
from torch import Tensor


def group_ids_from_uids(uids: Sequence[object]) -> Tensor:
    """Group ids from strings, or from prompts: equal ones get equal ids, on every rank alike.

    Args:
        uids: B strings, or B prompts as sequences or 1-d tensors of token ids.

    Returns:
        (B,) int64 in [0, 2^63): hashes, without communication. Two different uids of a batch of a
        million share one with probability 5e-8.

    Raises:
        TypeError: for one string instead of a sequence, or uids of other types (integers are group
            ids already).
    """
    if isinstance(uids, str):
        raise TypeError(f"uids must be a sequence of strings or prompts, got the string {uids!r}")
    return torch.tensor([_hash(uid) for uid in uids], dtype=torch.int64, device="cpu")


def _hash(uid: object) -> int:
    if isinstance(uid, Tensor):
        uid = uid.tolist()
    if isinstance(uid, str):
        text = uid
    elif isinstance(uid, Iterable):
        try:
            text = repr([index(token) for token in uid])
        except TypeError as error:
            raise _wrong(uid) from error
    else:
        raise _wrong(uid)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def _wrong(uid: object) -> TypeError:
    return TypeError(f"uids must be strings or sequences of token ids, got {uid!r} among them")
