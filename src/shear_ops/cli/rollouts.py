"""Rollout files: hidden states, groups and labels of rollouts in one safetensors file."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..ops.api import SpanDistances
from ..ops.batch import STATE_DTYPES, Batch
from .output import escaped, write_output

TENSORS = ("hidden", "cu_seqlens", "mask", "group_ids", "labels", "tokens", "first_wrong")
LABELS = {1: "correct", 0: "incorrect", -1: "ignored"}
INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)

# What a text of a foreign file must not do to a terminal: control characters are shown as pictures,
# other invisible controls (C1, changes of direction) as the replacement character.
_SHOWN = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {
    code: 0xFFFD for code in (*range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A))
}


class RolloutFileError(ValueError):
    """A rollout file that cannot be used, in one line."""


@dataclass(frozen=True)
class Rollouts:
    """A batch of B rollouts in the packed layout, N tokens in all.

    Attributes:
        hidden: (N, d). cu_seqlens: (B + 1,) int64. group_ids: (B,) int64.
        labels: (B,) int8: 1 correct, 0 incorrect, -1 ignored.
        tokens: (N,) int64 indices into vocabulary, or None.
        first_wrong: (B,) int64 position in the rollout of the first wrong token, -1 unknown.
        mask: (B, T) of a padded file, else None. vocabulary, prompts, source: texts to print, may
            be empty.
    """

    hidden: Tensor
    cu_seqlens: Tensor
    group_ids: Tensor
    labels: Tensor
    tokens: Tensor | None = None
    first_wrong: Tensor | None = None
    mask: Tensor | None = None
    vocabulary: list[str] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)
    source: str = ""

    def __len__(self) -> int:
        """Return the number of rollouts."""
        return len(self.labels)

    def tokens_of(self, rollout: int) -> slice:
        """Return where a rollout is among the N tokens."""
        return slice(self._offsets[rollout], self._offsets[rollout + 1])

    def first_wrong_of(self, rollout: int) -> int:
        """Return the position of a rollout's first wrong token, -1 if unknown."""
        return -1 if self.first_wrong is None else int(self.first_wrong[rollout])

    def first_wrongs(self) -> list[int]:
        """Return what first_wrong_of returns, of all rollouts."""
        return [-1] * len(self) if self.first_wrong is None else self.first_wrong.tolist()

    def label_of(self, rollout: int) -> str:
        """Return a rollout's label as a word."""
        return LABELS[int(self.labels[rollout])]

    @cached_property
    def _offsets(self) -> list[int]:
        return self.cu_seqlens.tolist()

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of span_weights."""
        return {
            "hidden": self.hidden,
            "cu_seqlens": self.cu_seqlens,
            "group_ids": self.group_ids,
            "labels": self.labels,
        }

    def text_of(self, rollout: int) -> list[str]:
        """Return the tokens of a rollout as texts, or a dot for each if the file has none."""
        where = self.tokens_of(rollout)
        if self.tokens is None:
            return ["·"] * (where.stop - where.start)
        ids = self.tokens[where].tolist()
        return [self.vocabulary[i] for i in ids] if self.vocabulary else [f"{i} " for i in ids]

    def members_of(self, group_id: int) -> list[int]:
        """Return the indices of a group's rollouts, in order."""
        return self.groups[group_id]

    @cached_property
    def groups(self) -> dict[int, list[int]]:
        """The indices of every group's rollouts, in order of appearance."""
        groups: dict[int, list[int]] = {}
        for i, group_id in enumerate(self.group_ids.tolist()):
            groups.setdefault(group_id, []).append(i)
        return groups

    def group(self, group_id: int) -> Rollouts:
        """Return the rollouts of one group as a batch of its own, packed."""
        members = self.members_of(group_id)
        rows = torch.cat([torch.arange(*self.cu_seqlens[i : i + 2].tolist()) for i in members])
        lengths = self.cu_seqlens.diff()[members]
        return Rollouts(
            hidden=self.hidden[rows],
            cu_seqlens=torch.nn.functional.pad(lengths.cumsum(0), (1, 0)),
            group_ids=self.group_ids[members],
            labels=self.labels[members],
            tokens=None if self.tokens is None else self.tokens[rows],
            first_wrong=None if self.first_wrong is None else self.first_wrong[members],
            vocabulary=self.vocabulary,
        )


def shipped_rollouts() -> Path:
    """Return the path of the recorded arithmetic rollouts that come with the package."""
    return Path(str(resources.files("shear_ops") / "data" / "arithmetic.safetensors"))


def load_rollouts(path: Path) -> Rollouts:
    """Read and check a rollout file; padded files are packed.

    Tensors: hidden (N, d) with cu_seqlens (B + 1), or hidden (B, T, d) with mask (B, T);
    group_ids (B); labels (B). Optional: tokens (N) or (B, T); first_wrong (B). Metadata, optional:
    vocabulary and prompts (JSON lists of strings), source.

    Raises:
        RolloutFileError: naming the tensor, what was seen and what is wanted.
    """
    try:
        return _rollouts(*_read(path))
    except RolloutFileError as error:
        raise RolloutFileError(f"{escaped(path)}: {error}") from error


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of TENSORS that the file has, all others' names checked, and metadata."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        kind = "a folder" if path.is_dir() else "no regular file" if path.exists() else ""
        raise RolloutFileError(f"it is {kind}" if kind else "no such file")
    try:
        before = path.stat()
        with safe_open(path, framework="pt") as file:
            names, metadata = set(file.keys()), file.metadata() or {}
            # copied: get_tensor maps the file, whose bytes may change or end while they are used
            tensors = {name: file.get_tensor(name).clone() for name in names & set(TENSORS)}
        after = path.stat()
    except (SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise RolloutFileError(f"not a readable safetensors file ({reason})") from error
    if (before.st_mtime_ns, before.st_size) != (after.st_mtime_ns, after.st_size):
        raise RolloutFileError("it changed while it was read")
    missing = {"hidden", _layout(tensors), "group_ids", "labels"} - names
    if missing:
        raise RolloutFileError(
            f"tensors {sorted(missing)} are missing (of hidden, cu_seqlens or mask, group_ids, "
            f"labels), the file has {sorted(names)[:8]}"
        )
    return tensors, metadata


def _layout(tensors: dict[str, Tensor]) -> str:
    return "mask" if "mask" in tensors else "cu_seqlens"


def _rollouts(tensors: dict[str, Tensor], metadata: dict[str, str]) -> Rollouts:
    for name in ("group_ids", "labels", "tokens", "first_wrong", _layout(tensors)):
        if name in tensors:
            dtype = tensors[name].dtype
            _want(dtype in INTEGERS, name, dtype, "integers of a signed type, uint8 or bool")
    labels, group_ids = tensors["labels"].long(), tensors["group_ids"].long()
    _want(labels.dim() == 1, "labels", _shape(labels), "(B,)")
    batch = len(labels)
    _want(group_ids.shape == (batch,), "group_ids", _shape(group_ids), f"({batch},)")
    _want(bool(((labels >= -1) & (labels <= 1)).all()), "labels", sorted(set(labels.tolist()))[:5],
          "1, 0 or -1")  # fmt: skip
    _check_layout(tensors, batch)
    mask, tokens = tensors.get("mask"), tensors.get("tokens")
    packed = Batch.of(
        tensors["hidden"],
        cu_seqlens=tensors["cu_seqlens"].long() if mask is None else None,
        mask=mask,
        group_ids=group_ids,
        labels=labels.to(torch.int8),
    )
    _check_finite(packed)
    first_wrong = tensors.get("first_wrong")
    if first_wrong is not None:
        first_wrong = first_wrong.long()
        _check_first_wrong(first_wrong, packed.cu_seqlens.diff().tolist())
    vocabulary, prompts = _texts(metadata, "vocabulary"), _texts(metadata, "prompts")
    _want(len(prompts) in (0, batch), "metadata prompts", f"{len(prompts)} texts", f"{batch} texts")
    if tokens is not None:
        tokens = (tokens if packed.mask is None else tokens[packed.mask]).long()
    if vocabulary and tokens is not None and len(tokens):
        low, high = int(tokens.min()), int(tokens.max())
        _want(low >= 0 and high < len(vocabulary), "tokens", f"{low} to {high}",
              f"0 to {len(vocabulary) - 1} (ids in the vocabulary)")  # fmt: skip
    return Rollouts(
        hidden=packed.hidden,
        cu_seqlens=packed.cu_seqlens,
        group_ids=packed.group_ids,
        labels=packed.labels,
        tokens=tokens,
        first_wrong=first_wrong,
        mask=packed.mask,
        vocabulary=vocabulary,
        prompts=prompts,
        source=_shown(metadata.get("source", "")),
    )


def _check_layout(tensors: dict[str, Tensor], batch: int) -> None:
    """Check what says where the tokens of the rollouts are, in words about a file."""
    hidden, mask, tokens = tensors["hidden"], tensors.get("mask"), tensors.get("tokens")
    _want(hidden.dtype in STATE_DTYPES, "hidden", hidden.dtype, "float32, float16 or bfloat16")
    _want(hidden.dim() == (2 if mask is None else 3), "hidden", _shape(hidden),
          "(B, T, d) with mask or (N, d) with cu_seqlens")  # fmt: skip
    _want(hidden.shape[-1] > 0, "hidden", _shape(hidden), "of at least one dimension d")
    if mask is None:
        offsets = tensors["cu_seqlens"].long()
        _want(offsets.shape == (batch + 1,), "cu_seqlens", _shape(offsets), f"({batch + 1},)")
        rising = bool((offsets[1:] >= offsets[:-1]).all()) and int(offsets[0]) == 0
        _want(rising, "cu_seqlens", "other offsets", "0 first, then never decreasing")
        _want(int(offsets[-1]) == len(hidden), "cu_seqlens", f"{int(offsets[-1])} at its end",
              f"{len(hidden)}, the number of tokens")  # fmt: skip
    else:
        _want(mask.shape == hidden.shape[:2], "mask", _shape(mask), str(tuple(hidden.shape[:2])))
        _want(len(mask) == batch, "mask", _shape(mask), f"({batch}, T)")
        _want(bool(((mask == 0) | (mask == 1)).all()), "mask", "other values", "0 and 1")
    if tokens is not None:
        wanted = (len(hidden),) if mask is None else tuple(mask.shape)
        _want(tokens.shape == wanted, "tokens", _shape(tokens), str(wanted))


def _check_finite(packed: Batch) -> None:
    finite = packed.hidden.isfinite().all(1)
    if not bool(finite.all()):
        token = int(finite.logical_not().nonzero()[0])
        rollout = int(torch.searchsorted(packed.cu_seqlens, token, right=True)) - 1
        kind = "NaN" if bool(packed.hidden[token].isnan().any()) else "Inf"
        position = token - int(packed.cu_seqlens[rollout])
        if packed.mask is not None:  # where it is in the file
            position = int(packed.mask[rollout].nonzero()[position])
        where = f"rollout {rollout} of group {int(packed.group_ids[rollout])}, token {position}"
        _want(False, "hidden", f"{kind} in {where}", "finite states")


def _check_first_wrong(first_wrong: Tensor, lengths: list[int]) -> None:
    batch = len(lengths)
    _want(first_wrong.shape == (batch,), "first_wrong", _shape(first_wrong), f"({batch},)")
    for i, (first, length) in enumerate(zip(first_wrong.tolist(), lengths, strict=True)):
        seen = f"{first} for rollout {i} of {length} tokens"
        _want(first == -1 or 0 <= first < length, "first_wrong", seen, "-1 or inside the rollout")


def _want(ok: bool, name: str, seen: object, wanted: str) -> None:
    if not ok:
        raise RolloutFileError(f"{name} must be {wanted}, got {seen}")


def _shape(tensor: Tensor) -> str:
    return f"shape {tuple(tensor.shape)}"


def _texts(metadata: dict[str, str], name: str) -> list[str]:
    try:
        texts: Any = json.loads(metadata.get(name, "[]"))
    except (ValueError, RecursionError):
        texts = None
    if not isinstance(texts, list) or not all(isinstance(t, str) for t in texts):
        raise RolloutFileError(f"metadata {name} must be a JSON list of strings")
    return [_shown(t) for t in texts]


def _shown(text: str) -> str:
    """A text that any terminal and any UTF-8 file can take."""
    return text.translate(_SHOWN).encode("utf-8", "replace").decode()


def save_scores(path: Path, rollouts: Rollouts, weights: Tensor, found: SpanDistances) -> None:
    """Write weights (N,) in the layout of the input, and what every span found.

    Raises:
        ValueError, OSError: if the file cannot be written.
    """
    from safetensors.torch import save

    packed = Batch(**rollouts.arguments(), mask=rollouts.mask)
    tensors = {
        "weights": packed.restore(weights),
        "group_ids": rollouts.group_ids,
        "labels": rollouts.labels,
        "span_distance": found.distance,
        "span_nearest": found.nearest,
        "span_rollout": found.rollout,
        "span_begin": found.begin,
        "span_end": found.end,
    }
    if rollouts.mask is None:
        tensors["cu_seqlens"] = rollouts.cu_seqlens
    else:
        tensors["mask"] = rollouts.mask
    write_output(path, save({name: t.contiguous() for name, t in tensors.items()}))
