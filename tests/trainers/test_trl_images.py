"""SHEAR in trl's GRPOTrainer with prompts that hold an image, for a tiny Qwen2-VL.

Its processor is made on the spot, without one for videos, which would need torchvision.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from shear_ops import distributed, span_weights

trl = pytest.importorskip("trl", reason="trl is not installed")
pytest.importorskip("PIL", reason="pillow is not installed")
transformers = pytest.importorskip(
    "transformers", minversion="5", reason="its Qwen2-VL is that of transformers 5"
)

import grpo  # noqa: E402
from shear_ops.integrations.trl import ShearConfig, ShearGRPOTrainer  # noqa: E402

START, END, IMAGE, VIDEO = MARKS = (
    "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"
)  # fmt: skip
TEMPLATE = (
    "{% for message in messages %}{% for part in message.content %}"
    "{% if part.type == 'image' %}" + START + IMAGE + END + "{% else %}{{ part.text }}{% endif %} "
    "{% endfor %}{% endfor %}"
)


def processor() -> Any:
    class Processor(transformers.Qwen2VLProcessor):  # type: ignore[misc]
        def check_argument_for_proper_class(self, name: str, argument: Any) -> Any:
            return type(argument)  # no video processor

    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(list(MARKS), special_tokens=True)
    images = Qwen2VLImageProcessorPil(size={"shortest_edge": 28 * 28, "longest_edge": 4 * 28 * 28})
    return Processor(images, tokenizer, None, chat_template=TEMPLATE)


def model(tokenizer: Any) -> Any:
    start, end, image, video = tokenizer.convert_tokens_to_ids(list(MARKS))
    config = transformers.Qwen2VLConfig(
        text_config={
            "vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 128, "bos_token_id": None,
            "eos_token_id": 1, "pad_token_id": 0,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
        },
        vision_config={"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2},
        vision_start_token_id=start, vision_end_token_id=end, image_token_id=image, video_token_id=video,
        tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.Qwen2VLForConditionalGeneration(config)


def prompts() -> Any:
    import numpy
    from datasets import Dataset
    from PIL import Image

    rows = []
    for i in range(8):  # of two sizes: images have different numbers of patches
        pixels = numpy.random.default_rng(i).integers(0, 256, (28 * (1 + i % 2), 56, 3))
        rows.append(
            {
                "prompt": [{"role": "user", "content": f"{i % 10} + {3 * i % 10} ="}],
                "image": Image.fromarray(pixels.astype("uint8")),
                "answer": str(4 * i % 10),
            }
        )
    return Dataset.from_list(rows)


def correct(completions: list[Any], answer: list[str], **_: Any) -> list[float]:
    return tiny.correct([completion[0]["content"] for completion in completions], answer)


@pytest.mark.parametrize(
    ("mode", "config"),
    [("loss", {}), ("score", {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2})],
)
def test_weights_are_those_of_one_forward_a_rollout(
    mode: str, config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setattr("trl.trainer.grpo_trainer.shuffle_sequence_dict", lambda batch: batch)
    made = processor()
    policy = model(made.tokenizer)
    before = copy.deepcopy(policy).eval()
    trainer = grpo.build(
        ShearGRPOTrainer, shear=ShearConfig(mode=mode, spans=grpo.EXACT), model=policy,
        processor=made, prompts=prompts(), rewards=correct, max_steps=1, seed=4, **config,
    )  # fmt: skip
    grpo.give_completions(trainer)
    batches, calls = [], []
    score, weigh = trainer._generate_and_score_completions, distributed.span_weights

    def remember(inputs: Any) -> dict[str, Any]:
        batches.append(score(inputs))
        return dict(batches[-1])

    def span_weights_(hidden: Tensor, **kwargs: Any) -> Any:
        calls.append({**kwargs, "hidden": hidden, "weights": weigh(hidden, **kwargs).weights})
        return weigh(hidden, **kwargs)

    trainer._generate_and_score_completions = remember
    monkeypatch.setattr(distributed, "span_weights", span_weights_)
    grpo.train(trainer)
    (batch,), (call,) = batches, calls
    patches = torch.split(batch["pixel_values"], batch["image_grid_thw"].prod(1).tolist())
    assert len({len(image) for image in patches}) == 2
    states = []
    for row, image in enumerate(patches):
        prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()]
        tokens = torch.cat([prompt, torch.tensor([*grpo.completion(0, row), 1])])[None]
        with torch.no_grad():
            output = before(
                tokens, pixel_values=image, image_grid_thw=batch["image_grid_thw"][row][None],
                mm_token_type_ids=(tokens == before.config.image_token_id).long(),
                output_hidden_states=True,
            )  # fmt: skip
        states.append(output.hidden_states[-1][0, len(prompt) :])
    torch.testing.assert_close(call["hidden"], torch.cat(states), rtol=0, atol=1e-5)
    lengths = torch.tensor([0, *map(len, states)])
    wanted = span_weights(
        torch.cat(states), cu_seqlens=lengths.cumsum(0), group_ids=torch.arange(8) // 4,
        labels=call["labels"], config=grpo.EXACT,
    )  # fmt: skip
    assert bool((wanted != 1).any())
    torch.testing.assert_close(call["weights"], wanted, rtol=0, atol=5e-6)
