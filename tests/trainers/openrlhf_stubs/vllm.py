"""Stands for vLLM: an engine that answers with random tokens and forgets the weights it gets."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import cuda_calls  # noqa: F401
import torch

__version__ = "0.29.0"


class SamplingParams:
    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)


def AsyncEngineArgs(**values: Any) -> SimpleNamespace:
    return SimpleNamespace(**values)


class AsyncLLMEngine:
    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.output_processor = SimpleNamespace(get_num_unfinished_requests=lambda: 0)

    @classmethod
    def from_engine_args(cls, args: Any) -> AsyncLLMEngine:
        return cls(args.seed)

    async def generate(self, prompt: Any, params: Any, request_id: str) -> Any:
        length = int(torch.randint(5, 16, (1,), generator=self.generator))
        tokens = torch.randint(3, 13, (length,), generator=self.generator).tolist()
        made = SimpleNamespace(token_ids=tokens, text="", finish_reason="stop", logprobs=None)
        yield SimpleNamespace(outputs=[made])

    async def is_sleeping(self) -> bool:
        return False

    async def collective_rpc(self, name: str, args: Any = ()) -> None:
        return None


class _Communicator:
    def __init__(self, group: Any, device: Any) -> None:
        pass

    def broadcast(self, tensor: torch.Tensor, src: int, stream: Any) -> None:
        pass


for name, values in {
    "inputs": {"TokensPrompt": dict},
    "utils": {"random_uuid": lambda: "request"},
    "distributed": {},
    "distributed.utils": {"StatelessProcessGroup": SimpleNamespace(create=lambda **_: None)},
    "distributed.device_communicators": {},
    "distributed.device_communicators.pynccl": {"PyNcclCommunicator": _Communicator},
}.items():
    made = sys.modules[f"vllm.{name}"] = ModuleType(f"vllm.{name}")
    made.__dict__.update(values)
