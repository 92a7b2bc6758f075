"""GRPO with SHEAR in trl: the trainer's class and one configuration are all that changes.

    pip install torch && pip install ".[trl]"           # from a checkout
    python examples/trl_grpo.py --model Qwen/Qwen2.5-0.5B-Instruct --steps 200
    python examples/trl_grpo.py --tiny --steps 2        # random model, no download, on a CPU

On several GPUs: accelerate launch examples/trl_grpo.py ...; groups may straddle ranks.
"""

from __future__ import annotations

import argparse
import random
import re
from typing import Any

from datasets import Dataset
from trl import GRPOConfig

from shear_ops import SpanConfig
from shear_ops.integrations.trl import ShearConfig, ShearGRPOTrainer


def problems(count: int) -> Dataset:
    rng = random.Random(0)
    rows = []
    for _ in range(count):
        a, b, c = (rng.randrange(10, 100) for _ in range(3))
        question = f"Think step by step, then answer after '####'. {a} * {b} + {c} ="
        rows.append({"prompt": question, "answer": str(a * b + c)})
    return Dataset.from_list(rows)


def correct(completions: list[str], answer: list[str], **_: Any) -> list[float | None]:
    """The verifier: 1 right, 0 wrong, None where there is no answer (those are ignored)."""
    found = [text.rpartition("####") for text in completions]
    return [
        float(tail.strip().rstrip(".") == wanted) if marker else None
        for (_, marker, tail), wanted in zip(found, answer, strict=True)
    ]


def has_format(completions: list[str], **_: Any) -> list[float]:
    """A second reward: its sum with the first says nothing about correctness any more."""
    return [0.1 * (text.count("####") == 1) for text in completions]


def even(completions: list[str], **_: Any) -> list[float | None]:
    """A verifier that a random model passes half of the time: the last number is even."""
    numbers = [re.findall(r"\d+", text) for text in completions]
    return [float(int(found[-1]) % 2 == 0) if found else None for found in numbers]


def tiny_model() -> tuple[Any, Any]:
    """A random Qwen2 of 16 dimensions with a tokenizer of words, to try the script."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    words = ["<pad>", "<eos>", "<unk>", "####", *(str(n) for n in range(28))]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    config = Qwen2Config(
        vocab_size=len(words), hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    return Qwen2ForCausalLM(config), wrapped


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="Qwen/Qwen2.5-0.5B-Instruct")
    parser.add_argument("--tiny", action="store_true", help="a random model, on the CPU")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", default="trl_grpo")
    arguments = parser.parse_args()

    model, tokenizer = tiny_model() if arguments.tiny else (arguments.model, None)
    verifier = even if arguments.tiny else correct
    small = {"use_cpu": True, "bf16": False, "max_completion_length": 24, "report_to": []}
    args = GRPOConfig(
        arguments.out,
        max_steps=arguments.steps,
        num_generations=8,
        per_device_train_batch_size=8,
        logging_steps=1,
        **(small if arguments.tiny else {"max_completion_length": 1024}),
    )
    trainer = ShearGRPOTrainer(
        model=model,
        processing_class=tokenizer,
        reward_funcs=[verifier, has_format],
        args=args,
        train_dataset=problems(64 if arguments.tiny else 4096),
        shear_config=ShearConfig(
            correctness=verifier.__name__,  # with two rewards, one has to be named
            spans=SpanConfig(span=6, stride=2) if arguments.tiny else SpanConfig(),
        ),
    )
    trainer.train()


if __name__ == "__main__":
    main()
