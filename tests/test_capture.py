"""HiddenCapture under every wrapper a policy comes in."""

from __future__ import annotations

from contextlib import suppress
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ranks
import tiny
from shear_ops import HiddenCapture, span_weights
from shear_ops.training.capture import evaluating


class Plain(nn.Module):
    """A model that is not from transformers: its state at a position is the token there."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Identity()
        self.head = nn.Linear(4, 9)

    def forward(self, tokens: Tensor) -> Tensor:
        states = self.body(tokens[..., None].expand(*tokens.shape, 4) + 0.0)
        return self.head(states[0] if isinstance(states, tuple) else states)


TOKENS = torch.arange(1, 13).view(2, 6)
MASK = torch.tensor([[0, 1, 0, 1], [1, 1, 1, 0]])  # of the last four positions


def first_column(recording: Any) -> list[float]:
    return recording.hidden[:, 0].tolist()


@pytest.mark.parametrize(
    ("align", "wanted"), [("token", [4, 6, 9, 10, 11]), ("predictor", [3, 5, 8, 9, 10])]
)
def test_wanted_positions(align: str, wanted: list[int]) -> None:
    model = Plain()
    capture = HiddenCapture(model, backbone=model.body, align=align)
    with capture.recording(MASK) as whole:
        model(TOKENS)
    with capture.recording(MASK) as chunks:
        for row in TOKENS:
            model(row[None])
    for recording in (whole, chunks):
        assert first_column(recording) == wanted
        assert recording.cu_seqlens.tolist() == [0, 2, 5]
        assert recording.hidden.shape == (5, 4)
        assert not recording.hidden.requires_grad


def test_mask_as_wide_as_the_forward() -> None:
    model = Plain()
    capture = HiddenCapture(model, backbone=model.body, align="predictor")
    mask = torch.nn.functional.pad(MASK, (2, 0))
    with capture.recording(mask) as recording:
        model(TOKENS)
    assert first_column(recording) == [3, 5, 8, 9, 10]
    with pytest.raises(ValueError, match="from the second on"), capture.recording(mask * 0 + 1):
        model(TOKENS)
    with (
        pytest.raises(ValueError, match="mask must fit the last 6 positions"),
        capture.recording(torch.ones(2, 7).bool()),
    ):
        model(TOKENS)


def test_nothing_is_kept_outside_recording() -> None:
    model = Plain()
    capture = HiddenCapture(model, backbone=model.body)
    model(TOKENS)
    with (
        pytest.raises(RuntimeError, match="processed 0 rows while recording, wanted 2"),
        capture.recording(MASK),
    ):
        pass
    with pytest.raises(RuntimeError, match="processed 4 rows"), capture.recording(MASK):
        model(TOKENS.repeat(2, 1))
    with (
        pytest.raises(RuntimeError, match="already on"),
        capture.recording(MASK),
        capture.recording(MASK),
    ):
        pass
    capture.remove()
    with pytest.raises(RuntimeError, match="processed 0 rows"), capture.recording(MASK):
        model(TOKENS)


def test_refuses() -> None:
    model = Plain()
    with pytest.raises(ValueError, match="align must be one of token, predictor, got 'next'"):
        HiddenCapture(model, backbone=model.body, align="next")
    with pytest.raises(ValueError, match=r"got Plain: for others give backbone="):
        HiddenCapture(model)
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got str"):
        HiddenCapture("gpt2")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"backbone must be a torch.nn.Module, got str"):
        HiddenCapture(model, backbone="body")  # type: ignore[arg-type]
    capture = HiddenCapture(model, backbone=model.body)
    with pytest.raises(TypeError, match=r"mask must be bool or integer, got torch.float32"):
        capture.recording(torch.ones(2, 3)).__enter__()
    with pytest.raises(ValueError, match="mask must be 0 or 1 everywhere"):
        capture.recording(torch.full((2, 3), 2)).__enter__()
    with pytest.raises(RuntimeError, match="whole is already on"), capture.whole(), capture.whole():
        pass
    with pytest.raises(ValueError, match=r"mask must be a \(B, C\) tensor, got \(3,\)"):
        HiddenCapture(model, backbone=model.body).recording(torch.ones(3).bool()).__enter__()


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_refuses_models_tuned_by_prompts(kind: str) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    import tiny

    config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ValueError, match=f"must not be tuned by prompts or prefixes, got {kind}"):
        HiddenCapture(peft.get_peft_model(tiny.model(), config))


def test_inference_mode() -> None:
    """States of a pass in inference mode give weights that may enter a loss."""
    model = Plain()
    capture = HiddenCapture(model, backbone=model.body)
    with torch.inference_mode(), capture.recording(MASK) as recording:
        model(TOKENS)
    weights = span_weights(
        recording.hidden, cu_seqlens=recording.cu_seqlens, group_ids=[0, 0], labels=[0, 1]
    )
    loss = (weights * torch.ones(5, requires_grad=True)).sum()
    loss.backward()


needs_transformers = pytest.mark.skipif(
    find_spec("transformers") is None, reason="transformers is not installed"
)

IDS = torch.randint(3, 20, (3, 9), generator=torch.Generator().manual_seed(3))
KEEP = torch.tensor([[1, 1, 1, 0], [1, 0, 1, 1], [1, 1, 0, 0]])


def wanted_states(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS, output_hidden_states=True).hidden_states[-1][:, -4:][KEEP.bool()]


@needs_transformers
@pytest.mark.parametrize("kind", ["Qwen2", "Llama"])
@pytest.mark.parametrize(
    "wrapper", ["none", "compile", "checkpointing", "peft", "compile peft", "headless"]
)
def test_last_hidden_state_under_wrappers(kind: str, wrapper: str) -> None:
    model = tiny.model(kind)
    wanted = wanted_states(model)
    if wrapper == "checkpointing":
        model.gradient_checkpointing_enable()
    if wrapper == "headless":
        model = model.base_model
    if "peft" in wrapper:
        peft = pytest.importorskip("peft", reason="peft is not installed")
        model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    capture = HiddenCapture(model)
    if "compile" in wrapper:
        model = torch.compile(model, backend="eager")
        assert HiddenCapture(model).backbone is capture.backbone
    model.train()
    with capture.recording(KEEP) as recording:
        output = model(IDS)
    output[0].sum().backward()  # a recomputed forward must not be recorded
    assert torch.equal(recording.hidden, wanted)
    with capture.recording(KEEP) as recording:
        model(IDS)
    assert torch.equal(recording.hidden, wanted)


@needs_transformers
def test_packed_layout() -> None:
    model = tiny.model()
    capture = HiddenCapture(model)
    mask = torch.zeros(1, 27, dtype=torch.bool)
    mask[0, [3, 4, 20]] = True
    with torch.no_grad(), capture.recording(mask) as recording:
        model(IDS.view(1, -1), position_ids=torch.arange(9).repeat(3)[None])
    assert recording.hidden.shape == (3, 16)


@needs_transformers
def test_reference_passes_are_not_recorded() -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    model = peft.get_peft_model(tiny.model(), config)
    model.add_adapter("ref", config)
    capture = HiddenCapture(model)
    policy = wanted_states(model)
    with torch.no_grad(), capture.recording(KEEP) as recording:
        with model.disable_adapter():
            assert capture.reference_pass
            base = model(IDS)
        model.set_adapter("ref")
        assert capture.reference_pass
        model(IDS)
        model.set_adapter("default")
        assert not capture.reference_pass
        assert not torch.equal(model(IDS).logits, base.logits)
    assert torch.equal(recording.hidden, policy)


def fully_sharded(rank: int) -> tuple[Tensor, Tensor]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    model = tiny.model()
    wanted = wanted_states(model)
    before = HiddenCapture(model)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    after = HiddenCapture(model)
    with before.recording(KEEP) as first, after.recording(KEEP) as second:
        model(IDS)[0].sum().backward()
    assert torch.equal(first.hidden, second.hidden)
    assert type(first.hidden) is Tensor
    return wanted, first.hidden


def data_parallel(rank: int) -> tuple[Tensor, Tensor]:
    model = nn.parallel.DistributedDataParallel(tiny.model())
    capture = HiddenCapture(model)
    with capture.recording(KEEP) as recording:
        model(IDS)[0].sum().backward()
    return wanted_states(model.module), recording.hidden


@needs_transformers
@pytest.mark.parametrize("wrapped", [fully_sharded, data_parallel])
def test_under_data_parallelism(wrapped: Any) -> None:
    for wanted, hidden in ranks.run(2, wrapped):
        torch.testing.assert_close(hidden, wanted, rtol=1e-5, atol=1e-6)


def test_evaluating_brings_back_what_was_training_only() -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.Sequential(nn.Dropout(0.5)))
    model[1].eval()
    before = [module.training for module in model.modules()]
    assert before == [True, True, False, False]
    for error in (None, KeyError):
        with suppress(KeyError), evaluating(model):
            assert not any(module.training for module in model.modules())
            if error:
                raise error
        assert [module.training for module in model.modules()] == before
