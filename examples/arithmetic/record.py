"""Train a small transformer on written-out arithmetic, sample GRPO groups, record hidden states."""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import torch
import torch.nn.functional as F
from model import ModelConfig, Transformer, sample
from rich.console import Console
from rich.progress import track
from safetensors.torch import save as to_bytes
from task import END, Problem, Task, Verdict, verify
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

GROUP = 8
MIXED = range(2, 7)  # correct rollouts of 8 in a recorded group
BATCH = 256  # arithmetic steps of a training batch, at most
SHORT = 8  # steps of a problem in the first quarter of training
RATE, RATE_WIDTH, WARM_UP = 1.5e-3, 128, 100  # the rate falls with the width, as Adam wants it
CHECK_EVERY, CHECK_GROUPS = 100, 8

console = Console(markup=False, emoji=False)  # paths are no markup


@dataclass
class Training:
    """What a checkpoint remembers beside the weights."""

    step: int = 0
    seconds: float = 0.0
    loss: float = math.nan  # mean per token over the last CHECK_EVERY steps
    share: float = 0.0  # correct rollouts of the last check
    finished: bool = False


@dataclass
class Group:
    problem: Problem
    rollouts: list[list[int]]
    verdicts: list[Verdict]

    @property
    def correct(self) -> int:
        return sum(verdict.label == 1 for verdict in self.verdicts)


def batch_of(task: Task, seed: int, step: int, length: int) -> tuple[Tensor, Tensor]:
    """Fresh problems of `length` steps as inputs and targets [B, T]; prompts are no targets."""
    rng = random.Random(f"train {seed} {step}")
    problems = [task.sample(rng, length) for _ in range(max(1, BATCH // length))]
    texts = [torch.tensor(task.encode(p.prompt + p.completion)) for p in problems]
    tokens = pad_sequence(texts, batch_first=True, padding_value=0)
    targets = pad_sequence(texts, batch_first=True, padding_value=-100)
    targets[:, : len(problems[0].prompt)] = -100
    return tokens[:, :-1], targets[:, 1:]


def rate(step: int, steps: int) -> float:
    """Warm-up, then a cosine down to a tenth."""
    cosine = 0.55 + 0.45 * math.cos(math.pi * step / steps)
    return min((step + 1) / WARM_UP, cosine)


def train(
    model: Transformer,
    task: Task,
    *,
    seed: int,
    steps: int,
    stop_at: float,
    minutes: float,
    checkpoint: Path | None,
) -> Training:
    """Next-token training for `steps`, or until the share `stop_at` of rollouts is correct, or
    until `minutes` are over.
    """
    device = next(model.parameters()).device
    highest = RATE * RATE_WIDTH / model.config.width
    optimizer = torch.optim.AdamW(model.parameters(), lr=highest, betas=(0.9, 0.98))
    state = Training()
    if checkpoint is not None and checkpoint.exists():
        saved = torch.load(checkpoint, map_location=device)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        state = Training(**saved["training"])
        console.print(f"{checkpoint}: {state}")
    before, began, losses = state.seconds, time.perf_counter(), []
    for step in track(range(state.step, 0 if state.finished else steps), "train", console=console):
        for group in optimizer.param_groups:
            group["lr"] = highest * rate(step, steps)
        length = min(SHORT, task.steps) if step < steps // 4 else task.steps
        tokens, targets = batch_of(task, seed, step, length)
        logits = model(tokens.to(device))
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten().to(device))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.detach())
        state.step = step + 1
        if state.step % CHECK_EVERY and state.step < steps:
            continue
        if steps // 4 < state.step < steps:  # the last step ends training in any case
            groups = sample_groups(model, task, f"check {seed} {step}", CHECK_GROUPS)
            state.share = sum(group.correct for group in groups) / (GROUP * CHECK_GROUPS)
        state.loss = torch.stack(losses).mean().item()
        state.seconds = before + time.perf_counter() - began
        late = state.seconds > 60 * minutes
        state.finished = state.step >= steps or state.share >= stop_at or late
        losses.clear()
        console.print(
            f"step {state.step}: loss {state.loss:.4f} nats per token, "
            f"{state.share:.0%} correct at the last check, {state.seconds:.0f} s"
        )
        if checkpoint is not None:
            parts = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save({**parts, "training": vars(state)}, checkpoint)
        if state.finished:
            break
    return state


def sample_groups(model: Transformer, task: Task, name: str, count: int) -> list[Group]:
    """`count` groups at temperature 1; everything random in them follows from `name`."""
    rng = random.Random(name)
    problems = [task.sample(rng) for _ in range(count)]
    prompts = torch.tensor([task.encode(p.prompt) for p in problems for _ in range(GROUP)])
    device = next(model.parameters()).device
    rows = sample(
        model,
        prompts.to(device),
        limit=task.limit,
        end=task.token_of[END],
        generator=torch.Generator().manual_seed(rng.randrange(2**62)),
    )
    groups = []
    for i, problem in enumerate(problems):
        own = rows[i * GROUP : (i + 1) * GROUP]
        groups.append(Group(problem, own, [verify(problem, task.decode(row)) for row in own]))
    return groups


def sampled(model: Transformer, task: Task, seed: int, most: int) -> Iterator[Group]:
    """Groups in the order of their seeds, eight at a time."""
    for begin in range(0, most, 8):
        yield from sample_groups(model, task, f"sample {seed} {begin}", min(8, most - begin))


@torch.inference_mode()
def rollout_hidden(model: Transformer, prompt: list[int], rollout: list[int]) -> Tensor:
    """The state at each token of the rollout, after reading it: [T, width]."""
    device = next(model.parameters()).device
    hidden = model.hidden(torch.tensor([prompt + rollout], device=device))
    return hidden[0, len(prompt) :].to("cpu", torch.bfloat16)


def save(model: Transformer, task: Task, groups: list[Group], source: str, out: Path) -> None:
    rollouts = [
        (group.problem, row, verdict)
        for group in groups
        for row, verdict in zip(group.rollouts, group.verdicts, strict=True)
    ]
    lengths = torch.tensor([0] + [len(row) for _, row, _ in rollouts])
    tensors = {
        "hidden": torch.cat(
            [rollout_hidden(model, task.encode(p.prompt), row) for p, row, _ in rollouts]
        ),
        "cu_seqlens": lengths.cumsum(0),
        "group_ids": torch.arange(len(groups)).repeat_interleave(GROUP),
        "labels": torch.tensor([v.label for *_, v in rollouts], dtype=torch.int8),
        "tokens": torch.tensor([t for _, row, _ in rollouts for t in row], dtype=torch.int16),
        "first_wrong": torch.tensor([v.first_wrong for *_, v in rollouts]),
    }
    metadata = {
        "vocabulary": json.dumps(task.vocabulary),
        "source": source,
        "prompts": json.dumps([problem.prompt for problem, *_ in rollouts]),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_bytes(to_bytes(tensors, metadata=metadata))  # save_file would replace a link


@click.command(context_settings={"show_default": True, "max_content_width": 100})
@click.option(
    "--seed", default=0, help="Fixes weights, problems and samples (same CPU, same torch)."
)
@click.option("--steps", default=5000, help="Training steps; a quarter of them on short problems.")
@click.option(
    "--stop-at", default=0.5, help="Stop training once this share of rollouts is correct."
)
@click.option("--minutes", default=math.inf, help="Stop training after so long in any case.")
@click.option("--groups", "wanted", default=11, help="Groups of 8 rollouts to record.")
@click.option("--most", default=96, help="Groups to sample at most in search of mixed ones.")
@click.option("--any-group", is_flag=True, help="Record all groups, not only 2 to 6 of 8 correct.")
@click.option("--problem-steps", default=Task.steps, help="Operations of a problem.")
@click.option("--width", default=128, help="Hidden dimension of the model, a multiple of 64.")
@click.option("--layers", default=4, help="Layers of the model.")
@click.option("--device", default="cpu", help="A torch device, such as cpu or cuda.")
@click.option(
    "--checkpoint",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Saved during training and resumed from; a finished one goes straight to sampling.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("arithmetic.safetensors"),
    help="The rollout file, for `shear-ops score`.",
)
def main(
    seed: int,
    steps: int,
    stop_at: float,
    minutes: float,
    wanted: int,
    most: int,
    any_group: bool,
    problem_steps: int,
    width: int,
    layers: int,
    device: str,
    checkpoint: Path | None,
    out: Path,
) -> None:
    """Train a small transformer on multi-step arithmetic, sample groups of 8 rollouts at
    temperature 1, verify them, and record hidden states, labels and first wrong steps.

    Training stops early on purpose: groups must be mixed to be of use. The first groups with 2 to 6
    correct rollouts are recorded, in the order of sampling.

    \b
    The shipped file:  python record.py --checkpoint model.pt --out arithmetic.safetensors
    Longer rollouts:   python record.py --device cuda --problem-steps 100 --width 1024 --layers 8
    More groups:       python record.py --checkpoint model.pt --groups 50 --most 400
    In seconds:        python record.py --steps 2 --groups 1 --any-group --out tiny.safetensors
    """
    torch.manual_seed(seed)
    if device != "cpu":
        torch.set_float32_matmul_precision("high")
    task = Task(problem_steps)
    config = ModelConfig(len(task.vocabulary), width, layers, max(4, width // 64), task.context)
    model = Transformer(config).to(device)
    training = train(
        model, task, seed=seed, steps=steps, stop_at=stop_at, minutes=minutes, checkpoint=checkpoint
    )

    kept: list[Group] = []
    seen: list[Group] = []
    for group in sampled(model, task, seed, most):
        seen.append(group)
        if any_group or group.correct in MIXED:
            kept.append(group)
        if len(kept) == wanted:
            break
    verdicts = [verdict for group in seen for verdict in group.verdicts]
    console.print(
        f"sampled {len(seen)} groups: {sum(v.label == 1 for v in verdicts) / len(verdicts):.0%} "
        f"correct, {sum(v.label == -1 for v in verdicts)} without an answer, "
        f"{sum(v.lucky for v in verdicts)} correct after a wrong step; "
        f"kept {len(kept)} with {[group.correct for group in kept]} correct"
    )
    if len(kept) < wanted:
        raise click.ClickException(
            f"{len(kept)} of {len(seen)} groups to record, --groups {wanted}"
        )
    rule = "all groups" if any_group else "the first with 2 to 6 correct"
    source = (
        f"examples/arithmetic/record.py --seed {seed} --problem-steps {problem_steps} "
        f"--width {width} --layers {layers}, {training.step} training steps, "
        f"temperature 1, {rule}: {len(kept)} of {len(seen)} groups"
    )
    save(model, task, kept, source, out)
    console.print(f"{out}: {out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
