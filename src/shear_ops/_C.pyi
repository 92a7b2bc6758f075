from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

COLUMNS: dict[str, tuple[str, ...]]
CHOICES: dict[str, tuple[str, ...]]
SOLVER: dict[str, Any]
ROUNDING: dict[str, Any]
STATIC_SHARED_BYTES: int
NEAR_DUPLICATE: float
NEAR_ROUNDED: float
LEAST_ROLLOUT_NORM: float
MOST_NORM: float
LEAST_NORM: float
FAINT_NORM: float

def omega_of(level: int) -> float: ...
def next_level(level: int, ratio: float) -> int: ...
def tolerance(tol: float, entropy: float, eps: float, distance: float) -> float: ...
def entropy_term(eps: float, log_longest: float) -> float: ...
def may_hide(n: int, m: int, tol: float) -> bool: ...
def travel(n: int, m: int, tol: float, entropy: float, eps: float, range: float) -> float: ...
def first_heat(range: float) -> float: ...
def stopped_warning(stopped: int, solved: int, n_iters: int) -> str: ...
def check_batch(
    cu_seqlens: Sequence[int],
    group_ids: Sequence[int],
    labels: Sequence[int],
    *,
    tokens: int,
) -> None: ...
def build_info() -> dict[str, Any]: ...
def cpu_isa() -> str: ...
def int8_rows(
    states: NDArray[np.float32],
) -> tuple[NDArray[np.int8], NDArray[np.float32], NDArray[np.float32]]: ...
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
def not_finite(token: int, cu_seqlens: Sequence[int], group_ids: Sequence[int]) -> str: ...
def norm_range(distance: int, reg_unit: int, reg: float) -> tuple[float, float]: ...
def unfit_norm(norm: float, group: int | None, reg: float) -> str: ...
def bad_cost() -> str: ...
def most_cost(reg: float) -> float: ...
def make_plan(
    cu_seqlens: Sequence[int],
    group_ids: Sequence[int],
    labels: Sequence[int],
    *,
    dim: int,
    span: int,
    stride: int,
    distance: int,
    aggregation: int,
    every_pair: bool,
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
