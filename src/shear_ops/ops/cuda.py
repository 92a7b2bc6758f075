"""The compiled CUDA module: loaded if this torch can use it, else the reason why not."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from .. import _C


def runs_on(capability: tuple[int, int], architectures: str) -> bool:
    """Whether code for these CMake architectures runs on a device.

    Machine code ("80-real") runs on later devices of the same major version, PTX ("80-virtual") on
    all later ones; "80" is both; "90a" runs on that device only. Names without a number ("native")
    are taken on trust: CUDA says at the first launch if it has no code.
    """
    for architecture in architectures.split():
        match = re.fullmatch(r"(\d+)([af]?)(-real|-virtual|)", architecture)
        if match is None:
            return True
        digits, specific, kind = match.groups()
        built = divmod(int(digits), 10)
        if specific:
            if capability == built:
                return True
            continue
        if kind != "-real" and capability >= built:
            return True
        if kind != "-virtual" and capability[0] == built[0] and capability >= built:
            return True
    return False


def _load() -> str | None:
    info = _C.build_info()
    if info["cuda_toolkit"] is None:
        return "this build of shear_ops has no CUDA module: nvcc was not found, or SHEAR_CUDA=OFF"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is not a CUDA build"
    toolkit = info["cuda_toolkit"]
    if torch.version.cuda.split(".")[0] != toolkit.split(".")[0]:
        return f"built with CUDA {toolkit}, but torch has CUDA {torch.version.cuda}"
    try:
        # beside _C, not beside this file: an editable install keeps libraries in the build tree
        path = Path(_C.__file__ or "").with_name("shear_cuda.so")
        torch.ops.load_library(path)  # type: ignore[no-untyped-call]
    except OSError as error:
        return f"the CUDA module does not load: {error}"
    return None


_WHY_NOT_LOADED = _load()
LOADED = _WHY_NOT_LOADED is None  # then torch.ops.shear on NVIDIA GPUs is this module's


def why_not() -> str | None:
    """Return None if the CUDA backend can be used on the current device, else the reason."""
    if _WHY_NOT_LOADED is not None:
        return _WHY_NOT_LOADED
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    # asking for the device's capability would initialise it, which forbids forking
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return None
    capability = torch.cuda.get_device_capability()
    architectures = _C.build_info()["cuda_architectures"]
    if not runs_on(capability, architectures):
        return "compute capability {}.{} is not among those compiled: {}".format(
            *capability, architectures
        )
    return None
