"""slime's two hooks around Megatron's real GPTModel, pipeline schedule and process groups on the CPU.

Stubbed: slime itself, which is no package (its part of a step is written again in Rank, from its
contract); the random states and devices of a GPU. Attention over packed samples and over
context-parallel ranks needs Transformer Engine: here a mask keeps samples apart, and where samples are
spread over ranks every token attends to itself alone.
"""

from __future__ import annotations

import contextlib
import re
import sys
import warnings
import zlib
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import ranks
from shear_ops import SpanConfig, span_weights

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Megatron misses Apex and Transformer Engine
    pytest.importorskip(
        "megatron.core.models.gpt.gpt_layer_specs",
        reason="megatron-core is not installed (make trainer-slime makes an environment with it)",
    )
from megatron.core import mpu
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import random as megatron_random
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.torch_norm import WrappedTorchNorm


def get_grpo_returns(rewards: Tensor, kl: list[Tensor]) -> list[Tensor]:
    return [reward.expand_as(row) for reward, row in zip(rewards, kl, strict=True)]


for name in ("slime", "slime.utils", "slime.utils.ppo_utils"):
    sys.modules.setdefault(name, ModuleType(name))
sys.modules["slime.utils.ppo_utils"].get_grpo_returns = get_grpo_returns

from shear_ops.integrations import slime as integration  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
DIM, VOCABULARY, GROUP = 16, 32, 4
SPANS = {"span": 4, "stride": 2}
SLIME = {
    "advantage_estimator": "grpo", "normalize_advantages": False, "use_rollout_logprobs": False,
    "get_mismatch_metrics": False, "n_samples_per_prompt": GROUP, "sequence_parallel": False,
    "allgather_cp": False, "data_source_path": "slime.rollout.data_source.RolloutDataSource",
}  # fmt: skip


class Layout(NamedTuple):
    """Sizes of the parallel dimensions; what is left of the ranks is data-parallel."""

    tensor: int = 1
    context: int = 1
    pipeline: int = 1
    sequence_parallel: bool = False
    contiguous: bool = False


LAYOUTS = {
    "data": Layout(),
    "tensor": Layout(tensor=2),
    "sequence": Layout(tensor=2, sequence_parallel=True),
    "all ranks are replicas": Layout(tensor=4),
    "pipeline": Layout(pipeline=2),
    "pipeline and sequence": Layout(pipeline=2, tensor=2, sequence_parallel=True),
    "context": Layout(context=2),
    "context, contiguous": Layout(context=2, contiguous=True),
    "context and sequence": Layout(context=2, tensor=2, sequence_parallel=True),
    "contiguous and sequence": Layout(context=2, tensor=2, sequence_parallel=True, contiguous=True),
}


def arguments(**changes: Any) -> SimpleNamespace:
    return SimpleNamespace(**{**SLIME, "shear": {"threshold": 0.5, "spans": SPANS}, **changes})


def samples() -> dict[str, list[Any]]:
    """Three groups of four: two mixed, one all correct; in the order in which slime has them."""
    generator = torch.Generator().manual_seed(3)

    def integers(low: int, high: int, size: int) -> Tensor:
        return torch.randint(low, high, (size,), generator=generator)

    lengths = integers(5, 21, 12).tolist()
    prompts = [integers(0, VOCABULARY, 3 + group) for group in range(3)]
    tokens = [
        torch.cat([prompts[i // GROUP], integers(0, VOCABULARY, n)]) for i, n in enumerate(lengths)
    ]
    masks = [torch.ones(n, dtype=torch.int) for n in lengths]
    masks[1][1:4] = 0  # the answer of a tool
    masks[2][:] = 0  # remove_sample
    return {
        "tokens": tokens,
        "total_lengths": [len(row) for row in tokens],
        "response_lengths": lengths,
        "loss_masks": masks,
        "rewards": torch.randn(12, generator=generator).tolist(),
        "raw_reward": [1.0, 0, 1, 0, 1, 1, 1, 1, None, 0.2, 0.5, float("nan")],
        "truncated": [0, 1] * 6,
        "sample_indices": list(range(40, 52)),
    }


LABELS = [1, 0, 1, 0, 1, 1, 1, 1, -1, 0, 1, -1]


class OnCPU(TorchFunctionMode):
    """What Megatron wants on a GPU, on the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if "cuda" in str(kwargs.get("device", "")):
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


class Tracker:
    """Megatron's random states of a GPU; nothing is random here."""

    def fork(self, *args: Any) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def is_initialized(self) -> bool:
        return True


@contextlib.contextmanager
def parallel(layout: Layout) -> Iterator[None]:
    """Megatron's process groups on gloo."""
    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.cuda.synchronize = lambda *args: None
    megatron_random._CUDA_RNG_STATE_TRACKER = Tracker()
    megatron_random._CUDA_RNG_STATE_TRACKER_INITIALIZED = True
    # the original asserts that there is no sequence parallelism, which matters to gradients alone
    WrappedTorchNorm.__new__ = lambda cls, config, hidden_size, eps: nn.RMSNorm(hidden_size, eps)
    mpu.initialize_model_parallel(
        layout.tensor, layout.pipeline, context_parallel_size=layout.context
    )
    with OnCPU():
        yield
    mpu.destroy_model_parallel()


class Wrapper(nn.Module):
    """As DDP and Float16Module wrap a model."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.config = module.config

    def set_input_tensor(self, tensor: Any) -> None:
        self.module.set_input_tensor(tensor)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


def model(layout: Layout) -> nn.Module:
    """A rank's part of one and the same model."""
    config = TransformerConfig(
        num_layers=2, hidden_size=DIM, num_attention_heads=4, use_cpu_initialization=True,
        attention_dropout=0.0, hidden_dropout=0.0, normalization="RMSNorm", add_bias_linear=False,
        masked_softmax_fusion=False, bias_dropout_fusion=False, apply_rope_fusion=False,
        tensor_model_parallel_size=layout.tensor, pipeline_model_parallel_size=layout.pipeline,
        sequence_parallel=layout.sequence_parallel, pipeline_dtype=torch.float32,
        variable_seq_lengths=True, batch_p2p_comm=False, moe_token_dispatcher_type="alltoall",
    )  # fmt: skip
    made = GPTModel(
        config, get_gpt_layer_local_spec(normalization="RMSNorm"), vocab_size=VOCABULARY,
        max_sequence_length=512, share_embeddings_and_output_weights=False,
        position_embedding_type="none" if layout.context > 1 else "rope",
        pre_process=mpu.is_pipeline_first_stage(), post_process=mpu.is_pipeline_last_stage(),
    )  # fmt: skip
    rank = mpu.get_tensor_model_parallel_rank()
    first_layer = mpu.get_pipeline_model_parallel_rank() * 2 // layout.pipeline
    for name, parameter in made.named_parameters():
        if found := re.search(r"layers\.(\d+)", name):
            name = name.replace(found[0], f"layers.{int(found[1]) + first_layer}")
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        shape, dim = list(parameter.shape), getattr(parameter, "partition_dim", -1)
        if dim < 0 or layout.tensor == 1:
            values = torch.randn(shape, generator=generator)
        else:
            shape[dim] *= layout.tensor
            values = torch.randn(shape, generator=generator).chunk(layout.tensor, dim)[rank]
        parameter.data.copy_(values * 0.3 + (parameter.dim() == 1))
    return Wrapper(made).eval()


def zigzag(stream: Tensor, ranks: int, rank: int, fill: float) -> Tensor:
    """What a context-parallel rank has of a sample."""
    chunk = -(-len(stream) // (2 * ranks))
    padded = torch.full((2 * ranks * chunk,), fill, dtype=stream.dtype)
    padded[: len(stream)] = stream
    chunks = padded.split(chunk)
    return torch.cat([chunks[rank], chunks[2 * ranks - 1 - rank]])


def own(values: Tensor, total: int, ranks: int, rank: int) -> Tensor:
    """What a context-parallel rank has of a response's values, by the logits that predict them."""
    stream = torch.full((total,), torch.nan)
    stream[total - len(values) - 1 : total - 1] = values
    part = zigzag(stream, ranks, rank, torch.nan) if ranks > 1 else stream
    return part[~part.isnan()]


class Rank:
    """slime's part of a training step on one rank."""

    def __init__(self, layout: Layout, **changes: Any) -> None:
        self.layout = layout
        self.args = arguments(
            sequence_parallel=layout.sequence_parallel, allgather_cp=layout.contiguous, **changes
        )
        self.model = [model(layout)]

    def data(self) -> dict[str, Any]:
        """This rank's rollouts, in micro-batches that take them in another order."""
        data, size = samples(), mpu.get_data_parallel_world_size()
        order = torch.randperm(12, generator=torch.Generator().manual_seed(4)).tolist()
        partition = order[mpu.get_data_parallel_rank() :: size]
        local = {k: [v[i] for i in partition] for k, v in data.items() if k != "raw_reward"}
        places = [1, 2, 0, *reversed(range(3, len(partition)))]
        schedule = [places[:1], *(places[i : i + 2] for i in range(1, len(places), 2))]
        return {
            **local, "raw_reward": data["raw_reward"], "partition": partition,
            "micro_batch_indices": schedule, "num_microbatches": [1, len(schedule) - 1],
        }  # fmt: skip

    def log_probs(self, data: dict[str, Any], prefix: str) -> None:
        """One pass, through Megatron's own schedule."""
        integration.before_log_prob(self.args, self.model, prefix)
        self.forward(data)

    def forward(self, data: dict[str, Any]) -> None:
        remaining = iter(data["micro_batch_indices"])

        def step(iterator: Any, chunk: nn.Module) -> Any:
            output = chunk(**self.batch([data["tokens"][i] for i in next(iterator)]))
            return output, lambda logits, non_loss_data=False: (logits.sum(), {})

        with torch.no_grad():
            for count in data["num_microbatches"]:
                get_forward_backward_func()(
                    forward_step_func=step, data_iterator=remaining, model=self.model,
                    num_microbatches=count, seq_length=512, micro_batch_size=1, forward_only=True,
                )  # fmt: skip

    def batch(self, tokens: list[Tensor]) -> dict[str, Any]:
        size, rank = mpu.get_context_parallel_world_size(), mpu.get_context_parallel_rank()
        if size > 1 and not self.layout.contiguous:
            tokens = [zigzag(row, size, rank, 0) for row in tokens]
        stream = torch.cat(tokens)
        multiple = 8 * self.layout.tensor * (size if self.layout.contiguous else 1)
        stream = torch.nn.functional.pad(stream, (0, -len(stream) % multiple))
        owner = torch.full((len(stream),), -1)
        owner[: sum(len(row) for row in tokens)] = torch.cat(
            [torch.full((len(row),), i) for i, row in enumerate(tokens)]
        )
        if self.layout.contiguous:
            stream, owner = stream.chunk(size)[rank], owner.chunk(size)[rank]
        seen = (owner[:, None] == owner).tril()
        if size > 1:
            seen = torch.eye(len(stream), dtype=torch.bool)
        return {
            "input_ids": stream[None], "position_ids": None, "labels": None,
            "attention_mask": ~seen[None, None], "packed_seq_params": None,
        }  # fmt: skip

    def advantages(self, data: dict[str, Any]) -> None:
        """compute_advantages_and_returns: nothing but on the last stage."""
        if not mpu.is_pipeline_last_stage():
            return
        size, rank = mpu.get_context_parallel_world_size(), mpu.get_context_parallel_rank()
        lengths = zip(data["response_lengths"], data["total_lengths"], strict=True)
        data["kl"] = [own(torch.zeros(n), total, size, rank) for n, total in lengths]
        integration.advantages(self.args, data)

    def step(self) -> dict[str, Any]:
        data = self.data()
        for prefix in ("ref_", ""):
            self.log_probs(data, prefix)
        self.advantages(data)
        self.forward(data)  # training: not recorded
        assert integration._recorder.states == []
        return data


def wanted(layout: Layout, align: str = "token", weighting: Any = None) -> list[Tensor]:
    """Weights of all responses by one forward per rollout and span_weights; in one process."""
    data, single = samples(), layout._replace(tensor=1, pipeline=1, sequence_parallel=False)
    rank = Rank(single._replace(context=1, contiguous=False))
    rank.model = [model(single)]
    outputs: list[Tensor] = []
    norm = rank.model[0].module.decoder.final_layernorm
    norm.register_forward_hook(lambda module, args, output: outputs.append(output[:, 0]))
    rows = []
    for tokens, mask in zip(data["tokens"], data["loss_masks"], strict=True):
        seen = torch.ones(len(tokens), len(tokens), dtype=torch.bool).tril()
        if layout.context > 1:
            seen = torch.eye(len(tokens), dtype=torch.bool)
        with torch.no_grad():
            rank.model[0](
                input_ids=tokens[None], position_ids=None, attention_mask=~seen[None, None]
            )
        last = len(tokens) - (align == "predictor")
        rows.append(outputs.pop()[last - len(mask) : last][mask.bool()])
    lengths = [len(row) for row in rows]
    weights = span_weights(
        torch.cat(rows), cu_seqlens=torch.tensor([0, *lengths]).cumsum(0),
        group_ids=[i // GROUP for i in range(12)], labels=LABELS, config=SpanConfig(**SPANS),
    ).split(lengths)  # fmt: skip
    found = [torch.ones(len(mask)) for mask in data["loss_masks"]]
    for row, mask, values in zip(found, data["loss_masks"], weights, strict=True):
        row[mask.bool()] = values
    return found


def run_layouts(rank: int) -> dict[str, Any]:
    results = {}
    for name, layout in LAYOUTS.items():
        integration._recorder = integration._Recorder()  # as in a new process
        with parallel(layout):
            data = Rank(layout).step()
            where = (mpu.is_pipeline_last_stage(), mpu.get_context_parallel_rank())
            results[name] = (*where, data)
    return results


@pytest.fixture(scope="module")
def steps() -> list[dict[str, Any]]:
    results = ranks.run(4, run_layouts)
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results


@pytest.fixture
def one_process(tmp_path: Any) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    with parallel(Layout()):
        yield
    dist.destroy_process_group()


@pytest.mark.parametrize("name", LAYOUTS)
def test_weights_in_every_layout(name: str, steps: list[dict[str, Any]], one_process: None) -> None:
    layout, expected, seen = LAYOUTS[name], wanted(LAYOUTS[name]), {}
    assert any(bool((row - 1).abs().max() > 0.1) for row in expected)  # not vacuous
    for last, context, data in (result[name] for result in steps):
        if not last:
            assert "advantages" not in data
            continue
        for place, sample in enumerate(data["partition"]):
            found = {key: data[key][place] for key in ("shear_weights", "advantages", "returns")}
            total = data["total_lengths"][place]
            weights = own(expected[sample], total, layout.context, context)
            torch.testing.assert_close(found["shear_weights"], weights, rtol=2e-3, atol=1e-6)
            assert torch.equal(found["returns"], torch.full_like(weights, data["rewards"][place]))
            assert torch.equal(found["advantages"], found["returns"] * found["shear_weights"])
            replica = seen.setdefault((sample, context), found["advantages"])
            assert torch.equal(found["advantages"], replica)  # bit for bit
    assert {sample for sample, _ in seen} == set(range(12))


@pytest.mark.parametrize("align", ["token", "predictor"])
def test_alignment(align: str, one_process: None) -> None:
    rank = Rank(Layout(), shear={"align": align, "spans": SPANS})
    data, expected = rank.step(), wanted(Layout(), align)
    assert data["shear_stopped"] == [0] * len(data["partition"])
    for sample, found in zip(data["partition"], data["shear_weights"], strict=True):
        torch.testing.assert_close(found, expected[sample], rtol=2e-3, atol=1e-6)


def test_without_a_section(one_process: None) -> None:
    rank = Rank(Layout())
    del rank.args.shear
    assert integration.check(rank.args) == integration.Settings()
    assert all(bool(row.isfinite().all()) for row in rank.step()["advantages"])


def test_warmup_counts_optimizer_steps(one_process: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integration._recorder, "steps", 0)
    rank = Rank(Layout(), shear={"spans": SPANS, "weighting": {"warmup_steps": 4}})
    steps = [torch.cat(rank.step()["shear_weights"]) for _ in range(3)]  # of two updates each
    assert bool((steps[0] == 1).all())
    torch.testing.assert_close(steps[1] - 1, (steps[2] - 1) / 2)
    assert bool((steps[2] != 1).any())


def test_all_correct_is_plain_grpo(one_process: None) -> None:
    rank = Rank(Layout())
    data = rank.data()
    data["raw_reward"] = [1.0] * 12
    rank.log_probs(data, "")
    rank.advantages(data)
    for advantages, returns in zip(data["advantages"], data["returns"], strict=True):
        assert torch.equal(advantages, returns)


def test_bits_of_the_pass_do_not_change(one_process: None) -> None:
    """Recording must not touch the logits; a pass of another model ends it."""
    rank = Rank(Layout())
    data = rank.data()
    batch = rank.batch(data["tokens"])
    with torch.no_grad():
        plain = rank.model[0](**batch)
        integration.before_log_prob(rank.args, rank.model, "")
        assert torch.equal(rank.model[0](**batch), plain)
        assert len(integration._recorder.states) == 1
        integration.before_log_prob(rank.args, rank.model, "ref_")
        rank.model[0](**batch)
    assert len(integration._recorder.states) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"advantage_estimator": "gspo"}, "--advantage-estimator must be grpo or cispo, got gspo"),
        ({"advantage_estimator": "ppo"}, "--advantage-estimator must be grpo or cispo, got ppo"),
        ({"normalize_advantages": True}, "--normalize-advantages must be off, got on"),
        ({"use_rollout_logprobs": True}, "--use-rollout-logprobs must be off, got on"),
        ({"qkv_format": "bshd"}, "--qkv-format must be thd, got bshd"),
        (
            {"release_train": True, "shear": {"weighting": {"warmup_steps": 3}}},
            "warmup_steps must be 0 with --release-train, got 3",
        ),
        ({"shear": {"treshold": 1}}, "must be among threshold, align, spans, weighting, apply"),
        ({"shear": {"spans": {"span": 0}}}, "span must be in"),
        ({"shear": {"apply": "gradient"}}, "apply must be auto or advantages, got gradient: slime"),
        ({"shear": 0.5}, "shear must be a section of --custom-config-path, got 0.5"),
    ],
)
def test_refuses(change: dict[str, Any], message: str) -> None:
    args = arguments(**change)
    for call in (
        lambda: integration.check(args),
        lambda: integration.before_log_prob(args, [], ""),
        lambda: integration.advantages(args, {}),
    ):
        with pytest.raises((TypeError, ValueError)) as raised:
            call()
        assert message in str(raised.value)


def test_takes() -> None:
    for change in (
        {"advantage_estimator": "cispo"},
        {"use_rollout_logprobs": True, "get_mismatch_metrics": True},
        {"shear": None},
    ):
        integration.check(arguments(**change))


def test_refuses_data(one_process: None) -> None:
    rank = Rank(Layout())

    def raises(kind: type[Exception], message: str, **changes: Any) -> None:
        data = rank.data()
        rank.log_probs(data, "")
        with pytest.raises(kind, match=message):
            rank.advantages({**data, **changes})

    raises(TypeError, r"raw_reward must be a number .*, got {'a': 1}", raw_reward=[{"a": 1}] * 12)
    without = {k: v for k, v in rank.data().items() if k != "partition"} | {"kl": []}
    with pytest.raises(ValueError, match="rollout_data must have partition: update slime"):
        integration.advantages(rank.args, without)
    raises(TypeError, "sample_indices must be integers, got None", sample_indices=[None] * 12)
    rank.args.data_source_path = "mine.Source"
    shifted = [index + 1 for index in rank.data()["sample_indices"]]
    raises(ValueError, "--data-source-path must number .* got mine.Source", sample_indices=shifted)
    data = rank.step()  # numbered as slime's
    with pytest.raises(RuntimeError, match=r"must have 7 micro-batches, got 0: slime skips it"):
        rank.advantages(data)
    with pytest.raises(ValueError, match=r"must have decoder.final_layernorm .*, got Linear"):
        integration.before_log_prob(rank.args, [nn.Linear(1, 1)], "")
