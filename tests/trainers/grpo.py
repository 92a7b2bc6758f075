"""Small trainings with trl's real GRPOTrainer, alone or on several ranks."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from trl import GRPOConfig, GRPOTrainer

import ranks
import tiny
from shear_ops import SpanConfig, distributed
from shear_ops.integrations.trl import ShearConfig, ShearGRPOTrainer

SPANS = SpanConfig(span=4, stride=2)
EXACT = SpanConfig(span=4, stride=2, tol=1e-6, n_iters=2000)  # last bits do not change iterations
ROLLOUTS, GROUP, STEPS = 12, 4, 2  # with two ranks, group 1 straddles them


def build(
    cls: Any,
    mode: str = "auto",
    *,
    model: Any = None,
    rewards: Any = None,
    shear: Any = None,
    peft: Any = None,
    processor: Any = None,
    prompts: Any = None,
    **config: Any,
) -> Any:
    arguments = {
        "per_device_train_batch_size": 8, "num_generations": GROUP, "max_completion_length": 12, "max_steps": STEPS,
        "learning_rate": 1e-2, "logging_steps": 1, "gradient_accumulation_steps": 1, "seed": 1,
        "bf16": False, **config,
    }  # fmt: skip
    args = GRPOConfig(
        "out",
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        **arguments,
    )
    keywords: dict[str, Any] = {"peft_config": peft} if peft is not None else {}
    if cls is not GRPOTrainer:
        keywords["shear_config"] = shear or ShearConfig(mode=mode, spans=SPANS)
    return cls(
        model=tiny.model() if model is None else model,
        processing_class=tiny.tokenizer() if processor is None else processor,
        reward_funcs=tiny.correct if rewards is None else rewards,
        args=args, train_dataset=tiny.prompts() if prompts is None else prompts, **keywords,
    )  # fmt: skip


def whole(parameter: Tensor) -> Tensor:
    """A parameter, also where a rank holds a part of it."""
    if hasattr(parameter, "ds_id"):  # ZeRO-3
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()
    parameter = parameter.detach()
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter  # FSDP2


def train(trainer: Any) -> Tensor:
    trainer.train()
    return torch.cat([whole(p).flatten() for p in trainer.model.parameters()])


def logged(trainer: Any, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def completion(step: int, row: int) -> list[int]:
    """Tokens of a rollout, 4 to 12, fewer in later rows: ranks pad to other lengths."""
    generator = torch.Generator().manual_seed(100 * step + row)
    return torch.randint(3, 20, (max(4, 12 - row),), generator=generator).tolist()  # type: ignore[no-any-return]


def give_completions(trainer: Any, first: int = 0) -> None:
    """Let the model of a trainer 'generate' completion(step, first), (step, first + 1), ..."""
    steps = iter(range(100))

    def generate(input_ids: Tensor, **_: Any) -> Tensor:
        step = next(steps)
        made = [torch.tensor(completion(step, first + row)) for row in range(len(input_ids))]
        ended = [torch.cat([tokens, torch.tensor([1])]) for tokens in made]
        padded = torch.nn.utils.rnn.pad_sequence(ended, batch_first=True)
        return torch.cat([input_ids, padded], 1)

    trainer.model.generate = generate


class Run(NamedTuple):
    """What a training left: states and weights by step and row of the generation batch."""

    parameters: Tensor
    states: list[dict[int, Tensor]]
    weights: list[dict[int, Tensor]]
    mixed_groups: list[float]
    trainer: tuple[str, ...]  # what the model was wrapped in


def train_given(rank: int, size: int, folder: str, mode: str = "score", **config: Any) -> Run:
    """Train on given rollouts; this rank has ROLLOUTS / size of them."""
    os.chdir(folder)
    share = ROLLOUTS // size
    trainer = build(
        ShearGRPOTrainer,
        shear=ShearConfig(mode=mode, spans=EXACT),
        per_device_train_batch_size=share,
        optim="sgd",
        learning_rate=0.5,
        **config,
    )
    give_completions(trainer, rank * share)
    states: list[dict[int, Tensor]] = []
    weights: list[dict[int, Tensor]] = []
    real = distributed.span_weights

    def span_weights(hidden: Tensor, **kwargs: Any) -> Any:
        found = real(hidden, **kwargs)
        rows = [sample % ROLLOUTS for sample in kwargs["sample_ids"]]
        lengths = kwargs["cu_seqlens"].diff().tolist()
        states.append(dict(zip(rows, torch.split(hidden, lengths), strict=True)))
        weights.append(dict(zip(rows, torch.split(found.weights, lengths), strict=True)))
        return found

    distributed.span_weights = span_weights
    try:
        parameters = train(trainer)
    finally:
        distributed.span_weights = real
    kinds = (type(trainer.model_wrapped).__name__, trainer.accelerator.distributed_type.value)
    return Run(parameters, states, weights, logged(trainer, "shear/mixed_groups"), kinds)


def train_each(
    rank: int, size: int, folder: str, prepare: Callable[[], None] | None, runs: list[Any]
) -> list[Run]:
    """train_given once for each (mode, options) of runs, after prepare()."""
    if prepare is not None:
        prepare()
    return [train_given(rank, size, folder, mode, **options()) for mode, options in runs]


def on_one_and_two_ranks(
    folder: Path, one: list[Any], two: list[Any], prepare: Callable[[], None] | None = None
) -> Iterator[tuple[Run, list[Run]]]:
    """The runs of one process, each with those of two ranks; prepare is for the ranks."""
    alone = train_each(0, 1, str(folder), None, one)
    results = ranks.run(2, train_each, 2, str(folder), prepare, two)
    for result in results:
        if isinstance(result, Exception):
            raise result
    return zip(alone, map(list, zip(*results, strict=True)), strict=True)


def assert_equal_runs(alone: Run, runs: list[Run]) -> None:
    """States, weights and parameters of several ranks are those of one process."""
    for run in runs:
        assert run.mixed_groups == alone.mixed_groups
        assert torch.equal(run.parameters, runs[0].parameters)
    assert max(alone.mixed_groups) > 0
    for step in range(STEPS):
        for name, atol in (("states", 1e-5), ("weights", 5e-6)):
            found: dict[int, Tensor] = {}
            for run in runs:
                found |= getattr(run, name)[step]
            wanted = getattr(alone, name)[step]
            assert found.keys() == wanted.keys() == set(range(ROLLOUTS))
            for row in wanted:
                torch.testing.assert_close(
                    found[row], wanted[row], rtol=0, atol=atol,
                    msg=lambda text, at=(name, step, row): f"{at}: {text}",
                )  # fmt: skip
        assert any(bool((weights != 1).any()) for weights in alone.weights[step].values())
    torch.testing.assert_close(runs[0].parameters, alone.parameters, rtol=0, atol=1e-6)
