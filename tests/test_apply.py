"""How token weights act on a loss: gradients exactly weighted, values untouched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from shear_ops import scale_gradient
from shear_ops.training.apply import WAYS, check_way, reference_beside, weighted

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weights_of(*shape: int) -> Tensor:
    """Some of them 0, as of a token whose nearest span is its own copy, some 1, as of padding."""
    weights = random(1, *shape).abs() * 2
    weights.view(-1)[::5] = 0
    weights.view(-1)[1::5] = 1
    return weights


def bits(tensor: Tensor) -> Tensor:
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.detach().view(integers)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(4, 7), (23,), (2, 3, 5), (0,)])
def test_values_stay_and_gradients_are_weighted(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    logp = random(2, *shape).to(dtype).requires_grad_()
    weights, coming = weights_of(*shape), random(3, *shape).to(dtype)
    scaled = scale_gradient(logp, weights)
    assert scaled.dtype == dtype
    assert torch.equal(bits(scaled), bits(logp))
    scaled.backward(coming)
    assert torch.equal(logp.grad, (coming * weights).to(dtype))  # rounded once


@pytest.mark.parametrize("value", [float("-inf"), float("nan"), -0.0, 1e-40, -3e38])
def test_values_that_arithmetic_would_change(value: float) -> None:
    """Of masked tokens: the difference of such a value and itself is NaN, or another zero."""
    logp = torch.tensor([-1.5, value], requires_grad=True)
    scaled = scale_gradient(logp, torch.tensor([2.0, 1.0]))
    assert torch.equal(bits(scaled), bits(logp))
    scaled.masked_fill(torch.tensor([False, True]), 0.0).sum().backward()
    assert logp.grad.tolist() == [2.0, 0.0]


def test_result_may_be_changed_in_place_and_leaves_logp() -> None:
    logp = random(4, 3).requires_grad_()
    scaled = scale_gradient(logp, torch.full((3,), 3.0))
    scaled[1] = 0
    assert bool((logp != 0).all())
    (2 * scaled).sum().backward()
    assert logp.grad.tolist() == [6, 0, 6]


def test_other_uses_of_logp_are_not_scaled() -> None:
    """A KL term and an entropy beside it; and no gradient where none is wanted."""
    logp, weights = random(5, 6).requires_grad_(), weights_of(6)
    (scale_gradient(logp, weights).sum() + 5 * logp.sum()).backward()
    torch.testing.assert_close(logp.grad, weights + 5, rtol=1e-6, atol=0)
    with torch.no_grad():
        assert not scale_gradient(logp, weights).requires_grad
    assert not scale_gradient(logp.detach(), weights).requires_grad


def loss_of(logp: Tensor, weights: Tensor) -> Tensor:
    return torch.exp(scale_gradient(torch.log_softmax(logp, -1), weights)).square().sum()


@pytest.mark.parametrize(
    "call",
    [torch.compile(loss_of, fullgraph=True, backend="aot_eager"),
     lambda *of: checkpoint(loss_of, *of, use_reentrant=False),
     lambda *of: checkpoint(loss_of, *of, use_reentrant=True)],
    ids=["compile", "checkpoint", "reentrant checkpoint"],
)  # fmt: skip
def test_under_compile_and_checkpointing(call: Callable[..., Tensor]) -> None:
    gradients = []
    for compute in (loss_of, call):
        logits = random(6, 4, 9).requires_grad_()
        compute(logits, weights_of(4, 9)).backward()
        gradients.append(logits.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-6, atol=1e-7)


def test_under_autocast() -> None:
    head = torch.nn.Linear(8, 5)
    gradients = []
    for weights in (torch.ones(3, 5), torch.full((3, 5), 4.0)):  # a power of two: no rounding
        head.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            logits = head(random(7, 3, 8))
            scaled = scale_gradient(logits, weights)
        assert scaled.dtype == torch.bfloat16
        scaled.sum().backward()
        gradients.append(head.weight.grad.clone())
    assert torch.equal(gradients[1], 4 * gradients[0])


KLS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "k1": lambda logp, reference: logp - reference,
    "k2": lambda logp, reference: (logp - reference).square() / 2,
    "k3": lambda logp, reference: torch.exp(reference - logp) - (reference - logp) - 1,
}


@pytest.mark.parametrize("kind", KLS)
def test_kl_beside_is_not_scaled(kind: str) -> None:
    weights, reference = weights_of(4, 7), random(8, 4, 7)
    gradients = []
    for alone in (True, False):
        logp = random(9, 4, 7).requires_grad_()
        scaled = scale_gradient(logp, weights)
        if alone:  # the KL term from what is not scaled: what is wanted
            kl = KLS[kind](logp, reference)
        else:
            beside = reference_beside(reference, logp, weights)
            assert torch.equal(bits(beside), bits(reference))
            kl = KLS[kind](scaled, beside)
        (torch.exp(scaled).sum() + 0.3 * kl.sum()).backward()
        gradients.append(logp.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-6)


def test_ratio_loss_is_that_of_weighted_advantages() -> None:
    """Clipped on both sides, advantages of both signs."""
    advantages, weights, old = random(10, 8), weights_of(8, 50), random(11, 8, 50)
    gradients, values = [], []
    for way in ("advantages", "gradient"):
        logp = (old + 0.3 * random(12, 8, 50)).requires_grad_()
        taken = scale_gradient(logp, weights) if way == "gradient" else logp
        factors = weighted(advantages, weights if way == "advantages" else torch.ones(8, 50))
        ratio = torch.exp(taken - old)
        values.append(torch.minimum(ratio * factors, ratio.clamp(0.8, 1.2) * factors))
        values[-1].sum().backward()
        gradients.append(logp.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-6, atol=0)
    assert 0.2 < (gradients[0] == 0).float().mean() < 0.8  # clipped, and not
    assert not torch.allclose(*values)  # the gradient's way leaves the loss as without weights


def test_weighted_takes_advantages_per_rollout_and_per_token() -> None:
    advantages, weights = random(13, 3), weights_of(3, 4)
    own = advantages[:, None].expand(3, 4) * 2
    assert torch.equal(weighted(advantages, weights), advantages[:, None] * weights)
    assert torch.equal(weighted(own, weights), own * weights)


def test_refuses() -> None:
    logp, weights = torch.zeros(2, 3), torch.ones(2, 3)
    wrong: list[tuple[Any, Any, str]] = [
        (3, weights, "logp must be a tensor, got int"),
        (logp, [1.0], "weights must be a tensor, got list"),
        (logp.long(), weights, "logp must be floating point, got torch.int64"),
        (logp, weights.bool(), "weights must be floating point, got torch.bool"),
        (logp, weights[:, :1], r"weights must have the shape of logp, \(2, 3\), got \(2, 1\)"),
        (logp, weights.clone().requires_grad_(), "weights must not require a gradient"),
    ]
    for given, factors, message in wrong:
        with pytest.raises((TypeError, ValueError), match=message):
            scale_gradient(given, factors)
    with pytest.raises(ValueError, match=r"reference must have the shape of logp, \(2, 3\)"):
        reference_beside(logp[0], logp, weights)
    for way in WAYS:
        check_way(way)
    with pytest.raises(ValueError, match="apply must be one of auto, advantages, gradient, got 1"):
        check_way(1)
