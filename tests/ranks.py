"""Runs a function on several gloo ranks, each a process of its own."""

from __future__ import annotations

import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run(ranks: int, function: Callable[..., Any], *args: Any, timeout: float = 60) -> list[Any]:
    """What function(rank, *args) returned on each rank; its exception where it raised.

    None for a rank that died. The function must be importable: a spawned process looks it up.
    """
    with tempfile.TemporaryDirectory() as folder:
        context = mp.get_context("spawn")
        processes = [
            context.Process(target=_main, args=(folder, rank, ranks, timeout, function, args))
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(300)
            if process.is_alive():
                process.kill()
                raise TimeoutError(f"{function.__name__} did not end: a rank hangs")
        files = [Path(folder, f"{rank}.pt") for rank in range(ranks)]
        return [torch.load(f, weights_only=False) if f.exists() else None for f in files]


def _main(
    folder: str, rank: int, ranks: int, timeout: float, function: Callable[..., Any], args: Any
) -> None:
    torch.set_num_threads(1)
    os.environ |= {  # as torchrun sets them
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511",
        "GLOO_SOCKET_IFNAME": "lo",
    }  # fmt: skip
    store = dist.FileStore(f"{folder}/store", ranks)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=timeout)
    )
    try:
        result = function(rank, *args)
    except Exception as error:
        traceback.print_exc()
        result = error
    torch.save(result, f"{folder}/{rank}.part")
    os.replace(f"{folder}/{rank}.part", f"{folder}/{rank}.pt")
    if not isinstance(result, Exception):
        dist.barrier()
    dist.destroy_process_group()
