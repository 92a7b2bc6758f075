"""torch.ops.shear beyond its kernels: fake tensors for torch.compile, and no gradients.

Importing _C defines the operators (csrc/ops.cpp) and registers the CPU kernels. On GPUs they are
Triton's, unless a compiled module has registered its own.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import Library, get_ctx, register_autograd, register_fake

from .. import _C  # noqa: F401
from . import backends, cuda
from .batch import check_op_cost, check_op_integers, check_op_pair, check_op_states

NAMES = (
    "span_weights",
    "span_weights_and_pairs",
    "span_distances",
    "pair_distances",
    "sinkhorn",
)
PAIR_COUNTS = 5


def span_count(tokens: int, span: int, stride: int) -> int:
    """Spans of a rollout: the rule of csrc/spans.h, for lengths that may be symbolic.

    Without a branch, which would ask what a symbol is: one span and those behind it; a rollout
    without tokens has none, any other at least as many tokens as spans.
    """
    more = torch.sym_max(0, (tokens - span + stride - 1) // stride)  # type: ignore[no-untyped-call]
    count: int = torch.sym_min(tokens, 1 + more)  # type: ignore[no-untyped-call]
    return count


def _check_batch(hidden: Tensor, *integers: Tensor) -> None:
    """What a kernel would refuse by layout, dtype or device: a fake result would hide it."""
    check_op_states("hidden", hidden)
    for name, tensor in zip(("cu_seqlens", "group_ids", "labels"), integers, strict=True):
        check_op_integers(name, tensor, hidden)


@register_fake("shear::span_weights")
def _(
    hidden: Tensor, cu_seqlens: Tensor, group_ids: Tensor, labels: Tensor, **kwargs: Any
) -> Tensor:
    _check_batch(hidden, cu_seqlens, group_ids, labels)
    return hidden.new_empty((hidden.shape[0],), dtype=torch.float32)


@register_fake("shear::span_weights_and_pairs")
def _(
    hidden: Tensor, cu_seqlens: Tensor, group_ids: Tensor, labels: Tensor, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    _check_batch(hidden, cu_seqlens, group_ids, labels)
    weights = hidden.new_empty((hidden.shape[0],), dtype=torch.float32)
    return weights, hidden.new_empty((PAIR_COUNTS,), dtype=torch.int64)


@register_fake("shear::span_distances")
def _(
    hidden: Tensor, cu_seqlens: Tensor, group_ids: Tensor, labels: Tensor, **kwargs: Any
) -> tuple[Tensor, ...]:
    _check_batch(hidden, cu_seqlens, group_ids, labels)
    spans = get_ctx().new_dynamic_size()  # depends on the lengths, which are data
    return (
        hidden.new_empty((spans,), dtype=torch.float32),
        hidden.new_empty((spans,), dtype=torch.int64),
        hidden.new_empty((spans,), dtype=torch.float32),
        hidden.new_empty((spans,), dtype=torch.int32),
        hidden.new_empty((spans, 3), dtype=torch.int64),
        hidden.new_empty((PAIR_COUNTS,), dtype=torch.int64),
    )


@register_fake("shear::pair_distances")
def _(x: Tensor, y: Tensor, *, span: int = 100, stride: int = 25, **kwargs: Any) -> Tensor:
    check_op_pair(x, y)
    rows, columns = (span_count(states.shape[0], span, stride) for states in (x, y))
    return x.new_empty((rows, columns), dtype=torch.float32)


@register_fake("shear::sinkhorn")
def _(
    cost: Tensor, n_rows: Tensor | None = None, n_cols: Tensor | None = None, **kwargs: Any
) -> tuple[Tensor, Tensor, Tensor]:
    check_op_cost(cost)
    for name, lengths in (("n_rows", n_rows), ("n_cols", n_cols)):
        if lengths is not None:
            check_op_integers(name, lengths, cost)
    batch = cost.shape[:1]
    value = cost.new_empty(batch, dtype=torch.float32)
    return value, torch.empty_like(value), torch.empty_like(value, dtype=torch.int32)


def _mark_non_differentiable(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Any
) -> None:
    ctx.inputs = len(inputs)
    ctx.mark_non_differentiable(*(output if isinstance(output, tuple) else (output,)))


def _no_gradients(ctx: Any, *grads: Any) -> tuple[None, ...]:
    return tuple(None for _ in range(ctx.inputs))


# Without this the outputs claim requires_grad=True, backward() gives None, and opcheck passes.
for _name in NAMES:
    register_autograd(f"shear::{_name}", _no_gradients, setup_context=_mark_non_differentiable)


def _in_triton(name: str) -> Callable[..., Any]:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        if (why_not := backends.why_not("triton")) is not None:
            raise RuntimeError(f"shear::{name} has no GPU kernel here: {why_not}")
        ops = importlib.import_module("..triton.ops", __package__)  # Triton is an extra
        return getattr(ops, name)(*args, **kwargs)

    return kernel


_library = Library("shear", "IMPL")  # type: ignore[no-untyped-call]
for _name in NAMES:
    for _key in ("XPU",) if cuda.LOADED else ("CUDA", "XPU"):
        _library.impl(_name, _in_triton(_name), _key)  # type: ignore[no-untyped-call]
