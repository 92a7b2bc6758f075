"""GRPO with SHEAR in plain PyTorch, on one process or many (torchrun --nproc-per-node 2 ...).

A small transformer is rewarded for the right first digit of a sum. A step samples groups of
completions, makes one pass without gradients per micro-batch, which gives old log-probabilities and
hidden states alike, and takes token weights from all micro-batches and ranks together.

    pip install torch && pip install .      # from a checkout
    python examples/grpo_loop.py --steps 100
"""

from __future__ import annotations

import argparse
import os
import random
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from shear_ops import HiddenBank, HiddenCapture, SpanConfig, Weighting, labels_from_rewards

sys.path.insert(0, str(Path(__file__).parent / "arithmetic"))
from model import ModelConfig, Transformer, sample

WORDS = "0123456789+=."
END = WORDS.index(".")
GROUP, LIMIT = 8, 6  # rollouts per prompt, tokens per rollout


def encode(text: str) -> list[int]:
    return [WORDS.index(character) for character in text]


def rollouts(model: Transformer, rng: random.Random, prompts: int, generator: torch.Generator):
    """Tokens, completion mask and rewards (1 if the first digit is the sum) of whole groups."""
    tokens, masks, rewards = [], [], []
    for _ in range(prompts):
        a, b = rng.randrange(5), rng.randrange(5)
        prompt, answer = encode(f"{a}+{b}="), encode(f"{a + b}")
        batch = torch.tensor([prompt] * GROUP)
        for drawn in sample(model, batch, limit=LIMIT, end=END, generator=generator):
            padding = [END] * (LIMIT - len(drawn))
            tokens.append(prompt + drawn + padding)
            masks.append([0] * len(prompt) + [1] * len(drawn) + [0] * len(padding))
            rewards.append(float(drawn[:1] == answer))
    return torch.tensor(tokens), torch.tensor(masks), torch.tensor(rewards)


def log_probs(model: Transformer, tokens: Tensor) -> Tensor:
    """Log-probability of every token but the first, (B, S - 1)."""
    logits = model(tokens).log_softmax(-1)[:, :-1]
    return logits.gather(-1, tokens[:, 1:, None])[..., 0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--prompts", type=int, default=8, help="per rank and step")
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        dist.init_process_group()
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    torch.manual_seed(0)
    model = Transformer(ModelConfig(len(WORDS), width=64, layers=2, context=32))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    rng, generator = random.Random(rank), torch.Generator().manual_seed(rank)
    capture = HiddenCapture(model, backbone=model.norm)
    spans = SpanConfig(span=3, stride=1)  # the paper's 100 and 25 are for long reasoning

    for step in range(arguments.steps):
        tokens, mask, rewards = rollouts(model, rng, arguments.prompts, generator)
        groups = rank * arguments.prompts + torch.arange(len(tokens)) // GROUP
        by_group = rewards.view(-1, GROUP)
        spread = by_group.std(1, keepdim=True) + 1e-4
        advantages = ((by_group - by_group.mean(1, keepdim=True)) / spread).flatten()

        samples = rank * len(tokens) + torch.arange(len(tokens))
        bank, old = HiddenBank(group_size=GROUP, config=spans), []
        for rows in torch.arange(len(tokens)).split(12):  # micro-batches that split groups
            with torch.no_grad(), capture.recording(mask[rows]) as recording:
                old.append(log_probs(model, tokens[rows]))
            bank.add(
                recording.hidden,
                cu_seqlens=recording.cu_seqlens,
                sample_ids=samples[rows],
                group_ids=groups[rows],
                labels=labels_from_rewards(rewards[rows]),
            )
        found = bank.finalize(weighting=Weighting(mean_one=True), step=step)
        weights = torch.ones(mask.shape)
        weights[mask.bool()] = torch.cat(list(found.weights.values()))

        ratio = (log_probs(model, tokens) - torch.cat(old)).exp()
        token_advantages = advantages[:, None] * weights[:, 1:]
        clipped = ratio.clamp(0.8, 1.2) * token_advantages
        loss = -torch.min(ratio * token_advantages, clipped)[mask[:, 1:].bool()].mean()
        loss.backward()
        for parameter in model.parameters() if size > 1 else ():
            dist.all_reduce(parameter.grad)
            parameter.grad /= size
        optimizer.step()
        optimizer.zero_grad()
        if rank == 0 and (step % 10 == 0 or step == arguments.steps - 1):
            mixed = f"{found.mixed_groups} of {found.groups} groups mixed"
            print(
                f"step {step}: reward {rewards.mean():.3f}, {mixed}, {found.states_sent} bytes sent"
            )
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
