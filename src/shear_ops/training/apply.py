"""How token weights act on a loss: by the advantages, or by the gradient of the log-probabilities.

The advantages of a rollout's tokens are its advantage times their weights: exact in every loss that
takes one advantage per token. Others have one per rollout (sequence-level importance sampling, a
geometric mean). There weights multiply the gradient on its way from the loss to the log-probability
of each token: values, ratios and clipping are those without weights, and the policy gradient of a
token is weight times what it was. Where the loss is a sum over tokens of advantage times a function
of that token's log-probability, both are the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

WAYS = ("auto", "advantages", "gradient")


def scale_gradient(logp: Tensor, weights: Tensor) -> Tensor:
    """Token log-probabilities as they are, whose gradient is multiplied by token weights.

    What ``logp.detach() + weights * (logp - logp.detach())`` means, with the values of logp bit for
    bit, -inf and NaN among them, and a gradient of weights times that of the result whatever the
    values: where the loss masks a token out, a gradient of 0 stays 0.

    Take everything that weights must not touch from logp itself, as a KL term to a reference, or an
    entropy. Works under autocast, activation checkpointing, torch.compile(fullgraph=True) and in
    front of any loss that takes log-probabilities; a fused loss that makes them itself never shows
    them. The result is a new tensor, which a loss may change in place.

    Args:
        logp: floating point of any shape, as (B, T), (N,).
        weights: of the same shape, at least 0; 1 for padding. Of span_weights, or a product of
            several weightings. Constants: no gradient flows to them.

    Returns:
        Tensor of logp's shape, dtype and device. Gradients are multiplied in the wider of the two
        dtypes, and rounded to logp's once.

    Raises:
        TypeError, ValueError: naming the argument, the value seen and the value wanted.
    """
    _check(logp, weights)
    return _with_gradient(logp.detach(), logp, weights)


def reference_beside(reference: Tensor, logp: Tensor, weights: Tensor) -> Tensor:
    """The reference's log-probabilities, beside which a KL term is not scaled by token weights.

    For losses that take both terms from scale_gradient(logp, weights), where logp itself is out of
    reach. A KL estimate is some f(reference - logp), and its gradient would be weights times -f'.
    The value of the reference stays, but it gets the gradient (weights - 1) of logp, so that that
    of the difference is (weights - 1) - weights = -1, as without weights.

    Args:
        reference: log-probabilities of logp's shape; constants.
        logp, weights: as in scale_gradient.

    Returns:
        Tensor of the shape, dtype and values of reference.

    Raises:
        TypeError, ValueError: naming the argument, the value seen and the value wanted.
    """
    _check(logp, weights)
    if reference.shape != logp.shape:
        raise ValueError(
            f"reference must have the shape of logp, {tuple(logp.shape)}, got "
            f"{tuple(reference.shape)}"
        )
    return _with_gradient(reference.detach(), logp, weights - 1)


def weighted(advantages: Tensor, weights: Tensor) -> Tensor:
    """Advantages (B,), or (B, C) of a trainer's own, times token weights (B, C)."""
    return (advantages[:, None] if advantages.dim() == 1 else advantages) * weights


def check_way(way: object) -> None:
    """Raise ValueError unless way is one of WAYS."""
    if way not in WAYS:
        raise ValueError(f"apply must be one of {', '.join(WAYS)}, got {way!r}")


def _check(logp: Tensor, weights: Tensor) -> None:
    given: dict[str, Any] = {"logp": logp, "weights": weights}
    for name, tensor in given.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {tensor.dtype}")
    if weights.shape != logp.shape:
        raise ValueError(
            f"weights must have the shape of logp, {tuple(logp.shape)}, got {tuple(weights.shape)}"
        )
    if weights.requires_grad:
        raise ValueError("weights must not require a gradient: they are constants; detach() them")


class _WithGradient(torch.autograd.Function):
    """value, with factor times the gradient of logp.

    A Function, not a hook on the tensor: a hook would scale every use of logp, the KL term's too,
    and torch.compile breaks the graph at one. Not the difference of logp and itself detached: that
    is NaN at -inf, and +0 at -0.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, logp: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(factor)
        ctx.dtype = logp.dtype
        return value.clone()  # a view made in a Function could not be changed in place

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor, None]:
        (factor,) = ctx.saved_tensors
        return None, (gradients[0] * factor).to(ctx.dtype), None


def _with_gradient(value: Tensor, logp: Tensor, factor: Tensor) -> Tensor:
    made: Tensor = _WithGradient.apply(value, logp, factor)  # type: ignore[no-untyped-call]
    return made
