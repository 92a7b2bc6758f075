"""HiddenCapture under every wrapper a policy comes in."""

from __future__ import annotations

import re
import warnings
from contextlib import ExitStack, suppress
from importlib.util import find_spec
from typing import Any

import numpy as np
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


@needs_transformers
def test_an_adapter_named_ref_may_be_the_policy() -> None:
    """The one that is active when the capture is made."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    model = peft.get_peft_model(tiny.model(), config, adapter_name="ref")
    capture = HiddenCapture(model)
    assert not capture.reference_pass
    with torch.no_grad(), capture.recording(KEEP) as recording:
        model(IDS)
        with model.disable_adapter():
            assert capture.reference_pass
            model(IDS)
    assert torch.equal(recording.hidden, wanted_states(model))


EQUAL = torch.arange(3, 12).repeat(3, 1)
DROPOUTS = {
    "Llama attention": ("Llama", {"attention_dropout": 0.5}, {}),
    "Qwen2 attention": ("Qwen2", {"attention_dropout": 0.5}, {}),
    "Phi modules": ("Phi", {"resid_pdrop": 0.5}, {}),
    "LoRA": ("Llama", {}, {"lora_dropout": 0.5}),
}


def dropping_out(kind: str) -> Any:
    name, config, lora = DROPOUTS[kind]
    model = tiny.model(name, **config)
    if lora:
        peft = pytest.importorskip("peft", reason="peft is not installed")
        made = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False, **lora)
        model = peft.get_peft_model(model, made)
    return model.train()


def counted(model: Any, calls: list[bool]) -> Any:
    def forward() -> Any:
        calls.append(torch.is_grad_enabled())
        return model(EQUAL)

    return forward


@needs_transformers
@pytest.mark.parametrize("kind", DROPOUTS)
def test_record_makes_states_of_equal_tokens_equal(kind: str) -> None:
    """Whatever drops out; the first forward is the trainer's, with its gradients."""
    model = dropping_out(kind)
    capture = HiddenCapture(model)
    mask = torch.ones(3, 4, dtype=torch.bool)
    named = next(iter(DROPOUTS[kind][1] | DROPOUTS[kind][2]))
    calls: list[bool] = []
    torch.manual_seed(5)
    drawn = model(EQUAL).logits
    torch.manual_seed(5)
    with pytest.warns(UserWarning, match=rf"{named} = 0.5.*one more forward, in evaluation mode"):
        output, recording = capture.record(mask, counted(model, calls))
    assert torch.equal(output.logits, drawn)
    output.logits.sum().backward()
    assert calls == [True, False, False]  # the third to compare, once
    assert all(module.training for module in model.modules())
    first, *others = recording.hidden.chunk(3)
    assert all(torch.equal(first, other) for other in others)
    model.eval()
    with torch.no_grad():
        wanted = model(EQUAL, output_hidden_states=True).hidden_states[-1][:, -4:]
    assert torch.equal(recording.hidden, wanted.flatten(0, 1))
    model.train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        calls.clear()
        capture.record(mask, counted(model, calls))
    assert calls == [True, False]


@needs_transformers
@pytest.mark.parametrize("kind", ["none", "zero", "evaluation"])
def test_record_without_dropout_is_one_forward(kind: str) -> None:
    """The way out that the warning names works."""
    model = tiny.model("Llama", **({"attention_dropout": 0.0} if kind == "zero" else {})).train()
    if kind == "evaluation":
        model = dropping_out("Llama attention").eval()
    calls: list[bool] = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        capture = HiddenCapture(model)
        _, recording = capture.record(KEEP, counted(model, calls))
        assert calls == [True, False]  # the second to compare, once
        calls.clear()
        capture.record(KEEP, counted(model, calls))
        with HiddenCapture(model).recording(KEEP):
            model(IDS)
    assert calls == [True]
    assert recording.hidden.shape == (8, 16)


NOISES: dict[str, Any] = {
    "dropout that stays on": lambda x, training: nn.functional.dropout(x, 0.3, training=True),
    "its own generator": lambda x, training: x + torch.randn(x.shape, generator=OWN),
    "numpy": lambda x, training: x + torch.from_numpy(NUMPY.standard_normal(x.shape)).to(x.dtype),
    "its own generator, in training": lambda x, training: (
        x + torch.randn(x.shape, generator=OWN) if training else x
    ),
    "numpy besides dropout": lambda x, training: (
        nn.functional.dropout(x, 0.3, training)
        + torch.from_numpy(NUMPY.standard_normal(x.shape)).to(x.dtype)
    ),
}
OWN, NUMPY = torch.Generator().manual_seed(1), np.random.default_rng(2)


def noisy(noise: Any, dtype: torch.dtype = torch.float32) -> Any:
    model = tiny.model("Llama").to(dtype).train()
    embed = model.model.embed_tokens
    embed.register_forward_hook(
        lambda module, args, output: noise(output, module.training).to(dtype)
    )
    return model


@needs_transformers
@pytest.mark.filterwarnings("ignore:.*random numbers")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", NOISES)
def test_record_refuses_noise_that_it_cannot_take_out(kind: str, dtype: torch.dtype) -> None:
    """It used to give states with the noise in them, and said that they were without."""
    model = noisy(NOISES[kind], dtype)
    capture = HiddenCapture(model)
    where = " in evaluation mode" if "dropout" in kind else ""
    wanted = rf"of the same rows{where} gave states that differ by \d[\d.e-]* of their norm"
    for _ in range(2):  # not once only
        with pytest.raises(RuntimeError, match=wanted):
            capture.record(KEEP, lambda: model(IDS))


@needs_transformers
def test_record_refuses_noise_that_begins_later() -> None:
    """In evaluation mode, and of torch's default generators: the others are compared once."""
    share = 0.0
    model = noisy(lambda x, training: x + share * torch.randn_like(x))
    capture = HiddenCapture(model)
    with pytest.warns(UserWarning, match="draw random numbers"):
        _, recording = capture.record(KEEP, lambda: model(IDS))
    assert torch.equal(recording.hidden, wanted_states(model.eval()))
    share = 0.1
    with pytest.raises(RuntimeError, match="in evaluation mode gave states that differ"):
        capture.record(KEEP, lambda: model(IDS))


@needs_transformers
def test_record_takes_out_noise_as_its_error_advises() -> None:
    model = noisy(lambda x, training: nn.functional.dropout(x, 0.3, training=training))
    with pytest.warns(UserWarning, match="in evaluation mode"):
        _, recording = HiddenCapture(model).record(KEEP, lambda: model(IDS))
    assert torch.equal(recording.hidden, wanted_states(model.eval()))


@needs_transformers
@pytest.mark.parametrize("autocast", [False, True])
def test_record_takes_rounding_for_no_noise(autocast: bool) -> None:
    """As of kernels that add in any order; also of states that sink tokens are among."""
    unit = torch.finfo(torch.bfloat16 if autocast else torch.float32).eps
    model = noisy(lambda x, training: x * (1 + 4 * unit * torch.randn(x.shape, generator=OWN)))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        _, recording = HiddenCapture(model).record(KEEP, lambda: model(IDS))
    assert recording.hidden.shape == (8, 16)


def test_record_of_no_rows_and_of_no_tokens() -> None:
    model = Plain()
    capture = HiddenCapture(model, backbone=model.body)
    _, recording = capture.record(MASK[:0], lambda: None)
    assert len(recording.hidden) == 0
    capture = HiddenCapture(model, backbone=model.body)
    _, recording = capture.record(MASK * 0, lambda: model(TOKENS))
    assert recording.hidden.shape == (0, 4)


def test_recording_says_that_random_numbers_were_drawn() -> None:
    class Noisy(Plain):
        def forward(self, tokens: Tensor) -> Tensor:
            return super().forward(nn.functional.dropout(tokens.float(), 0.5, self.training))

    model = Noisy()
    capture = HiddenCapture(model, backbone=model.body)
    with (
        pytest.warns(UserWarning, match=r"draw random numbers: hidden states of equal tokens"),
        capture.recording(MASK),
    ):
        model(TOKENS)


def heads_below(kind: str) -> tuple[Any, Any]:
    """A language model whose base_model is itself, and the module whose output is wanted."""
    import transformers

    if kind == "Llama4":
        model = transformers.Llama4ForCausalLM(
            transformers.Llama4TextConfig(
                vocab_size=40, hidden_size=16, intermediate_size=24, intermediate_size_mlp=24, num_hidden_layers=2,
                num_attention_heads=2, num_key_value_heads=1, head_dim=8, num_local_experts=2, num_experts_per_tok=1,
                pad_token_id=0, eos_token_id=1, bos_token_id=None,
            )
        )  # fmt: skip
        return model, model.model

    class Renamed(transformers.LlamaForCausalLM):  # type: ignore[misc]
        base_model_prefix = "language_model"  # as Gemma3ForCausalLM of transformers 4

    language = Renamed(tiny.model("Llama").config)
    if kind == "renamed":
        return language, language.model

    class Outer(transformers.PreTrainedModel):  # type: ignore[misc]
        """As MllamaForConditionalGeneration of transformers 4."""

        config_class = transformers.LlamaConfig
        base_model_prefix = "nothing"
        _supports_sdpa = True

        def __init__(self) -> None:
            super().__init__(language.config)
            self.vision_tower = nn.Linear(2, 2)
            self.language_model = language

        def get_input_embeddings(self) -> Any:
            return self.language_model.get_input_embeddings()

        def get_output_embeddings(self) -> Any:
            return self.language_model.get_output_embeddings()

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.language_model(*args, **kwargs)

    return Outer(), language.model


@needs_transformers
@pytest.mark.parametrize("kind", ["Llama4", "renamed", "outer"])
@pytest.mark.parametrize("return_dict", [True, False])
@pytest.mark.parametrize("given", [True, False])
def test_backbone_below_the_head(kind: str, return_dict: bool, given: bool) -> None:
    """Never logits, also where the language model itself is named as the backbone."""
    model, backbone = heads_below(kind)
    assert model.base_model is model
    capture = HiddenCapture(model, backbone=model if given else None)
    assert capture.backbone is backbone
    with torch.no_grad(), capture.recording(KEEP) as recording:
        model(IDS, return_dict=return_dict)
    assert torch.equal(recording.hidden, wanted_states(model))


@needs_transformers
def test_logits_are_refused() -> None:
    model = tiny.model()
    capture = HiddenCapture(model, backbone=model.lm_head)
    wanted = r"hidden states of 16 dimensions.*give backbone="
    with pytest.raises(ValueError, match=wanted), capture.recording(KEEP):
        model(IDS)
    model = nn.Sequential(tiny.model())  # its output has no last_hidden_state
    capture = HiddenCapture(model, backbone=model)
    wanted = "CausalLMOutputWithPast: give backbone="
    with pytest.raises(TypeError, match=wanted), capture.recording(KEEP):
        model(IDS)

    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(9, 4), nn.Linear(4, 9)
            self.base_model = self
            self.get_input_embeddings = lambda: self.embed
            self.get_output_embeddings = lambda: self.head

    with pytest.raises(ValueError, match="a module below its LM head, got Flat: give backbone="):
        HiddenCapture(Flat())


@needs_transformers
def test_width_of_a_model_that_projects_its_states() -> None:
    import transformers

    config = transformers.OPTConfig(
        vocab_size=40, hidden_size=16, word_embed_proj_dim=8, ffn_dim=16, num_hidden_layers=1,
        num_attention_heads=2, do_layer_norm_before=False,
    )  # fmt: skip
    model = transformers.OPTForCausalLM(config).eval()
    with torch.no_grad(), HiddenCapture(model.model.decoder).recording(KEEP) as recording:
        model(IDS)
    assert recording.hidden.shape == (8, 8)
    with torch.no_grad(), HiddenCapture(model).recording(KEEP) as whole:
        model(IDS)
    assert torch.equal(whole.hidden, recording.hidden)


DECODERS = (
    "OPT", "Bart", "BigBirdPegasus", "Blenderbot", "BlenderbotSmall", "Marian", "MBart", "Mvp",
    "Pegasus", "PLBart", "ProphetNet", "TrOCR", "Whisper",
)  # fmt: skip


def decoder(kind: str) -> Any:
    """A causal language model whose head takes the output of a decoder past base_model."""
    import transformers

    torch.manual_seed(0)
    sizes = {
        "OPT": {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
        "ProphetNet": {"hidden_size": 16, "decoder_ffn_dim": 16, "num_decoder_layers": 1, "num_decoder_attention_heads": 2},
    }.get(kind, {"d_model": 16, "decoder_ffn_dim": 16, "decoder_layers": 1, "decoder_attention_heads": 2})  # fmt: skip
    if kind == "Whisper":
        sizes["max_target_positions"] = 64
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=40, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1, is_decoder=True, is_encoder_decoder=False, **sizes,
    )  # fmt: skip
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


@needs_transformers
@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("kind", DECODERS)
def test_a_decoder_that_is_called_past_the_backbone(kind: str, given: bool) -> None:
    """Nothing was recorded, and backbone=model.model did not help."""
    model = decoder(kind)
    capture = HiddenCapture(model, backbone=model.base_model if given else None)
    with torch.no_grad(), capture.recording(KEEP) as recording:
        model(input_ids=IDS)
    assert torch.equal(recording.hidden, wanted_states(model))
    capture.remove()
    with pytest.raises(RuntimeError, match="processed 0 rows"), capture.recording(KEEP):
        model(input_ids=IDS)


@needs_transformers
@pytest.mark.parametrize("compiled", [True, False])
def test_a_decoder_inside_the_backbone_is_recorded_once(compiled: bool) -> None:
    """Also after a forward that raised inside."""
    model = decoder("OPT")
    capture = HiddenCapture(model)
    head, wanted = model, wanted_states(model)
    backbone = model.model
    if compiled:
        head, backbone = (torch.compile(m, backend="eager") for m in (head, backbone))
    for called in (backbone, head):
        with pytest.raises(IndexError), capture.recording(KEEP):
            called(input_ids=IDS + 100)
        with torch.no_grad(), capture.recording(KEEP) as recording:
            called(input_ids=IDS)
        assert torch.equal(recording.hidden, wanted)


def mixtral(**config: Any) -> Any:
    return tiny.model("Mixtral", num_local_experts=2, num_experts_per_tok=1, **config)


NAMED: dict[str, Any] = {
    "OPT": (lambda: decoder("OPT"), "dropout = 0.1", "dropout=0.0"),
    "Mixtral": (
        lambda: mixtral(router_jitter_noise=0.2),
        "router_jitter_noise = 0.2",
        "router_jitter_noise=0.0",
    ),
    "several": (
        lambda: tiny.model("Phi", resid_pdrop=0.25, attention_dropout=0.5),
        "resid_pdrop = 0.25",
        "attention_dropout=0.0",
    ),
}


@needs_transformers
@pytest.mark.parametrize("kind", NAMED)
def test_warning_names_what_is_at_work_and_how_to_switch_it_off(kind: str, tmp_path: Any) -> None:
    """A value of 0 elsewhere hid it, and jitter was called dropout. The advice is followed."""
    make, named, advised = NAMED[kind]
    model = make().train()
    with pytest.warns(UserWarning, match="draw random numbers") as seen:
        HiddenCapture(model).record(KEEP, lambda: model(input_ids=IDS))
    (message,) = [str(w.message) for w in seen if "draw random" in str(w.message)]
    listed = re.search(r"\((.*?)\):", message)
    fields = re.search(r"from_pretrained\(\.\.\., (.*?)\)", message)
    assert listed is not None
    assert fields is not None
    assert named in listed[1].split(", ")
    assert advised in fields[1].split(", ")
    assert " = 0" not in listed[1].replace(" = 0.", "")
    model.save_pretrained(tmp_path)
    given = {name: float(v) for name, v in (f.split("=") for f in fields[1].split(", "))}
    quiet = type(model).from_pretrained(tmp_path, **given).train()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*random numbers")
        HiddenCapture(quiet).record(KEEP, lambda: quiet(input_ids=IDS))


@needs_transformers
def test_warning_without_a_field_that_could_be_set_to_0() -> None:
    model = noisy(lambda x, training: nn.functional.dropout(x, 0.3, training=training))
    with pytest.warns(UserWarning, match="No module or configuration has a dropout, jitter or"):
        HiddenCapture(model).record(KEEP, lambda: model(IDS))


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


def dropping_out_data_parallel(
    rank: int, sharded: bool = False, dropout: float = 0.5
) -> tuple[Tensor, Tensor]:
    """The second forward comes between the first and its backward."""
    model = tiny.model("Llama", attention_dropout=dropout)
    wanted = wanted_states(model.eval())
    if sharded:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (2,))
        for part in (*model.model.layers, model):
            fully_shard(part, mesh=mesh)
    else:
        model = nn.parallel.DistributedDataParallel(model)
    capture = HiddenCapture(model.train())
    for _ in range(2):
        output, recording = capture.record(KEEP, lambda: model(IDS))
        output[0].sum().backward()
        assert all(p.grad is not None for p in model.parameters())
    return wanted, recording.hidden


def dropping_out_sharded(rank: int) -> tuple[Tensor, Tensor]:
    return dropping_out_data_parallel(rank, sharded=True)


def compared_data_parallel(rank: int) -> tuple[Tensor, Tensor]:
    return dropping_out_data_parallel(rank, dropout=0.0)


def compared_sharded(rank: int) -> tuple[Tensor, Tensor]:
    return dropping_out_data_parallel(rank, sharded=True, dropout=0.0)


@needs_transformers
@pytest.mark.parametrize(
    "wrapped",
    [fully_sharded, data_parallel, dropping_out_data_parallel, dropping_out_sharded,
     compared_data_parallel, compared_sharded],
)  # fmt: skip
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


def language_model(kind: str) -> Any:
    """Three layers of a kind, made from its configuration."""
    import transformers

    own: dict[str, Any] = {
        "Gemma2": {"head_dim": 8, "sliding_window": 4},  # every other layer slides; embeddings are scaled
        "Mistral": {"sliding_window": 4},
        "Qwen2Moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8,
                     "shared_expert_intermediate_size": 8},
    }.get(kind, {})  # fmt: skip
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, bos_token_id=None, eos_token_id=1, pad_token_id=0, **own,
    )  # fmt: skip
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


@needs_transformers
@pytest.mark.parametrize("kind", ["Qwen2", "Llama", "Gemma", "Gemma2", "Mistral", "Qwen2Moe"])
def test_states_of_every_layer(kind: str) -> None:
    """Those that transformers returns, also where the LM head sees some positions only."""
    model = language_model(kind)
    captures = [HiddenCapture(model, layer=layer) for layer in range(-4, 4)]
    with torch.no_grad():
        states = model(IDS, output_hidden_states=True).hidden_states
        for options in ({}, {"logits_to_keep": 3}, {"logits_to_keep": torch.tensor([5, 8])}):
            with ExitStack() as stack:
                found = [stack.enter_context(capture.recording(KEEP)) for capture in captures]
                model(IDS, **options)
            assert len(states) == 4
            for recording, wanted in zip(found, states * 2, strict=True):
                assert torch.equal(recording.hidden, wanted[:, -4:][KEEP.bool()])
    assert not torch.equal(found[0].hidden, found[1].hidden)


@needs_transformers
@pytest.mark.parametrize("wrapper", ["compile", "checkpointing", "peft"])
def test_states_of_a_layer_under_wrappers(wrapper: str) -> None:
    model = language_model("Llama")
    with torch.no_grad():
        states = model(IDS, output_hidden_states=True).hidden_states
    if wrapper == "checkpointing":
        model.gradient_checkpointing_enable()
    if wrapper == "peft":
        peft = pytest.importorskip("peft", reason="peft is not installed")
        # adapters in another layer only: whether a pass is the reference's is not up to one layer
        model = peft.get_peft_model(
            model, peft.LoraConfig(target_modules=["q_proj"], layers_to_transform=[2])
        )
    captures = [HiddenCapture(model, layer=layer) for layer in (0, 1, -1)]
    if wrapper == "compile":
        model = torch.compile(model, backend="eager")
    model.train()
    for capture, wanted in zip(captures, (states[0], states[1], states[-1]), strict=True):
        output, recording = capture.record(KEEP, lambda: model(IDS))
        output.logits.sum().backward()  # a recomputed forward must not be recorded
        assert torch.equal(recording.hidden, wanted[:, -4:][KEEP.bool()])
        if wrapper == "peft":
            with model.disable_adapter(), capture.recording(KEEP[:0]) as recording:
                model(IDS)  # the reference's: not recorded
            assert len(recording.hidden) == 0


@needs_transformers
def test_refuses_layers() -> None:
    model = language_model("Llama")
    for layer in (4, -5):
        with pytest.raises(
            ValueError, match=rf"layer must be in \[-4, 3\] for 3 layers, got {layer}"
        ):
            HiddenCapture(model, layer=layer)
    for wrong in (True, 1.0, "last"):
        with pytest.raises(TypeError, match="layer must be an int, got"):
            HiddenCapture(model, layer=wrong)  # type: ignore[arg-type]
    plain = Plain()
    with pytest.raises(ValueError, match="layer must be -1 for Identity, in which no list of"):
        HiddenCapture(plain, backbone=plain.body, layer=0)
    last = HiddenCapture(model, backbone=model.model.layers[0])  # a layer as the backbone
    with torch.no_grad(), last.recording(KEEP) as recording:
        wanted = model(IDS, output_hidden_states=True).hidden_states[1]
    assert torch.equal(recording.hidden, wanted[:, -4:][KEEP.bool()])
