"""Models, tokenizer, prompts and rewards made on the spot: no model hub, training in seconds."""

from __future__ import annotations

import os
from typing import Any

for name in (
    "HF_HUB_OFFLINE",
    "TRANSFORMERS_OFFLINE",
    "HF_DATASETS_OFFLINE",
    "HF_HUB_DISABLE_TELEMETRY",
):
    os.environ.setdefault(name, "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import torch  # noqa: E402

WORDS = ("<pad>", "<eos>", "<unk>", *"0123456789+=abcdefghijklmnopq")


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>",
        padding_side="left", model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


def model(kind: str = "Qwen2", **config: Any) -> Any:
    import transformers

    torch.manual_seed(0)
    made = getattr(transformers, f"{kind}Config")(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=128,
        bos_token_id=None, eos_token_id=1, pad_token_id=0, tie_word_embeddings=False, **config,
    )  # fmt: skip
    return getattr(transformers, f"{kind}ForCausalLM")(made)


def prompts(count: int = 8) -> Any:
    from datasets import Dataset

    rows = [
        {"prompt": f"{i % 10} + {3 * i % 10} =", "answer": str(4 * i % 10)} for i in range(count)
    ]
    return Dataset.from_list(rows)


def correct(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    """Whether the answer's digit occurs at all: random text is right about as often as wrong."""
    return [float(a in c.split()) for c, a in zip(completions, answer, strict=True)]


def short(completions: list[str], **_: Any) -> list[float]:
    return [0.6 * (len(c.split()) < 8) for c in completions]
