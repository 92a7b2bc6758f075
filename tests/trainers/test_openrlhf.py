"""SHEAR in OpenRLHF: its real command, Ray actors and DeepSpeed engines on two CPU ranks with gloo.

Stubs (openrlhf_stubs): vLLM answers at random, flash-attn's padding, and torch.cuda's calls; Ray
is told that the machine has GPUs.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from shear_ops import SpanConfig, span_weights

pytest.importorskip(
    "openrlhf",
    reason="openrlhf is not installed (make trainer-openrlhf makes an environment with it)",
)
sys.path.insert(0, str(Path(__file__).parent / "openrlhf_stubs"))
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import deepspeed  # noqa: F401
import openrlhf.utils
import ray
from openrlhf.trainer import ppo_trainer, ppo_trainer_async
from openrlhf.trainer.ppo_utils import FixedKLController
from openrlhf.trainer.ppo_utils.samples_generator import SamplesGenerator
from openrlhf.trainer.ray import ppo_actor
from openrlhf.trainer.ray.launcher import RayActorGroup
from ray.util.placement_group import placement_group, remove_placement_group

from shear_ops.integrations import openrlhf as integration

pytestmark = pytest.mark.filterwarnings("ignore")

STUBS = str(Path(__file__).parent / "openrlhf_stubs")
SIZE, GROUP = 12, 4
SPANS = {"span": 4, "stride": 2}
REWARD = """
import torch

def reward_func(queries, prompts, labels):
    rewards = torch.tensor([float(query.strip()[-1] in "01234") for query in queries])
    return {"rewards": rewards, "scores": rewards, "extra_logs": {}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("openrlhf")
    tiny.model().to(torch.bfloat16).save_pretrained(made / "model")
    tiny.tokenizer().save_pretrained(made / "model")
    rows = [{"input": f"{i} + {3 * i % 10} =", "answer": str(4 * i % 10)} for i in range(6)]
    (made / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (made / "reward.py").write_text(REWARD)
    return made


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A Ray cluster on this machine, whose processes find the stubs."""
    os.environ |= {
        "PYTHONPATH": os.pathsep.join([STUBS, os.environ.get("PYTHONPATH", "")]),
        "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7",  # Ray wants as many as it is told there are
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "RAY_prestart_worker_first_driver": "0",  # only the processes that are needed
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    yield ray.init(num_cpus=8, num_gpus=8, include_dashboard=False).address_info["address"]
    ray.shutdown()


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Restores what install() replaces."""
    for module, name in (
        (ppo_actor, "PolicyModelActor"),
        (ppo_trainer, "PPOTrainer"),
        (ppo_trainer_async, "TrainingActor"),
        (openrlhf.utils, "get_strategy"),
    ):
        monkeypatch.setattr(module, name, getattr(module, name))


def command_line(folder: Path, *more: str) -> list[str]:
    return [
        "--shear.spans.span=4", "--shear.spans.stride=2",
        "--actor.model_name_or_path", str(folder / "model"), "--actor.num_gpus_per_node", "2",
        "--vllm.num_engines", "1", "--algo.kl.init_coef", "0",
        "--reward.remote_url", str(folder / "reward.py"), "--data.label_key", "answer",
        "--data.prompt_dataset", str(folder / "prompts.jsonl"),
        "--algo.advantage.estimator", "group_norm", "--rollout.n_samples_per_prompt", "4",
        "--rollout.batch_size", "3", "--rollout.micro_batch_size", "2", "--data.max_len", "64",
        "--train.batch_size", "12", "--train.micro_batch_size", "2",
        "--ds.attn_implementation", "sdpa", "--ckpt.output_dir", str(folder / "out"), *more,
    ]  # fmt: skip


def strategy(monkeypatch: pytest.MonkeyPatch, folder: Path, *more: str) -> Any:
    """What OpenRLHF's command makes of a command line, before it starts any actor."""

    class Made(Exception):
        pass

    real = openrlhf.utils.get_strategy

    def get_strategy(args: Any) -> Any:
        raise Made(real(args))

    monkeypatch.setattr(openrlhf.utils, "get_strategy", get_strategy)
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(sys, "argv", ["shear", *command_line(folder, *more)])
    with pytest.raises(Made) as made:
        integration.main()
    return made.value.args[0]


def steps(folder: Path, address: str, *more: str) -> list[dict[str, float]]:
    """What the command logs, step by step."""
    done = subprocess.run(
        [sys.executable, "-m", "shear_ops.integrations.openrlhf", *command_line(folder, *more)],
        env=os.environ | {"RAY_ADDRESS": address},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300, cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:]
    logged = re.findall(r"Global step \d+: (\{.*)", done.stdout)
    return [
        {name: float(value) for name, value in re.findall(r"'([\w/]+)': ([-+.e\d]+)", line)}
        for line in logged
    ]


@pytest.mark.parametrize(
    "more",
    [
        ("--train.async_enable", "--shear.weighting.warmup_steps", "2"),
        ("--train.colocate_actor_ref", "--ref.num_gpus_per_node", "2", "--algo.kl.init_coef", "1e-3",
         "--algo.kl.use_loss", "--algo.kl.estimator", "k3"),
    ],
    ids=["async", "reference"],
)  # fmt: skip
def test_command(folder: Path, address: str, more: tuple[str, ...]) -> None:
    """Two steps of training; a group straddles ranks. A warm-up counts the optimizer's steps."""
    first, second = steps(folder, address, *more)
    for step in (first, second):
        assert 0 < step["shear/mixed_groups"] <= 1
        assert step["actor_grad_norm"] > 0
        if "--algo.kl.use_loss" in more:
            assert step["kl"] >= 0
    assert second["shear/weight_max"] > 1
    assert (first["shear/weight_max"] == 1) is ("--train.async_enable" in more)


def rollouts(made: Any) -> list[Any]:
    """Three groups: in the second, one rollout of two turns; all of the third are correct."""
    generator = torch.Generator().manual_seed(1)
    rewards = [float(i % 2 or i >= 2 * GROUP) for i in range(SIZE)]
    samples = []
    for i, reward in enumerate(rewards):
        prompt = 2 + i // GROUP
        length = prompt + int(torch.randint(6, 20, (1,), generator=generator))
        tokens = torch.randint(3, 30, (length,), generator=generator).tolist()
        turns = [(prompt, length)] if i != 5 else [(prompt, prompt + 3), (prompt + 5, length)]
        samples.append(
            SamplesGenerator._process_response_into_experience(
                made,
                {
                    "observation_tokens": tokens, "action_ranges": turns, "rollout_log_probs": None,
                    "reward": reward, "scores": reward if i != 2 else float("nan"),
                    "prompt": "", "label": "", "truncated": i == 1,
                },
                max_len=64,
            )
        )  # fmt: skip
    return samples


def wanted_weights(folder: Path, samples: list[Any], align: str) -> list[Tensor]:
    """By one forward per rollout, and span_weights."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model", dtype="bfloat16")
    states, lengths = [], []
    for sample in samples:
        with torch.no_grad():
            hidden = model.base_model(sample.sequences).last_hidden_state[0]
        hidden = hidden[1:] if align == "token" else hidden[:-1]
        states.append(hidden[sample.action_mask[0].bool()])
        lengths.append(len(states[-1]))
    labels = [-1 if i == 2 else int(i % 2 or i >= 2 * GROUP) for i in range(SIZE)]
    return list(
        span_weights(
            torch.cat(states), cu_seqlens=torch.tensor([0, *lengths]).cumsum(0),
            group_ids=[i // GROUP for i in range(SIZE)], labels=labels,
            config=SpanConfig(**SPANS),
        ).split(lengths)
    )  # fmt: skip


def plain_advantages(estimator: str, samples: list[Any]) -> list[float]:
    """One advantage per rollout."""
    rewards = torch.cat([sample.rewards for sample in samples]).view(-1, GROUP)
    advantages = rewards - rewards.mean(1, keepdim=True)
    if estimator == "group_norm":
        return (advantages / (rewards.std(1, keepdim=True) + 1e-9)).flatten().tolist()
    lengths = torch.tensor([int(sample.action_mask.sum()) for sample in samples])
    tokens = advantages.flatten().repeat_interleave(lengths)
    centred = advantages.flatten() - tokens.mean()
    return (centred / tokens.std(correction=0)).tolist()


@pytest.mark.parametrize(
    ("estimator", "align", "more"),
    [
        ("group_norm", "token", ()),
        ("reinforce_baseline", "predictor",
         ("--ds.packing_samples", "--train.dynamic_batch_enable", "--rollout.max_tokens_per_gpu", "64")),
        ("group_norm", "token", ("--ds.lora.rank", "4", "--ds.zero_stage", "3")),
        ("group_norm", "predictor", ("--ds.tensor_parallel_size", "2")),
    ],
    ids=["padded", "packed", "lora", "tensor-parallel"],
)  # fmt: skip
@pytest.mark.usefixtures("installed")
def test_advantages(
    folder: Path, address: str, estimator: str, align: str, more: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Against one forward per rollout; a group straddles micro-batches and ranks."""
    with monkeypatch.context() as context:
        made = strategy(
            context, folder, "--algo.advantage.estimator", estimator, "--shear.align", align, *more
        )
        actor_class = ppo_actor.PolicyModelActor
    if "--ds.packing_samples" in more:
        made.args.ds.attn_implementation = "sdpa"  # flash attention wants a GPU
    bundles = placement_group([{"GPU": 1, "CPU": 1}] * 2)
    actors = RayActorGroup(
        1, 2, actor_class, pg=bundles, num_gpus_per_actor=0.2,
        duplicate_actors=made.args.ds.tensor_parallel_size,
    )  # fmt: skip
    try:
        ray.get(actors.async_init_model_from_pretrained(made, str(folder / "model"), 10))
        maker = integration.ShearExperienceMaker(
            actors, None, None, None, FixedKLController(0.0), made, SimpleNamespace(pad_token_id=0)
        )
        samples = rollouts(made)
        weights = wanted_weights(folder, samples, align)
        plain = plain_advantages(estimator, samples)
        experiences = maker.make_experience_batch(samples)
    finally:
        for actor in actors._actor_handlers:
            ray.kill(actor)
        remove_placement_group(bundles)
    assert len(experiences) > 2
    assert sorted(i for experience in experiences for i in experience.index) == list(range(SIZE))
    for experience in experiences:
        assert "shear_weights" not in experience.info
        assert experience.info["shear/stopped"].tolist() == [0] * len(experience.index)
        assert experience.info["shear/mixed_groups"].tolist() == pytest.approx(
            [2 / 3] * len(experience.index)
        )
        rows = zip(experience.index, experience.advantages, experience.action_mask, strict=True)
        for i, advantages, mask in rows:
            torch.testing.assert_close(
                advantages[mask.bool()], plain[i] * weights[i], rtol=1e-2, atol=1e-5
            )
    assert bool((weights[0] != 1).any())
    for i in (2, *range(2 * GROUP, SIZE)):
        assert bool((weights[i] == 1).all())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--algo.advantage.estimator", "reinforce"), "algo.advantage.estimator must be one of group_norm, dr_grpo, rloo, reinforce_baseline with shear.*, got reinforce"),
        (("--actor.policy_loss_type", "gspo"), "actor.policy_loss_type must be ppo with shear.*, got gspo"),
        (("--algo.kl.init_coef", "0.01"), "algo.kl.init_coef must be 0 with shear.*, or algo.kl.use_loss given, got 0.01"),
        (("--reward.remote_url", ""), "reward.remote_url or train.agent_func_path must be given"),
        (("--shear.apply", "gradient"), "apply must be auto or advantages, got gradient: OpenRLHF"),
        (("--ds.ring_attn_size", "2"), "ds.ring_attn_size must be 1 with shear.*, got 2"),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("installed")
def test_refuses(
    folder: Path, more: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        strategy(monkeypatch, folder, *more)


@pytest.mark.usefixtures("installed")
def test_refuses_other_versions(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integration, "version", lambda name: "0.12.0")
    with pytest.raises(ValueError, match=r"openrlhf must be 0.11 with shear.\*, got 0.12.0"):
        strategy(monkeypatch, folder)


def test_refuses_rollouts_without_scores() -> None:
    with pytest.raises(ValueError, match="scores must be given with every rollout"):
        integration.scored(SimpleNamespace(), [SimpleNamespace(scores=None, index=[0])])


@pytest.mark.usefixtures("installed")
def test_help(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["shear", "--help"])
    with pytest.raises(SystemExit) as raised:
        integration.main()
    assert raised.value.code == 0
    printed = capsys.readouterr().out
    assert "--shear.spans.span" in printed
    assert "--algo.advantage.estimator" in printed
