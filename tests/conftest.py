from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from shear_ops.ops import backends

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic products on a GPU

if backends.interpreted():
    from interpreter import patch_once

    patch_once()


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fill every tensor that torch allocates empty with NaN, so that an unwritten output shows.

    POISON= (empty) leaves it unwritten, for a tool that sees reads of unwritten memory itself. One
    thread: the reference's many small operations stall when the cores are shared.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = os.environ.get("POISON") != ""
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def two_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)
