"""SHEAR in Axolotl 0.19.0 (trl 1.9.0): a plugin that two entries of the YAML file turn on.

    rl: grpo
    plugins:
      - shear_ops.integrations.axolotl.ShearPlugin
    shear:                  # may be left out: the defaults
      correctness: correct  # which of trl.reward_funcs says right or wrong; may be left out if one
      threshold: 0.5
      spans: {span: 100, stride: 25}
      weighting: {mean_one: true}

The keys of the section are the arguments of ShearConfig; spans and weighting are sections of their
own with the fields of SpanConfig and Weighting. Axolotl checks the section with the rest of the
file, before it loads the model, and builds its own trainer; SHEAR is then attached to it in place.

Steps log ``shear/weight_mean``, ``weight_p95``, ``weight_max``, ``mixed_groups``, ``stopped``. If
they do not, the plugin did not load: Axolotl logs "Failed to load plugin", and trains without it.

Tested on the CPU, with Axolotl's own loading of configuration, plugin, model and trainer, and its
training: rl grpo and gdpo, all parameters and LoRA, one process. From source only: vLLM, DeepSpeed,
FSDP, several processes, Ray. Not supported: asynchronous GRPO and context parallelism, whose
trainers score rollouts in code of their own, trl.use_liger_loss where it replaces trl's loss, other
values of ``rl``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from axolotl.integrations.base import BasePlugin, PluginManager
from pydantic import BaseModel, model_validator
from trl import GRPOTrainer

from ..training.settings import refuse
from .trl import ShearConfig, attach

ALGORITHMS = ("grpo", "gdpo")


class ShearArgs(BaseModel):  # type: ignore[misc]
    """The section of the YAML file, mixed into Axolotl's own model of the file."""

    shear: dict[str, Any] | None = None

    @model_validator(mode="before")  # type: ignore[untyped-decorator]
    @classmethod
    def check(cls, file: Any) -> Any:
        """Check the section, and what SHEAR needs elsewhere in the file.

        Raises:
            TypeError, ValueError: naming the setting, the value seen and the value wanted.
        """
        if isinstance(file, Mapping) and _wanted(file):
            settings(file)
        return file


class ShearPlugin(BasePlugin):  # type: ignore[misc]
    """Attaches SHEAR to the trainer that Axolotl built."""

    def get_input_args(self) -> str:
        """Name ShearArgs."""
        return f"{ShearArgs.__module__}.{ShearArgs.__qualname__}"

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Turn the trainer into a SHEAR trainer.

        Raises:
            TypeError, ValueError: for settings or a trainer that SHEAR cannot work with.
        """
        if not _wanted(cfg):
            return
        config = settings(cfg)
        for name in ("_prepare_inputs", "_generate_and_score_completions"):
            method = getattr(type(trainer), name, None)
            if method is not getattr(GRPOTrainer, name):
                raise TypeError(
                    f"the trainer's {name} must be trl's, got another one in "
                    f"{type(trainer).__name__}: rollouts that it scores would miss their weights"
                )
        attach(trainer, config)


def settings(file: Mapping[str, Any]) -> ShearConfig:
    """Settings from the configuration file.

    Raises:
        TypeError, ValueError: naming the setting, the value seen and the value wanted.
    """
    section = file.get("shear")
    if not isinstance(section, (Mapping, type(None))):
        raise TypeError(f"shear must be a section, got {section!r}")
    config = ShearConfig.parse(section or {})
    refuse(refusals(file))
    return config


def refusals(file: Mapping[str, Any]) -> Iterator[tuple[object, str]]:
    """What SHEAR cannot work with in the configuration file."""
    algorithm, ranks = file.get("rl"), file.get("context_parallel_size") or 1
    yield (
        algorithm not in ALGORITHMS,
        f"rl must be {' or '.join(ALGORITHMS)} with shear, got {algorithm!r}",
    )
    yield (
        ranks > 1,
        f"context_parallel_size must be 1 with shear, got {ranks}: the trainer for more scores "
        "rollouts by itself, and each rank holds a part of a rollout",
    )
    for name in ("async_prefetch", "use_data_producer"):
        yield (
            (file.get("trl") or {}).get(name),
            f"trl.{name} must be false with shear, got true: the asynchronous trainer scores "
            "rollouts by itself, without a pass for their hidden states",
        )


def _wanted(file: Mapping[str, Any]) -> bool:
    """Whether the file lists this plugin: the manager keeps those of earlier files, too."""
    plugins = PluginManager.get_instance().plugins
    listed = file.get("plugins") or ()
    return any(isinstance(plugins.get(name), ShearPlugin) for name in listed)
