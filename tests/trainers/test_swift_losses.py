"""Losses of ms-swift, and what token weights on advantages and on gradients do in each: a table.

One step with ms-swift's own loss on a batch that it made, with ratios that clip on both sides.
"""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip(
    "swift", reason="ms-swift is not installed (make trainer-swift makes an environment with it)"
)
from swift.arguments import RLHFArguments

from losses import EQUAL, check, difference, row
from shear_ops.integrations import swift as integration
from shear_ops.training.settings import refuse
from test_swift import LOSSES, build, given_rollouts, logged, train, work_here  # noqa: F401

ROWS: dict[str, dict[str, Any]] = {
    **{name: {"loss_type": name} for name in LOSSES},
    "grpo, `beta`": {"loss_type": "grpo", "beta": 0.5},
    "grpo, sequence_token level": {
        "loss_type": "grpo", "importance_sampling_level": "sequence_token"
    },
    **{f"{name}, sequence level": {"loss_type": name, "importance_sampling_level": "sequence"}
       for name in LOSSES},
    "grpo, sequence level, `beta`": {
        "loss_type": "grpo", "importance_sampling_level": "sequence", "beta": 0.5
    },
}  # fmt: skip


class Batch:
    """A trainer, and a batch as it comes to its loss, with weights, ratios and a reference."""

    def __init__(self) -> None:
        self.trainer = build(max_steps=1, loss_type="dapo")
        given_rollouts(self.trainer)
        seen: list[Any] = []
        compute = self.trainer._compute_loss_and_metrics
        self.trainer._compute_loss_and_metrics = lambda *of: (seen.append(of), compute(*of))[1]
        train(self.trainer)
        del self.trainer._compute_loss_and_metrics
        self.model, self.inputs, self.batch = seen[0]
        generator = torch.Generator().manual_seed(7)
        shape = self.batch.completion_mask.shape
        noise, reference = torch.randn(2, *shape, generator=generator)
        rows = torch.linspace(-0.4, 0.4, shape[0])[:, None]
        logps = self.batch.old_per_token_logps
        self.batch.old_per_token_logps = logps + 0.3 * noise + rows
        self.reference = logps + 0.5 * reference
        signs = torch.tensor([1.0, -1.0]).repeat(shape[0] // 2)[:, None]
        self.batch.advantages = (signs * (0.5 + rows)).expand(shape)
        weights = 2 * torch.rand(shape, generator=generator) * (torch.arange(shape[1]) % 5 > 0)
        self.weights = torch.where(self.batch.completion_mask, weights, 1.0)

    def step(self, way: str | None, **options: Any) -> Tensor:
        """What a step of gradient descent adds to the parameters."""
        defaults = {"beta": 0.0, "importance_sampling_level": "token"}
        for name, value in (defaults | options).items():
            setattr(self.trainer, name, value)
        batch = copy.copy(self.batch)
        if self.trainer.beta:
            batch.ref_per_token_logps = self.reference
        if way == "advantages":
            batch.advantages = batch.advantages * self.weights
        elif way == "gradient":
            batch.shear_weights = self.weights
        self.trainer.model.zero_grad()
        loss, _ = self.trainer._compute_loss_and_metrics(self.model, self.inputs, batch)
        loss.backward()
        if self.trainer.beta:  # the batch is used again
            assert not batch.ref_per_token_logps.requires_grad
        return -0.5 * torch.cat([p.grad.flatten() for p in self.trainer.model.parameters()])


@pytest.fixture
def batch() -> Batch:
    return Batch()


def chosen(wanted: str, **options: Any) -> str:
    """The way that options lead to; or why it is refused."""
    args = SimpleNamespace(
        use_liger_kernel=False, advantage_reweight=None, deepspeed=None,
        **{"importance_sampling_level": "token", **options},
    )  # fmt: skip
    way = integration.apply_of(args, wanted)
    try:
        refuse(integration.refusals(args, SimpleNamespace(sequence_parallel_size=1), {}, way))
    except ValueError as error:
        return str(error)
    return way


def test_table_of_losses(batch: Batch) -> None:
    rows = []
    for name, options in ROWS.items():
        found: dict[str, Tensor | str] = {}
        for way in ("advantages", "gradient", "auto"):
            taken = chosen(way, **options)
            found[way] = taken if " " in taken else batch.step(taken, **options)
        assert difference(batch.step(None, **options), found["gradient"]) > 0.05  # weights matter
        rows.append(row(name, found))
    check("ms-swift", rows)


def test_sequence_level_is_sequence_token_level(batch: Batch) -> None:
    """ms-swift has GSPO-token, which takes advantages per token: one judges the other."""
    for beta in (0.0, 0.5):
        options = {"loss_type": "grpo", "beta": beta}
        found = batch.step("gradient", importance_sampling_level="sequence", **options)
        wanted = batch.step("advantages", importance_sampling_level="sequence_token", **options)
        assert difference(found, wanted) < EQUAL


@pytest.mark.parametrize("layout", ["padded", "padding_free"])
def test_training_at_the_sequence_level(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By train(), with a reference: weights reach the loss, and only the losses' gradients."""
    options = {"importance_sampling_level": "sequence", "loss_type": "grpo", "beta": 0.1,
               "num_iterations": 2, "optim": "sgd", "learning_rate": 0.5,
               "padding_free": layout == "padding_free"}  # fmt: skip
    monkeypatch.setattr(RLHFArguments, "_check_padding_free", lambda self: None)
    parameters, losses = [], []
    for shear in (False, True):
        trainer = build(shear, **options)
        given_rollouts(trainer)
        parameters.append(train(trainer))
        losses.append(logged(trainer, "loss")[0])
    assert max(logged(trainer, "shear/weight_max")) > 1
    assert losses[0] == losses[1]  # of the first step, at the same parameters
    assert (parameters[0] - parameters[1]).abs().max() > 1e-3
