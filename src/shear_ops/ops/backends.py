"""Which backend computes a call, and why another one does not."""

from __future__ import annotations

import importlib
import os
from importlib.util import find_spec
from typing import Any

import torch

from . import cuda

# Distances a backend can compute; a backend that is absent here computes all of them.
DISTANCES = {
    "cpu": ("sinkhorn", "chamfer", "mmd", "cosine"),
    "cuda": ("sinkhorn", "chamfer"),
    "triton": ("sinkhorn", "chamfer", "mmd", "cosine"),
}
GPUS = ("cuda", "xpu")  # device types of torch; AMD GPUs are "cuda" too
BACKENDS = ("cpu", "cuda", "triton", "reference")


def status() -> dict[str, str | None]:
    """Return each backend's name and None if it can be used here, else the reason why not."""
    return {name: why_not(name) for name in BACKENDS}


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # cannot be traced
def why_not(backend: str) -> str | None:
    """Return None if a backend can be used here, else the reason."""
    return {"cuda": cuda.why_not, "triton": _triton}.get(backend, lambda: None)()


def on_gpu() -> str:
    """Return the backend that is chosen for tensors on an NVIDIA GPU."""
    return "cuda" if why_not("cuda") is None else "triton"


def interpreted() -> bool:
    """Whether Triton kernels run in its interpreter: on the CPU, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _triton() -> str | None:
    if find_spec("triton") is None:
        return "Triton is not installed: pip install 'shear_ops[triton]'"
    if interpreted() or torch.cuda.is_available() or torch.xpu.is_available():
        return None
    return "torch sees no GPU (TRITON_INTERPRET=1 runs the kernels on the CPU, slowly, for tests)"


def choose(backend: str | None, device: torch.device, distance: str, name: str = "hidden") -> str:
    """Return the backend for a call; raise ValueError if there is none or not the wanted one.

    Automatic choice (None) takes the CPU backend for tensors on the CPU, on a GPU the compiled
    CUDA backend or else Triton, and the float64 reference for a distance that only the reference
    has. It never moves or slows down a call in silence: on a device without a backend it raises.
    """
    if backend is None:
        if distance == "exact":
            return "reference"
        if device.type == "cpu":
            return "cpu"
        candidates = {"cuda": ("cuda", "triton"), "xpu": ("triton",)}.get(device.type, ())
        for candidate in candidates:
            if why_not(candidate) is None and distance in DISTANCES[candidate]:
                return candidate
        reasons = "; ".join(f"{n}: {why_not(n) or 'not for ' + distance}" for n in candidates)
        reasons = reasons or "only GPUs of NVIDIA, AMD and Intel have one"
        raise ValueError(
            f"{name} is on {device}, for which there is no backend here ({reasons}): move it "
            "to the CPU, or pass backend='reference' (float64, any device, slow)"
        )
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)} or None, got {backend!r}")
    if (reason := why_not(backend)) is not None:
        raise ValueError(f"backend {backend!r} is not available: {reason}")
    wanted = {"cpu": ("cpu",), "cuda": ("cuda",), "triton": ("cpu",) if interpreted() else GPUS}
    if device.type not in wanted.get(backend, (device.type,)):
        where = "the CPU" if wanted[backend] == ("cpu",) else "a GPU"
        raise ValueError(f"backend {backend!r} wants {name} on {where}, got {device}")
    if distance not in DISTANCES.get(backend, (distance,)):
        raise ValueError(
            f"distance {distance!r} is not computed by backend {backend!r}, "
            f"only {', '.join(DISTANCES[backend])}"
        )
    return backend


def operators(backend: str) -> Any:
    """Return what has the operators of a backend: torch.ops.shear, or its own module."""
    if backend == "triton" and (interpreted() or cuda.LOADED):
        return importlib.import_module("..triton.ops", __package__)
    return torch.ops.shear
