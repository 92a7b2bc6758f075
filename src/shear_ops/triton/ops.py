"""The operators of torch.ops.shear in Triton, with the arguments of their schemas (csrc/ops.cpp).

The checks here keep memory safe for callers of torch.ops; the typed errors of the Python functions
come from ops/batch.py.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Hashable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import _C
from ..ops.backends import GPUS, interpreted
from ..ops.batch import (
    capturing,
    check_op_cost,
    check_op_integers,
    check_op_pair,
    check_op_states,
)
from . import bounds, queue
from .columns import (
    BLOCK_BEGIN,
    BLOCK_END,
    COL_SPAN,
    COL_SPANS,
    PAIR_OFFSET,
    ROLLOUT_GROUP,
    ROLLOUT_SPAN_END,
    ROW_SPAN,
    ROW_SPANS,
    SPAN_BEGIN,
    SPAN_END,
    SPAN_ROLLOUT,
)
from .nearest import Pairs
from .pipeline import BYTES_PER_PAIR, COSINE, MMD, Found, Options, run, token_weights
from .states import NO_GROUP
from .tables import Tables, problem_tables, tables_of

RECENT = 4  # tables that are kept for calls with the same lengths, groups and labels
COST = _C.CHOICES["reg_unit"].index("cost")
_recent: OrderedDict[Hashable, Tables] = OrderedDict()
_captured: dict[Hashable, Tables] = {}  # graphs read them for as long as they live
_said_stopped = False  # once per process


def span_weights(
    hidden: Tensor, cu_seqlens: Tensor, group_ids: Tensor, labels: Tensor, **options: Any
) -> Tensor:
    """Token weights (N,) float32."""
    return span_weights_and_pairs(hidden, cu_seqlens, group_ids, labels, **options)[0]


def span_weights_and_pairs(
    hidden: Tensor, cu_seqlens: Tensor, group_ids: Tensor, labels: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    """Token weights (N,) float32, and counts of pairs as in span_distances."""
    with _on(hidden):
        given, tables = _prepare(hidden, cu_seqlens, group_ids, labels, options)
        found = run(hidden.contiguous(), tables, given)
        weights = token_weights(found, tables, given)
        _check_finite(found, tables, given, cu_seqlens, group_ids)
    return weights, found.counts


def span_distances(
    hidden: Tensor, cu_seqlens: Tensor, group_ids: Tensor, labels: Tensor, **options: Any
) -> tuple[Tensor, ...]:
    """Distance, nearest span, residual, iterations, (rollout, begin, end), counts of pairs."""
    with _on(hidden):
        given, tables = _prepare(hidden, cu_seqlens, group_ids, labels, options)
        found = run(hidden.contiguous(), tables, given)
        _check_finite(found, tables, given, cu_seqlens, group_ids)
    best = found.nearest
    column = tables.spans.unbind(1)
    places = torch.stack([column[SPAN_ROLLOUT], column[SPAN_BEGIN], column[SPAN_END]], 1)
    return best.distance, best.span, best.residual, best.iterations, places, found.counts


def pair_distances(x: Tensor, y: Tensor, **options: Any) -> Tensor:
    """Span distances (K1, K2) of all spans of one rollout to all of another."""
    check_op_pair(x, y)
    _check_on_gpu("x", x)
    hidden = torch.cat([x, y])
    offsets = torch.tensor([0, len(x), len(hidden)], device="cpu")
    with _on(hidden):
        options["prune"] = False
        given, tables = _prepare(
            hidden,
            offsets,
            torch.tensor([0, 0], device="cpu"),
            torch.tensor([1, 0], device="cpu"),
            options,
            every_pair=True,
        )
        rollouts, blocks = tables.host["rollouts"], tables.host["blocks"]
        rows, spans = int(rollouts[0, ROLLOUT_SPAN_END]), len(tables.host["spans"])
        matrix = hidden.new_empty((rows, spans - rows), dtype=torch.float32)
        chunks = tables.host["chunks"]

        def offer(number: int, values: Tensor) -> None:
            chunk = chunks[number]
            for block in blocks[chunk[BLOCK_BEGIN] : chunk[BLOCK_END]]:
                row, n, col, m = (block[c] for c in (ROW_SPAN, ROW_SPANS, COL_SPAN, COL_SPANS))
                part = values[block[PAIR_OFFSET] :][: n * m].view(n, m)
                matrix[row : row + n, col - rows : col - rows + m] = part

        found = run(hidden, tables, given, offer)
        _check_finite(found, tables, given, offsets, offsets[:0])
    return matrix


def sinkhorn(
    cost: Tensor,
    n_rows: Tensor | None = None,
    n_cols: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Value, residual and iterations (B,) of transport problems, costs (B, n, m)."""
    given = {**_defaults("sinkhorn"), **options}
    reg, n_iters, tol = given["reg"], given["n_iters"], given["tol"]
    _check_config(
        {**_defaults("span_weights"), "reg_unit": COST, "reg": reg, "n_iters": n_iters, "tol": tol}
    )
    check_op_cost(cost)
    _check_on_gpu("cost", cost)
    if capturing(cost):
        raise RuntimeError("sinkhorn cannot be captured in a graph: it reads back a check of cost")
    batch, n, m = cost.shape
    device = cost.device
    rows = _lengths("n_rows", n_rows, cost, n)
    cols = _lengths("n_cols", n_cols, cost, m)
    pairs = Pairs(
        cost.new_empty(batch), cost.new_zeros(batch),
        cost.new_zeros(batch, dtype=torch.int32),
    )  # fmt: skip
    if batch == 0:
        return tuple(pairs)  # type: ignore[return-value]
    with _on(cost):
        costs = cost.contiguous()
        tables = problem_tables(rows, cols, n, m, device)
        chunk, longest = tables.chunks[0], tables.longest
        one, most = cost.new_ones(1), _C.most_cost(reg)
        flag = torch.zeros(1, dtype=torch.int32, device=device)
        room = cost.new_empty(chunk.window_floats)
        for columns in (False, True):
            bounds.windows(one, tables.spans, chunk, costs, room, flag, columns=columns,
                           what=bounds.MINIMUM, longest=longest, most=most)  # fmt: skip
            bounds.means(one, tables.spans, chunk, room, pairs.value, None, columns=columns,
                         what=bounds.BOUND, longest=longest)  # fmt: skip
        counts = torch.zeros(4, dtype=torch.int64, device=device)
        best = torch.zeros(2 * batch, dtype=torch.int32, device=device)  # not used
        queue.solve(tables, chunk, one, costs, pairs, best, counts, reg=reg, unit_is_norm=False,
                    n_iters=n_iters, tol=tol, prune=False)  # fmt: skip
        if int(flag):
            raise ValueError(_C.bad_cost())
    return tuple(pairs)  # type: ignore[return-value]


@cache
def _defaults(operator: str) -> dict[str, Any]:
    """The defaults of a schema: torch does not pass what equals them."""
    arguments = getattr(torch.ops.shear, operator).default._schema.arguments
    return {a.name: a.default_value for a in arguments if a.has_default_value()}


def _check_config(options: dict[str, Any]) -> None:
    _C.check_config(**{k: v for k, v in options.items() if k not in ("check_finite", "prune")})


def _prepare(
    hidden: Tensor, cu_seqlens: Tensor, group_ids: Tensor, labels: Tensor, options: dict[str, Any],
    *, every_pair: bool = False,
) -> tuple[Options, Tables]:  # fmt: skip
    given = Options(**{**_defaults("span_weights"), **options})
    _check_config(vars(given))
    check_op_states("hidden", hidden)
    _check_on_gpu("hidden", hidden)
    in_graph = capturing(hidden)
    if in_graph and given.check_finite:
        raise RuntimeError(
            "check_finite must be False while a graph is captured, got True: it reads back a flag"
        )
    integers = [
        _integers(name, tensor, hidden, in_graph)
        for name, tensor in (
            ("cu_seqlens", cu_seqlens), ("group_ids", group_ids), ("labels", labels),
        )
    ]  # fmt: skip
    key = (
        *(tuple(values) for values in integers), given.span, given.stride, given.distance,
        given.aggregation, every_pair, hidden.device, hidden.shape,
    )  # fmt: skip
    tables = _captured.get(key) or _recent.get(key)
    if in_graph:
        if tables is None:
            raise RuntimeError(
                "while a graph is captured nothing can be copied to the device: make the same call "
                "once before, with the same cu_seqlens, group_ids, labels, span, stride, distance, "
                "aggregation and number of dimensions"
            )
        _captured[key] = tables
    elif tables is None:
        plan = _C.make_plan(
            *integers, dim=hidden.shape[1], span=given.span, stride=given.stride,
            distance=given.distance, aggregation=given.aggregation, every_pair=every_pair,
            tokens=len(hidden), bytes_per_pair=BYTES_PER_PAIR,
        )  # fmt: skip
        tables = tables_of(
            plan, hidden.device, of_means=given.distance == COSINE, with_self=given.distance == MMD
        )
        _recent[key] = tables
        if len(_recent) > RECENT:
            _recent.popitem(last=False)
    return given, tables


def _check_finite(
    found: Found, tables: Tables, given: Options, cu_seqlens: Tensor, group_ids: Tensor
) -> None:
    """The only point at which a call waits for the device; warns of stopped pairs, once."""
    global _said_stopped
    if not given.check_finite:
        return
    token, faint = torch.cat([found.states.bad_token, found.states.unfit_group]).tolist()
    if token < len(found.states.hidden):
        raise ValueError(_C.not_finite(token, cu_seqlens.tolist(), group_ids.tolist()))
    if faint < NO_GROUP:
        norm = float(np.array(faint & 0xFFFFFFFF, np.uint32).view(np.float32))
        rollouts = tables.host["rollouts"]
        member = int((rollouts[:, ROLLOUT_GROUP] == faint >> 32).argmax())
        group = int(group_ids[member]) if len(group_ids) else None
        raise ValueError(_C.unfit_norm(norm, group, given.reg))
    *_, solved, stopped = found.counts.tolist()
    if stopped and not _said_stopped:
        _said_stopped = True
        warnings.warn(_C.stopped_warning(stopped, solved, given.n_iters), stacklevel=2)


def _check_on_gpu(name: str, tensor: Tensor) -> None:
    if tensor.device.type not in (("cpu",) if interpreted() else GPUS):
        raise ValueError(f"{name} must be on the GPU, got {tensor.device}")


def _integers(name: str, tensor: Tensor, like: Tensor, in_graph: bool) -> list[int]:
    check_op_integers(name, tensor, like)
    if in_graph and tensor.device.type != "cpu":
        raise RuntimeError(
            f"{name} must be on the CPU while a graph is captured, got {tensor.device}"
        )
    values: list[int] = tensor.tolist()
    return values


def _lengths(name: str, given: Tensor | None, cost: Tensor, size: int) -> np.ndarray[Any, Any]:
    if given is None:
        return np.full(len(cost), size, np.int64)
    lengths = np.array(_integers(name, given, cost, in_graph=False), np.int64)
    if len(lengths) != len(cost):
        raise ValueError(f"{name} must have one entry per problem")
    if ((lengths < 1) | (lengths > size)).any():
        raise ValueError(f"{name} must be in [1, {size}], got {lengths.tolist()}")
    return lengths


def _on(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
