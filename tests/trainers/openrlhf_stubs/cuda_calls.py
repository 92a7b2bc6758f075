"""torch.cuda's calls in OpenRLHF, on the CPU; imported by the other stubs, so before OpenRLHF."""

from __future__ import annotations

import torch
import torch.distributed.device_mesh as device_mesh


class _Cpu(str):
    """OpenRLHF asks for a GPU; once it makes torch.device(f"cuda:{...}") of it, without use."""

    def __format__(self, spec: str) -> str:
        return "0"


torch.cuda.current_device = lambda: _Cpu("cpu")
torch.cuda.set_device = lambda device: None
torch.cuda.synchronize = lambda: None
torch.cuda.current_stream = lambda: None
_init_device_mesh = device_mesh.init_device_mesh
device_mesh.init_device_mesh = lambda kind, *args, **kwargs: _init_device_mesh(
    "cpu", *args, **kwargs
)
