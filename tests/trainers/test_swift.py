"""SHEAR in ms-swift's own pipeline on the CPU: its arguments, models, templates, rollouts, training.

Stubbed: rollouts where several runs must have the same ones, the check that padding_free has flash
attention (transformers' own attention knows packed rows, too), and what the refusals need.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import ranks
import tiny
from shear_ops import HiddenBank, SpanConfig, span_weights

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # its imports use what torch deprecates
    pytest.importorskip(
        "swift.rlhf_trainers.grpo_trainer",
        reason="ms-swift is not installed (make trainer-swift makes an environment with it)",
    )
from swift.arguments import RLHFArguments
from swift.infer_engine import protocol
from swift.pipelines.train.rlhf import SwiftRLHF
from swift.rewards import ORM, orms
from swift.rlhf_trainers import GRPOTrainer
from swift.template import TemplateMeta, register_template
from swift.trainers import TrainerFactory

from shear_ops.integrations import swift as integration
from shear_ops.training.settings import RewardSettings, refuse

LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo")
SPANS = {"span": 4, "stride": 2, "tol": 1e-6, "n_iters": 2000}
OPTIONS = {
    "rlhf_type": "grpo", "model": "model", "model_type": "qwen2", "template": "tiny", "tuner_type": "full",
    "torch_dtype": "float32", "bf16": False, "fp16": False, "attn_impl": "eager", "dataset": "prompts.jsonl",
    "split_dataset_ratio": 0, "load_from_cache_file": False, "eval_strategy": "no", "external_plugins": "plugin.py",
    "reward_funcs": "correct", "num_generations": 4, "max_completion_length": 12, "beta": 0,
    "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "max_steps": 2, "learning_rate": 1e-2,
    "logging_steps": 1, "save_strategy": "no", "report_to": "none", "output_dir": "out", "add_version": False,
    "check_model": False, "use_cpu": True, "dataloader_num_workers": 0, "dataloader_pin_memory": False,
    "gradient_checkpointing": False, "seed": 1,
}  # fmt: skip
PLUGIN = """
from shear_ops.integrations.swift import register
register({settings})
"""
PLAIN = "swift.rlhf_trainers.GRPOTrainer"


class Correct(ORM):  # type: ignore[misc]
    """Whether the answer's digit occurs at all, as tiny.correct."""

    def __call__(self, completions: list[str], solution: list[str], **_: Any) -> list[float]:
        return [float(a in c) for c, a in zip(completions, solution, strict=True)]


class Short(ORM):  # type: ignore[misc]
    def __call__(self, completions: list[str], **_: Any) -> list[float]:
        return [0.6 * (len(c) < 8) for c in completions]


class Unsure(ORM):  # type: ignore[misc]
    """As Correct, None for completions with an odd number of letters."""

    def __call__(self, completions: list[str], solution: list[str], **_: Any) -> Any:
        pairs = zip(completions, solution, strict=True)
        return [None if len(c) % 2 else float(a in c) for c, a in pairs]


class Always(ORM):  # type: ignore[misc]
    def __call__(self, completions: list[str], **_: Any) -> list[float]:
        return [1.0] * len(completions)


orms.update(correct=Correct, short=Short, unsure=Unsure, always=Always)
register_template(
    TemplateMeta("tiny", prefix=[], prompt=["{{QUERY}} "], chat_sep=None, suffix=[["eos_token_id"]])
)


class Pipeline(SwiftRLHF):  # type: ignore[misc]
    """swift rlhf, up to the training."""

    def train(self, trainer: Any) -> Any:
        return trainer


def write_files(folder: Path) -> None:
    tiny.model().save_pretrained(folder / "model")
    tiny.tokenizer().save_pretrained(folder / "model")
    rows = [
        {"messages": [{"role": "user", "content": row["prompt"]}], "solution": row["answer"]}
        for row in tiny.prompts()
    ]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))


def command(**options: Any) -> list[str]:
    words = []
    for name, value in (OPTIONS | options).items():
        values = value if isinstance(value, (list, tuple)) else [value]
        words += [f"--{name}", *map(str, values)]
    return words


@pytest.fixture(autouse=True)
def work_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(TrainerFactory.TRAINER_MAPPING, "grpo", PLAIN)
    monkeypatch.setattr(integration.ShearGRPOTrainer, "shear_settings", RewardSettings())
    write_files(tmp_path)


def build(shear: bool | dict[str, Any] = True, **options: Any) -> Any:
    """The trainer that `swift rlhf` makes, with a plugin as a user writes it."""
    settings = {"spans": SPANS} | (shear if isinstance(shear, dict) else {})
    text = PLUGIN.format(settings=f"**{settings!r}") if shear else ""
    # ms-swift imports a plugin once per path
    name = f"plugin_{len(list(Path.cwd().glob('plugin_*')))}.py"
    Path(name).write_text(text)
    if not shear:
        TrainerFactory.TRAINER_MAPPING["grpo"] = PLAIN
    trainer = Pipeline(command(external_plugins=name, **options)).main()
    assert isinstance(trainer, integration.ShearMixin) == bool(shear)
    return trainer


def train(trainer: Any) -> Tensor:
    trainer.train()
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def logged(trainer: Any, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def force_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """All weights 1, whatever the states."""
    real = HiddenBank.finalize

    def finalize(*args: Any, **kwargs: Any) -> Any:
        found = real(*args, **kwargs)
        assert any(bool((row != 1).any()) for row in found.weights.values())  # not vacuous
        return found._replace(weights={k: torch.ones_like(w) for k, w in found.weights.items()})

    monkeypatch.setattr(HiddenBank, "finalize", finalize)


@pytest.mark.parametrize(
    "options",
    [*({"loss_type": loss_type} for loss_type in LOSSES),
     {"importance_sampling_level": "sequence_token"}, {"num_iterations": 2, "max_steps": 4},
     {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}, {"scale_rewards": "gdpo"},
     {"beta": 0.1}, {"advantage_estimator": "reinforce_plus_plus"}],
    ids=str,
)  # fmt: skip
def test_weights_of_one_change_nothing(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And others something: they reach the loss."""
    wanted = train(build(shear=False, **options))
    with monkeypatch.context() as patch:
        force_ones(patch)
        assert torch.equal(train(build(**options)), wanted)
    assert not torch.allclose(train(build(**options)), wanted, rtol=0, atol=1e-3)


def wanted_weights(
    trainer: Any, samples: list[Any], labels: list[int], size: int, align: str
) -> list[Tensor]:
    """Of each rollout's completion tokens, by one forward per rollout, and span_weights."""
    states, lengths = [], []
    for sample in samples:
        ids = torch.tensor(sample.encoded["input_ids"])
        (places,) = (torch.tensor(sample.encoded["labels"]) != -100).nonzero(as_tuple=True)
        with torch.no_grad():
            hidden = trainer.model(ids[None], output_hidden_states=True).hidden_states[-1][0]
        states.append(hidden[places - int(align == "predictor")])
        lengths.append(len(places))
    weights = span_weights(
        torch.cat(states), cu_seqlens=torch.tensor([0, *lengths]).cumsum(0),
        group_ids=[i // size for i in range(len(samples))], labels=labels, config=SpanConfig(**SPANS),
    )  # fmt: skip
    return list(weights.split(lengths))


def check(trainer: Any, label: Any, align: str = "token") -> list[Tensor]:
    """Compare the weighted advantages of every generation batch; return the weights seen."""
    seen: list[Tensor] = []
    real = trainer._postprocess_batch

    def postprocess_batch(samples: list[Any], encoded: list[Any]) -> None:
        real(samples, encoded)
        labels = [label(sample) for sample in samples]
        size = 4 if trainer.model.training else 2
        rows = [
            row[mask]
            for batch in (item["grpo_batch"] for item in encoded)
            for row, mask in zip(batch.advantages, batch.completion_mask, strict=True)
        ]
        wanted = wanted_weights(trainer, samples, labels, size, align)
        for sample, row, weights in zip(samples, rows, wanted, strict=True):
            torch.testing.assert_close(row, sample.advantages * weights, rtol=2e-3, atol=1e-6)
        seen.extend(wanted)

    trainer._postprocess_batch = postprocess_batch
    return seen


def correct(sample: Any) -> int:
    return int(sample.extra["solution"] in sample.messages[-1]["content"])


def varied(weights: list[Tensor]) -> bool:
    return any(bool((row != 1).any()) for row in weights)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # in our own forward
@pytest.mark.parametrize(
    "options",
    [{}, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
     {"per_device_train_batch_size": 4, "steps_per_generation": 2, "num_iterations": 2, "max_steps": 4},
     {"gradient_checkpointing": True}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("layout", ["padded", "padding_free"])
@pytest.mark.parametrize("align", ["token", "predictor"])
def test_weights_in_every_layout(
    options: dict[str, Any], layout: str, align: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RLHFArguments, "_check_padding_free", lambda self: None)
    trainer = build({"align": align}, padding_free=layout == "padding_free", **options)
    weights = check(trainer, correct, align=align)
    train(trainer)
    assert varied(weights)
    assert max(logged(trainer, "shear/weight_max")) == pytest.approx(
        max(float(row.max()) for row in weights), rel=2e-3
    )


def test_dynamic_sample() -> None:
    """Groups with rewards all equal are replaced by groups of other prompts before the pass."""
    trainer = build(dynamic_sample=True, max_steps=4, max_completion_length=4)
    weights = check(trainer, correct)
    scored = []
    real = trainer._compute_rewards_per_func
    trainer._compute_rewards_per_func = lambda samples: (scored.append(1), real(samples))[1]
    train(trainer)
    assert len(scored) > 4  # some were replaced
    assert varied(weights)


@pytest.mark.parametrize("tuner", ["full", "lora"])
def test_states_are_those_of_the_policy(tuner: str) -> None:
    """Where a reference runs, too: another model, or the same one with its adapters off."""
    options = {"tuner_type": tuner, "beta": 0.1, "lora_dropout": 0, "learning_rate": 0.1}
    trainer = build(**options)
    weights = check(trainer, correct)
    train(trainer)
    assert varied(weights)
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        policy = trainer.model(ids).logits
        if tuner == "full":
            reference = trainer.ref_model(ids).logits
        else:
            with trainer.model.disable_adapter():
                reference = trainer.model(ids).logits
    assert not torch.allclose(policy, reference, atol=1e-2)  # not vacuous


@pytest.mark.parametrize("correctness", ["unsure", 1])
def test_labels_come_from_the_named_function(correctness: str | int) -> None:
    def label(sample: Any) -> int:
        return -1 if len(sample.messages[-1]["content"]) % 2 else correct(sample)

    trainer = build({"correctness": correctness}, reward_funcs=["short", "unsure"])
    labels: list[int] = []
    weights = check(trainer, lambda sample: (labels.append(label(sample)), labels[-1])[1])
    train(trainer)
    assert {-1, 0, 1} == set(labels)
    assert varied(weights)


def test_overlong_filter_ignores_truncated_rollouts() -> None:
    trainer = build(overlong_filter=True)
    labels: list[int] = []

    def label(sample: Any) -> int:
        labels.append(-1 if sample.finish_reason == "length" else correct(sample))
        return labels[-1]

    weights = check(trainer, label)
    train(trainer)
    assert {-1, 0, 1} == set(labels)
    assert varied(weights)


def test_all_correct_is_plain_grpo() -> None:
    """Also where other rewards give advantages."""
    wanted = train(build(shear=False, reward_funcs=["always", "short"]))
    trainer = build({"correctness": "always"}, reward_funcs=["always", "short"])
    assert torch.equal(train(trainer), wanted)
    assert not torch.equal(wanted, torch.cat([p.flatten() for p in tiny.model().parameters()]))
    assert logged(trainer, "shear/mixed_groups") == [0, 0]


def test_evaluation() -> None:
    trainer = build(
        split_dataset_ratio=0.5, eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=4,
        num_generations_eval=2,
    )  # fmt: skip
    weights = check(trainer, correct)
    train(trainer)
    assert varied(weights)
    assert max(logged(trainer, "eval_shear/weight_max")) > 1
    assert all(torch.isfinite(torch.tensor(logged(trainer, "eval_loss"))))


def test_weighting_takes_the_optimizer_step() -> None:
    trainer = build({"weighting": {"mean_one": True, "warmup_steps": 2}}, max_steps=4)
    train(trainer)
    highest = logged(trainer, "shear/weight_max")
    assert highest[0] == 1
    assert max(highest[1:]) > 1


def given_rollouts(trainer: Any, first: int = 0) -> None:
    """Rollouts by place and step, with two tokens of a tool in the middle of every third one."""
    steps = iter(range(100))

    def rollout(samples: list[Any], *_: Any) -> list[Any]:
        step, made = next(steps), []
        for row in range(first, first + len(samples)):
            generator = torch.Generator().manual_seed(100 * step + row)
            ids = torch.randint(3, 20, (6 + row % 5,), generator=generator).tolist()
            mask = [1] * len(ids)
            if row % 3 == 0:
                mask[2:4] = [0, 0]
            text = trainer.processing_class.decode(ids)
            choice = protocol.ChatCompletionResponseChoice(
                0, protocol.ChatMessage("assistant", text), "stop", token_ids=ids
            )
            response = protocol.ChatCompletionResponse("", [choice], protocol.UsageInfo(0, 0, 0))
            made.append(
                protocol.RolloutOutput(
                    response=response, response_token_ids=[ids], response_loss_mask=[mask]
                )
            )
        return made

    trainer._rollout = rollout


@pytest.mark.parametrize("layout", ["padded", "padding_free"])
def test_tokens_of_tools_take_no_part(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RLHFArguments, "_check_padding_free", lambda self: None)
    trainer = build(padding_free=layout == "padding_free")
    given_rollouts(trainer)
    holes = []

    def label(sample: Any) -> int:
        masked = [token == -100 for token in sample.encoded["labels"]]
        holes.append(any(masked[masked.index(False) :]))
        return correct(sample)

    weights = check(trainer, label)
    train(trainer)
    assert {True, False} == set(holes)
    assert varied(weights)


def train_on_ranks(rank: int, size: int, folder: str) -> tuple[Tensor, list[Tensor], list[float]]:
    """Twelve given rollouts in groups of 4: with two ranks, group 1 straddles them."""
    os.chdir(folder)
    each = 12 // size
    Path(f"rank_{size}_{rank}").mkdir()
    trainer = Pipeline(
        command(
            external_plugins="shear.py", per_device_train_batch_size=each // 2, gradient_accumulation_steps=2,
            optim="sgd", learning_rate=0.5, output_dir=f"rank_{size}_{rank}", ddp_find_unused_parameters=False,
        )
    ).main()  # fmt: skip
    given_rollouts(trainer, rank * each)
    weights: list[Tensor] = []
    real = HiddenBank.finalize

    def finalize(*args: Any, **kwargs: Any) -> Any:
        found = real(*args, **kwargs)
        weights.append(torch.cat(list(found.weights.values())))
        return found

    HiddenBank.finalize = finalize  # type: ignore[method-assign]
    try:
        return train(trainer), weights, logged(trainer, "shear/mixed_groups")
    finally:
        HiddenBank.finalize = real  # type: ignore[method-assign]


def test_two_ranks_equal_one(tmp_path: Path) -> None:
    (tmp_path / "shear.py").write_text(PLUGIN.format(settings=f"spans={SPANS!r}"))
    wanted, whole, mixed = train_on_ranks(0, 1, str(tmp_path))
    first, second = ranks.run(2, train_on_ranks, 2, str(tmp_path))
    assert max(mixed) > 0
    assert first[2] == second[2] == mixed
    assert torch.equal(first[0], second[0])
    for step in range(2):
        both = torch.cat([first[1][step], second[1][step]])
        torch.testing.assert_close(both, whole[step], rtol=1e-4, atol=1e-6)
        assert bool((both != 1).any())
    torch.testing.assert_close(first[0], wanted, rtol=1e-3, atol=1e-5)


def test_the_command(tmp_path: Path) -> None:
    """`swift rlhf` on two processes, with all that it needs in one plugin."""
    text = (
        "from swift.rewards import ORM, orms\nfrom swift.template import TemplateMeta, register_template\n"
        "class Correct(ORM):\n"
        "    def __call__(self, completions, solution, **_):\n"
        "        return [float(a in c) for c, a in zip(completions, solution)]\n"
        "orms['correct'] = Correct\n"
        "register_template(TemplateMeta('tiny', prefix=[], prompt=['{{QUERY}} '], chat_sep=None,"
        " suffix=[['eos_token_id']]))\n"
    )
    (tmp_path / "shear.py").write_text(text + PLUGIN.format(settings="correctness='correct'"))
    swift = Path(sys.executable).with_name("swift")
    words = [
        str(swift),
        "rlhf",
        *command(
            external_plugins="shear.py", per_device_train_batch_size=4, dataloader_num_workers=1
        ),
    ]
    ended = subprocess.run(
        words, env=os.environ | {"NPROC_PER_NODE": "2", "MASTER_PORT": "29512"},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    lines = (tmp_path / "out" / "logging.jsonl").read_text().splitlines()
    steps = [entry for entry in map(json.loads, lines) if "shear/weight_max" in entry]
    assert len(steps) == 2
    assert max(float(step["shear/weight_max"]) for step in steps) > 1


@pytest.mark.parametrize(
    ("options", "apply", "message"),
    [
        (
            {"importance_sampling_level": "sequence"}, "advantages",
            "importance_sampling_level must be 'token'",
        ),
        ({"loss_type": "real"}, "auto", "loss_type must be 'grpo' or"),
        ({"advantage_reweight": "rlsd"}, "auto", "advantage_reweight must be None"),
        (
            {"reward_funcs": ["correct", "short"]}, "auto",
            r"2 functions \(correct, short\): say which",
        ),
    ],
)  # fmt: skip
def test_refuses(options: dict[str, Any], apply: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build({"apply": apply}, **options)


@pytest.mark.parametrize(
    ("name", "value"),
    [("use_liger_kernel", True), ("sequence_parallel_size", 2), ("deepspeed_autotp_size", 4),
     ("teacher_model", object()), ("teacher_model_server", "http://localhost"),
     ("teacher_use_disable_adapter", True)],
)  # fmt: skip
def test_refuses_what_needs_more_than_a_cpu(name: str, value: Any) -> None:
    args = {
        "use_liger_kernel": False, "importance_sampling_level": "token", "loss_type": "grpo",
        "advantage_reweight": None, "deepspeed": None,
    }  # fmt: skip
    template, kwargs = SimpleNamespace(sequence_parallel_size=1), {}
    refuse(integration.refusals(SimpleNamespace(**args), template, {}, "advantages"))
    if name == "deepspeed_autotp_size":
        args["deepspeed"] = {"tensor_parallel": {"autotp_size": value}}
    elif name in args:
        args[name] = value
    elif name == "sequence_parallel_size":
        template.sequence_parallel_size = value
    else:
        kwargs[name] = value
    with pytest.raises(ValueError, match=f"^{name} must be .* with SHEAR, got "):
        refuse(integration.refusals(SimpleNamespace(**args), template, kwargs, "advantages"))


def test_refuses_samples_that_have_no_correctness_of_their_own() -> None:
    trainer = build()
    trainer.dynamic_num_samples = True
    with pytest.raises(ValueError, match="multi_turn_scheduler must make one sample"):
        trainer._prepare_batch_inputs([])


def test_refuses_a_teachers_prompt() -> None:
    path = Path("prompts.jsonl")
    rows = [json.loads(line) | {"teacher_prompt": "1"} for line in path.read_text().splitlines()]
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match="no column teacher_prompt"):
        train(build())


def test_refuses_wrong_settings() -> None:
    with pytest.raises(ValueError, match=r"shear.\* must be among threshold, .*, got treshold"):
        integration.register(treshold=1)
    with pytest.raises(ValueError, match="span must be in"):
        integration.register(spans={"span": 0})
    assert TrainerFactory.TRAINER_MAPPING["grpo"] == PLAIN


def test_refuses_other_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integration.swift, "__version__", "4.5.2")
    with pytest.raises(RuntimeError, match=r"ms-swift must be 4\.6 or later, got 4\.5\.2"):
        integration.register()


def test_a_trainer_that_makes_no_pass() -> None:
    trainer = build()
    trainer._prepare_batch_inputs = lambda samples: GRPOTrainer._prepare_batch_inputs(
        trainer, samples
    )
    with pytest.raises(RuntimeError, match="states of 0 rollouts, wanted 8"):
        train(trainer)
