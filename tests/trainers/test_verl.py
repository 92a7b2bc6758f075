"""verl's real FSDP engine on the CPU in its four layouts; its driver with a stub for the queue."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from shear_ops import SpanConfig, span_weights

pytest.importorskip(
    "verl", reason="verl is not installed (make trainer-verl makes an environment with it)"
)
import verl.workers.engine.fsdp.transformer_impl as fsdp
from omegaconf import OmegaConf
from tensordict import TensorDict
from verl.trainer.ppo.ray_trainer import RayPPOTrainer
from verl.utils import tensordict_utils as tu
from verl.utils.torch_functional import entropy_from_logits
from verl.workers.engine import EngineRegistry

from shear_ops.integrations import verl as integration

SIZE, GROUP = 8, 4
SPANS = {"span": 4, "stride": 2}
CONFIG = OmegaConf.create(
    {
        "algorithm": {"adv_estimator": "grpo"},
        "actor_rollout_ref": {"actor": {"strategy": "fsdp2"}},
        "shear": {"threshold": 0.5, "spans": SPANS},
    }
)


def jagged(rows: list[Tensor]) -> Tensor:
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Any:
    """The engine around a tiny model, without what needs a GPU."""
    monkeypatch.setattr(fsdp, "get_device_id", lambda: "cpu")
    monkeypatch.setattr(fsdp, "get_device_name", lambda: "cpu")
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    made = integration.ShearFSDPEngine.__new__(integration.ShearFSDPEngine)
    made.module = tiny.model().eval()
    made.pad_to_length = made.use_ulysses_sp = False
    made.ulysses_sequence_parallel_size = 1
    made._autocast_dtype = torch.float32
    made._get_packed_pad_size = lambda tokens: 0
    made.engine_config = SimpleNamespace(
        entropy_checkpointing=False, entropy_from_logits_with_chunking=False
    )
    made.compute_entropy_from_logits = entropy_from_logits
    made.get_data_parallel_group = lambda: None
    made.get_data_parallel_size = lambda: 1
    made.scaler = None
    yield made
    torch.distributed.destroy_process_group()


def data(**settings: Any) -> Any:
    """Eight rollouts of two groups; one with tokens of a tool, one without any valid token."""
    generator = torch.Generator().manual_seed(1)
    prompts, responses = (
        torch.randint(*limits, (SIZE,), generator=generator).tolist()
        for limits in ((2, 5), (6, 20))
    )
    ids = [
        torch.randint(3, 30, (p + r,), generator=generator)
        for p, r in zip(prompts, responses, strict=True)
    ]
    masks = [torch.ones(r, dtype=torch.long) for r in responses]
    masks[1][2:5] = 0
    masks[6][:] = 0
    rewards = [torch.zeros(r) for r in responses]
    for i, reward in enumerate(rewards):
        reward[-1] = float(i % 2)
    made = TensorDict(
        {
            "input_ids": jagged(ids),
            "position_ids": jagged([torch.arange(len(i)) for i in ids]),
            "prompts": jagged([i[:p] for i, p in zip(ids, prompts, strict=True)]),
            "responses": jagged([i[p:] for i, p in zip(ids, prompts, strict=True)]),
            "response_mask": jagged(masks),
            "loss_mask": jagged(
                [torch.cat([torch.zeros(p), m]) for p, m in zip(prompts, masks, strict=True)]
            ),
            "rm_scores": jagged(rewards),
        },
        batch_size=[SIZE],
    )
    tu.assign_non_tensor_stack(made, "uid", [f"uid{i // GROUP}" for i in range(SIZE)])
    tu.assign_non_tensor(
        made, max_token_len_per_gpu=40, micro_batch_size_per_gpu=2, use_fused_kernels=False,
        temperature=1.0, calculate_entropy=True, sp_size=1, pad_token_id=0, **settings,
    )  # fmt: skip
    return made


def wanted(engine: Any, batch: Any, align: str) -> list[Tensor]:
    """By one forward per rollout, and span_weights."""
    states, lengths = [], []
    for ids, mask in zip(batch["input_ids"].unbind(), batch["response_mask"].unbind(), strict=True):
        with torch.no_grad():
            hidden = engine.module.base_model(ids[None]).last_hidden_state[0]
        last = len(ids) - (align == "predictor")
        states.append(hidden[last - len(mask) : last][mask.bool()])
        lengths.append(len(states[-1]))
    weights = span_weights(
        torch.cat(states), cu_seqlens=torch.tensor([0, *lengths]).cumsum(0),
        group_ids=[i // GROUP for i in range(SIZE)], labels=[i % 2 for i in range(SIZE)],
        config=SpanConfig(**SPANS),
    ).split(lengths)  # fmt: skip
    rows = []
    for mask, values in zip(batch["response_mask"].unbind(), weights, strict=True):
        rows.append(torch.ones(len(mask)))
        rows[-1][mask.bool()] = values
    return rows


@pytest.mark.parametrize("use_remove_padding", [True, False])
@pytest.mark.parametrize("use_dynamic_bsz", [True, False])
@pytest.mark.parametrize("align", ["token", "predictor"])
def test_weights_in_every_layout(
    engine: Any, use_remove_padding: bool, use_dynamic_bsz: bool, align: str
) -> None:
    layout = {"use_remove_padding": use_remove_padding, "use_dynamic_bsz": use_dynamic_bsz}
    config = OmegaConf.merge(CONFIG, {"shear": {"align": align}})
    batch = data(**layout, shear=integration.flag_of(config, 0))
    output = engine.infer_batch(batch)["model_output"]
    plain = engine.infer_batch(data(**layout))["model_output"]
    assert "shear_weights" not in plain
    assert "shear_place" not in batch
    assert torch.equal(output["log_probs"].values(), plain["log_probs"].values())
    found = output["shear_weights"].unbind()
    for row, expected in zip(found, wanted(engine, batch, align), strict=True):
        torch.testing.assert_close(row, expected, rtol=2e-3, atol=1e-6)
    assert bool((output["shear_weights"].values() != 1).any())
    assert output["shear_stopped"].values().tolist() == [0] * SIZE
    padded = torch.nested.to_padded_tensor(output["shear_weights"], 1.0)
    assert padded.shape == (SIZE, max(len(row) for row in found))


def test_engine_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VERL_ENGINE_DEVICE", "cuda")
    monkeypatch.setenv("VERL_ENGINE_VENDOR", "nvidia")
    for backend in ("fsdp", "fsdp2"):
        chosen = EngineRegistry.get_engine_cls("language_model", backend)
        assert chosen is integration.ShearFSDPEngine


class Trainer:
    """As much of PPOTrainer as the wrappers touch."""

    global_steps = 3

    def __init__(self, config: Any) -> None:
        self.config = config
        self.sent: list[str | None] = []

    def _compute_old_log_prob(self, batch: Any, metrics: dict[str, Any]) -> Any:
        self.sent.append(batch.extra_info.get("shear"))
        return batch

    def _compute_advantage(self, batch: Any, metrics: dict[str, Any]) -> Any:
        return batch


def test_driver_multiplies_advantages(monkeypatch: pytest.MonkeyPatch) -> None:
    cls = type("Patched", (Trainer,), dict(vars(Trainer)))
    integration._install(cls)
    rows = [torch.full((3,), 2.0), torch.full((5,), -1.0)]
    weights = [torch.rand(3), torch.rand(5)]
    put: dict[str, Any] = {}

    def get(keys: Any, partition_id: str, select_fields: list[str]) -> Any:
        fields = {
            "advantages": jagged(rows), "shear_weights": jagged(weights),
            "shear_stopped": jagged([torch.tensor([0.25])] * 2),
        }  # fmt: skip
        return TensorDict({name: fields[name] for name in select_fields}, batch_size=[2])

    queue = SimpleNamespace(
        kv_batch_get=get, kv_batch_put=lambda keys, partition_id, fields: put.update(fields)
    )
    monkeypatch.setattr(integration.trainer_base, "tq", queue)
    batch = SimpleNamespace(keys=["a", "b"], partition_id="train", extra_info={})
    trainer, metrics = cls(CONFIG), {}
    trainer._compute_old_log_prob(batch, metrics)
    assert '"step": 2' in trainer.sent[0]
    assert batch.extra_info == {}
    trainer._compute_advantage(batch, metrics)
    assert list(put) == ["advantages"]
    for row, factors, product in zip(rows, weights, put["advantages"].unbind(), strict=True):
        assert torch.equal(product, row * factors)
    assert metrics["shear/weight_max"] == torch.cat(weights).max().item()
    assert metrics["shear/stopped"] == 0.25
    put.clear()
    scaling = cls(OmegaConf.merge(CONFIG, {"shear": {"apply": "gradient"}}))
    metrics = {}
    scaling._compute_advantage(batch, metrics)  # the engine applies them
    assert put == {}
    assert metrics["shear/weight_max"] == torch.cat(weights).max().item()
    off = cls(OmegaConf.create({"algorithm": {"adv_estimator": "gae"}}))
    off._compute_old_log_prob(batch, metrics)
    off._compute_advantage(batch, metrics)
    assert off.sent == [None]
    assert put == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"algorithm": {"adv_estimator": "gae"}}, "adv_estimator must be grpo with shear"),
        ({"algorithm": {"rollout_correction": {"bypass_mode": True}}}, "bypass_mode must be False"),
        (
            {"shear": {"treshold": 1}},
            "must be among threshold, align, spans, weighting, apply, got treshold",
        ),
        (
            {"actor_rollout_ref": {"actor": {"strategy": "megatron"}}},
            "actor.strategy must be fsdp or fsdp2 with shear.*, got megatron",
        ),
        ({"shear": {"spans": {"span": 0}}}, "span must be in"),
        (
            {
                "actor_rollout_ref": {"actor": {"policy_loss": {"loss_mode": "geo_mean"}}},
                "shear": {"apply": "advantages"},
            },
            "token-level advantages with shear.apply=advantages, got geo_mean",
        ),
        (
            {
                "actor_rollout_ref": {"actor": {"policy_loss": {"loss_mode": "dro"}}},
                "shear": {"apply": "gradient"},
            },
            "a penalty of its own on the log-probabilities with shear.apply=gradient, got dro",
        ),
        ({"shear": {"align": "next"}}, "align must be token or predictor, got 'next'"),
    ],
)
def test_refuses(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        integration.flag_of(OmegaConf.merge(CONFIG, change), 0)


def test_settings_of_the_command_line() -> None:
    given = OmegaConf.from_dotlist(["shear.weighting.clip=[0.5,2]", "shear.threshold=1"])
    sent = json.loads(integration.flag_of(OmegaConf.merge(CONFIG, given), 0))["section"]
    settings = integration.Settings.parse(sent)
    assert settings.weighting.clip == (0.5, 2)
    assert settings.threshold == 1
    with pytest.raises(TypeError, match="shear must be a section of settings, got 3"):
        integration.flag_of(
            OmegaConf.merge(OmegaConf.masked_copy(CONFIG, ["algorithm"]), {"shear": 3}), 0
        )


def test_trainer_refuses_when_it_is_made() -> None:
    cls = type("Patched", (Trainer,), dict(vars(Trainer)))
    integration._install(cls)
    cls(CONFIG)
    with pytest.raises(ValueError, match="span must be in"):
        cls(OmegaConf.merge(CONFIG, {"shear": {"spans": {"span": 0}}}))


def legacy(cls: type, config: Any) -> Any:
    """A trainer of verl with a configuration, and without what it does with it."""
    made = cls.__new__(cls)
    made.config = config
    return made


@pytest.mark.parametrize("method", ["__init__", "_update_actor"])
def test_legacy_trainer_refuses(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Legacy(RayPPOTrainer):
        pass

    monkeypatch.setattr(Legacy, method, lambda self: "done")
    integration._refuse(Legacy, method)
    with pytest.raises(ValueError, match=r"trainer.use_v1=True\), got Legacy"):
        getattr(legacy(Legacy, CONFIG), method)()
    assert getattr(legacy(Legacy, OmegaConf.create({})), method)() == "done"


def test_legacy_trainer_is_wrapped() -> None:
    for method in (RayPPOTrainer.__init__, RayPPOTrainer._update_actor):
        assert method.__qualname__.startswith("RayPPOTrainer.")
        assert method.__code__.co_name == "refuse"


def test_installed_in_verls_trainer() -> None:
    for name in ("__init__", "_compute_old_log_prob", "_compute_advantage"):
        method = getattr(integration.trainer_base.PPOTrainer, name)
        assert method.__module__ == "verl.trainer.ppo.v1.trainer_base"
        assert method.__wrapped__ is not None
