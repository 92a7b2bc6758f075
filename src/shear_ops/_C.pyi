from collections.abc import Sequence
from typing import Any

def build_info() -> dict[str, Any]: ...
def cpu_isa() -> str: ...
def plan(
    cu_seqlens: Sequence[int],
    group_ids: Sequence[int],
    labels: Sequence[int],
    *,
    dim: int,
    span: int,
    stride: int,
    distance: int,
    tokens: int,
    threads: int,
) -> dict[str, Any]: ...
def make_plan(
    cu_seqlens: Sequence[int],
    group_ids: Sequence[int],
    labels: Sequence[int],
    *,
    dim: int,
    span: int,
    stride: int,
    distance: int,
    tokens: int,
    bytes_per_pair: int,
) -> dict[str, Any]: ...
def check_config(
    *,
    span: int,
    stride: int,
    reg: float,
    n_iters: int,
    tol: float,
    reg_unit: int,
    distance: int,
    normalization: int,
    pooling: int,
    aggregation: int,
) -> None: ...
def device_plan(
    cu_seqlens: Sequence[int],
    group_ids: Sequence[int],
    labels: Sequence[int],
    *,
    dim: int,
    span: int,
    stride: int,
    distance: int,
    tokens: int,
    processors: int,
    shared_bytes: int,
) -> dict[str, Any]: ...
