"""Which backend computes a call, and why another one does not."""

from __future__ import annotations

import torch

# Distances a backend can compute; a backend that is absent here computes all of them.
DISTANCES = {"cpu": ("sinkhorn", "chamfer", "mmd", "cosine")}

_NOT_IN_THIS_VERSION = "not part of this version of shear_ops"


def status() -> dict[str, str | None]:
    """Return each backend's name and None if it can be used here, else the reason why not."""
    return {
        "cpu": None,
        "cuda": _NOT_IN_THIS_VERSION,
        "triton": _NOT_IN_THIS_VERSION,
        "reference": None,
    }


def choose(backend: str | None, device: torch.device, distance: str) -> str:
    """Return the backend for a call; raise ValueError if there is none or not the wanted one.

    Automatic choice (None) takes the CPU backend for tensors on the CPU, and the float64 reference
    for a distance that only the reference has. It never moves or slows down a call in silence:
    on a device without a backend it raises.
    """
    available = status()
    if backend is None:
        if distance == "exact":
            return "reference"
        if device.type != "cpu":
            raise ValueError(
                f"hidden is on {device}, for which this version has no backend: move it to the "
                "CPU, or pass backend='reference' (float64, any device, slow)"
            )
        return "cpu"
    if backend not in available:
        raise ValueError(f"backend must be one of {', '.join(available)} or None, got {backend!r}")
    if available[backend] is not None:
        raise ValueError(f"backend {backend!r} is not available: {available[backend]}")
    if backend == "cpu" and device.type != "cpu":
        raise ValueError(f"backend 'cpu' wants hidden on the CPU, got {device}")
    if distance not in DISTANCES.get(backend, (distance,)):
        raise ValueError(
            f"distance {distance!r} is not computed by backend {backend!r}, "
            f"only {', '.join(DISTANCES[backend])}"
        )
    return backend
