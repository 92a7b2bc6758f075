"""The public functions: typed checks, choice of the backend, layout of the result."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import accumulate, pairwise
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from .. import _C, reference
from ..config import (
    CHOICES,
    SpanConfig,
    check_config,
    check_count,
    check_reg,
    check_threshold,
    check_tol,
)
from . import backends
from .batch import (
    INTEGER_DTYPES,
    STATE_DTYPES,
    Batch,
    Integers,
    as_integers,
    check_dense,
    check_states,
)


class PairCounts(NamedTuple):
    """Span pairs of a call: all; skipped by their bound; abandoned; solved; stopped at n_iters."""

    total: int
    bounded: int
    abandoned: int
    solved: int
    stopped: int

    @property
    def stopped_share(self) -> float:
        """Share of the solved pairs that n_iters stopped: their distances have not converged."""
        return self.stopped / self.solved if self.solved else 0.0


class SpanDistances(NamedTuple):
    """What every span found in its opposing set; K spans, rollout by rollout, in order.

    Attributes:
        distance: (K,) float32, the span distance to the nearest span (its mean over the opposing
            set for aggregation="mean"); inf where the opposing set is empty. In units of a token
            cost: not yet divided by the mean norm.
        nearest: (K,) int64, index of that span among the K, -1 where there is none. Spans are
            compared by costs from states rounded to int8, to about 1e-3 of D (docs/method.md): of
            two whose distances differ by less, either may be chosen. The distance itself is not
            rounded.
        residual: (K,) float32, L1 marginal error of that span pair.
        iterations: (K,) int32, Sinkhorn iterations of that span pair; n_iters means that it was
            stopped there, and its distance may be off by more than 2e-3. A span whose own pair
            converged may have missed a nearer one that was stopped: pairs.stopped is 0, or any
            distance may be off.
        rollout, begin, end: (K,) int64, where the span is, in tokens of the packed layout.
        pairs: how many span pairs were skipped, abandoned and solved.
    """

    distance: Tensor
    nearest: Tensor
    residual: Tensor
    iterations: Tensor
    rollout: Tensor
    begin: Tensor
    end: Tensor
    pairs: PairCounts


class SinkhornResult(NamedTuple):
    """Solution of a batch of problems.

    Attributes:
        value: (B,) float32, sharp transport cost <P, C> (POT's ``value_linear``), corrected for the
            marginal error left and never below the certified bounds on W1.
        residual: (B,) float32, L1 marginal error.
        iterations: (B,) int32.
        converged: (B,) bool, False where n_iters stopped it.
    """

    value: Tensor
    residual: Tensor
    iterations: Tensor
    converged: Tensor


class Plan(NamedTuple):
    """What span_weights costs in one call, and what memory a training step takes.

    Attributes:
        spans, mixed_groups, pairs, token_pairs, chunks: counts of one call with all rollouts.
        workspace_bytes: its peak of memory beyond inputs and outputs.
        states_bytes: of the rollouts with labels 1 and 0, as a HiddenBank has them before finalize;
            with group_size it has those of incomplete groups only.
        regrouping_bytes: states of the largest group with both labels, put together from its
            rollouts.
        group_workspace_bytes: the largest workspace of a call with one group. A HiddenBank's peak
            is states_bytes + regrouping_bytes + group_workspace_bytes.
    """

    spans: int
    mixed_groups: int
    pairs: int
    token_pairs: int
    chunks: int
    workspace_bytes: int
    states_bytes: int
    regrouping_bytes: int
    group_workspace_bytes: int


def _checked(
    hidden: Tensor,
    *,
    cu_seqlens: Integers | None,
    mask: Tensor | None,
    group_ids: Integers,
    labels: Integers,
    config: SpanConfig,
    backend: str | None,
) -> tuple[Batch, str]:
    """Check the arguments that span_weights and span_distances share; return the backend, too."""
    check_config(config)
    batch = Batch.of(hidden, cu_seqlens=cu_seqlens, mask=mask, group_ids=group_ids, labels=labels)
    chosen = backends.choose(backend, hidden.device, config.distance)
    if chosen == "reference":
        batch.check_values()
        if config.check_finite:
            with batch.in_callers_words():
                batch.check_finite()
    return batch, chosen


def _weights(batch: Batch, backend: str, config: SpanConfig) -> Tensor:
    """Token weights of a batch, in the layout that it was given in."""
    if backend == "reference":
        weights = reference.span_weights(*batch.tensors(), **asdict(config)).float()
    else:
        operators = backends.operators(backend)
        with batch.in_callers_words():
            weights = operators.span_weights(*batch.tensors(), **config.op_arguments())
    return batch.restore(weights)


def _weights_and_counts(
    batch: Batch, backend: str, config: SpanConfig
) -> tuple[Tensor, PairCounts]:
    if backend == "reference":
        given, parameters = batch.tensors(), asdict(config)
        found = reference.span_distances(*given, **parameters)
        weights = reference.token_weights(found, *given, **parameters).float()
        return batch.restore(weights), PairCounts(*found.pairs)
    operators = backends.operators(backend)
    with batch.in_callers_words():
        weights, pairs = operators.span_weights_and_pairs(*batch.tensors(), **config.op_arguments())
    return batch.restore(weights), _counts(pairs)


def _counts(pairs: Tensor) -> PairCounts:
    return PairCounts(*(int(n) for n in pairs.tolist()))


@overload
def span_weights(
    hidden: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
    group_ids: Integers,
    labels: Integers,
    config: SpanConfig = SpanConfig(),
    backend: str | None = None,
    return_counts: Literal[False] = False,
) -> Tensor: ...


@overload
def span_weights(
    hidden: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
    group_ids: Integers,
    labels: Integers,
    config: SpanConfig = SpanConfig(),
    backend: str | None = None,
    return_counts: Literal[True],
) -> tuple[Tensor, PairCounts]: ...


def span_weights(
    hidden: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
    group_ids: Integers,
    labels: Integers,
    config: SpanConfig = SpanConfig(),
    backend: str | None = None,
    return_counts: bool = False,
) -> Tensor | tuple[Tensor, PairCounts]:
    """Token weights of SHEAR (arXiv 2604.23318, Eq. 2-4, Steps 1-3). Not differentiable.

    Args:
        hidden: last-layer hidden states, (N, d) packed or (B, T, d) padded; float32, float16 or
            bfloat16.
        cu_seqlens: (B + 1,) int32 or int64, offsets of the rollouts in the packed layout.
        mask: (B, T) bool or 0/1, 1 where a padded token is valid; may have holes.
        group_ids: (B,) integers: rollouts of one prompt share an id. Any values, any order.
        labels: (B,) 1 correct, 0 incorrect, -1 ignored (see labels_from_rewards).
        config: parameters of the method.
        backend: None (automatic), "cpu", "cuda", "triton", or "reference" (float64, any device,
            slow).
        return_counts: also count span pairs; on a GPU that waits for the call to end.

    Returns:
        float32 weights, (N,) or (B, T) with 1.0 where masked. Rollouts without an opposing set,
        and ignored ones, have weight 1. With return_counts a pair: weights, PairCounts.

    Raises:
        TypeError, ValueError: naming the argument, the value seen and the value wanted.
    """
    batch, chosen = _checked(
        hidden,
        cu_seqlens=cu_seqlens,
        mask=mask,
        group_ids=group_ids,
        labels=labels,
        config=config,
        backend=backend,
    )
    if return_counts:
        return _weights_and_counts(batch, chosen, config)
    return _weights(batch, chosen, config)


def weighted_advantages(
    advantages: Tensor,
    hidden: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
    group_ids: Integers,
    labels: Integers,
    config: SpanConfig = SpanConfig(),
    backend: str | None = None,
) -> Tensor:
    """Advantages times token weights (Step 4): the sign of an advantage never changes.

    Args:
        advantages: (B,), one per rollout, floating point.
        hidden, cu_seqlens, mask, group_ids, labels, config, backend: as in span_weights.

    Returns:
        (N,) or (B, T), in the wider of advantages' dtype and float32; where the weight is 1 (one
        class in the group, ignored, masked) the advantage as it is.
    """
    if not isinstance(advantages, Tensor) or not advantages.is_floating_point():
        seen = advantages.dtype if isinstance(advantages, Tensor) else type(advantages).__name__
        raise TypeError(f"advantages must be a floating-point tensor, got {seen}")
    check_dense("advantages", advantages)
    batch, chosen = _checked(
        hidden,
        cu_seqlens=cu_seqlens,
        mask=mask,
        group_ids=group_ids,
        labels=labels,
        config=config,
        backend=backend,
    )
    rollouts = batch.labels.shape[0]
    if advantages.shape != (rollouts,):
        raise ValueError(
            f"advantages must have shape ({rollouts},), one per rollout, got "
            f"{tuple(advantages.shape)}"
        )
    if advantages.device != hidden.device:
        raise ValueError(
            f"advantages must be on hidden's device {hidden.device}, got {advantages.device}"
        )
    weights = _weights(batch, chosen, config)
    if batch.mask is not None:
        return advantages[:, None] * weights
    lengths = batch.cu_seqlens.diff().to(advantages.device)
    return advantages.repeat_interleave(lengths, output_size=weights.shape[0]) * weights


def span_distances(
    hidden: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
    group_ids: Integers,
    labels: Integers,
    config: SpanConfig = SpanConfig(),
    backend: str | None = None,
    prune: bool = True,
) -> SpanDistances:
    """Distance of every span to its nearest span in the opposing set, with diagnostics.

    Args:
        hidden, cu_seqlens, mask, group_ids, labels, config, backend: as in span_weights.
        prune: skip span pairs whose bound shows that they cannot be nearest to either span. The
            result is bitwise the same without; only the counts differ.

    Returns:
        SpanDistances; positions refer to the packed layout (valid tokens, rollout by rollout).

    Raises:
        TypeError, ValueError: as span_weights.
    """
    batch, chosen = _checked(
        hidden,
        cu_seqlens=cu_seqlens,
        mask=mask,
        group_ids=group_ids,
        labels=labels,
        config=config,
        backend=backend,
    )
    if chosen == "reference":
        return _reference_distances(batch, config)
    operators = backends.operators(chosen)
    with batch.in_callers_words():
        distance, nearest, residual, iterations, spans, pairs = operators.span_distances(
            *batch.tensors(), **config.op_arguments(), prune=prune
        )
    rollout, begin, end = spans.unbind(1)
    return SpanDistances(
        distance=distance,
        nearest=nearest,
        residual=residual,
        iterations=iterations,
        rollout=rollout,
        begin=begin,
        end=end,
        pairs=_counts(pairs),
    )


def _reference_distances(batch: Batch, config: SpanConfig) -> SpanDistances:
    found = reference.span_distances(*batch.tensors(), **asdict(config))
    return SpanDistances(
        distance=found.distance.float(),
        nearest=found.nearest,
        residual=found.residual.float(),
        iterations=found.iterations.int(),
        rollout=found.rollout,
        begin=found.begin,
        end=found.end,
        pairs=PairCounts(*found.pairs),
    )


def pair_distances(
    x: Tensor,
    y: Tensor,
    *,
    config: SpanConfig = SpanConfig(),
    backend: str | None = None,
) -> Tensor:
    """Span distances of all spans of one rollout to all spans of another (the paper's Fig. 11).

    Args:
        x, y: hidden states (T1, d) and (T2, d) of two rollouts, one dtype.
        config: parameters; the mean norm in which reg counts is that of both rollouts together.
        backend: as in span_weights.

    Returns:
        (K1, K2) float32, in units of a token cost: not divided by the mean norm. Every one is
        computed to the end, from costs that are not rounded to int8.

    Raises:
        TypeError, ValueError: as span_weights.
    """
    check_config(config)
    check_states("x", x, (2,))
    check_states("y", y, (2,))
    if x.dtype != y.dtype or x.shape[1] != y.shape[1] or x.device != y.device:
        raise ValueError(
            f"y must have x's dtype, d and device ({x.dtype}, {x.shape[1]}, {x.device}), "
            f"got ({y.dtype}, {y.shape[1]}, {y.device})"
        )
    chosen = backends.choose(backend, x.device, config.distance, "x")
    if chosen == "reference":
        return reference.pair_distances(x, y, **asdict(config)).float()
    matrix: Tensor = backends.operators(chosen).pair_distances(x, y, **config.op_arguments())
    return matrix


def sinkhorn(
    cost: Tensor | None = None,
    *,
    x: Tensor | None = None,
    y: Tensor | None = None,
    reg: float,
    n_iters: int = 5000,
    tol: float = 5e-3,
    n_rows: Integers | None = None,
    n_cols: Integers | None = None,
    backend: str | None = None,
) -> SinkhornResult:
    """Entropic optimal transport between uniform measures, for a batch of small problems.

    Each problem stops by itself, so a slow one costs the others nothing. Not differentiable.

    Args:
        cost: (B, n, m) or (n, m) costs of any sign; float32, float16 or bfloat16, computed in
            float32. (For float64 use shear_ops.reference.sinkhorn.)
        x, y: instead of cost, points (B, n, d) and (B, m, d); the cost is their Euclidean distance.
        reg: entropic regularisation, in units of the cost (as in POT).
        n_iters: most iterations. tol: as in SpanConfig.
        n_rows, n_cols: (B,) rows and columns in use of each problem, for ragged batches.
        backend: None (automatic), "cpu", "cuda" or "triton".

    Returns:
        SinkhornResult; 0-d tensors for a 2-d cost.

    Raises:
        TypeError, ValueError: naming the argument, the value seen and the value wanted.
    """
    check_reg(reg)
    check_tol(tol)
    check_count("n_iters", n_iters)
    given = [name for name, value in (("cost", cost), ("x", x), ("y", y)) if value is not None]
    if given not in (["cost"], ["x", "y"]):
        raise ValueError("give either cost, or both x and y")
    if cost is None:
        x = _only_used(check_states("x", x, (3,)), "n_rows", n_rows)
        y = _only_used(check_states("y", y, (3,)), "n_cols", n_cols)
        cost = _euclidean(x, y)
    check_states("cost", cost, (2, 3))
    if backend == "reference":
        raise ValueError("backend must not be 'reference' here: call shear_ops.reference.sinkhorn")
    chosen = backends.choose(backend, cost.device, "sinkhorn", "cost")
    batch = cost[None] if cost.dim() == 2 else cost
    if not torch.compiler.is_compiling() and batch.shape[1] < 1:
        raise ValueError(f"cost must have at least one row, got shape {tuple(cost.shape)}")
    problems, rows, columns = batch.shape
    n, m = _in_use("n_rows", n_rows, problems, rows), _in_use("n_cols", n_cols, problems, columns)
    with _naming_the_problem(batch, x, y, n, m, reg):
        value, residual, iterations = backends.operators(chosen).sinkhorn(
            batch.float(), n, m, reg=reg, n_iters=n_iters, tol=tol
        )
    result = SinkhornResult(value, residual, iterations, converged=iterations < n_iters)
    return SinkhornResult(*(t[0] for t in result)) if cost.dim() == 2 else result


@contextmanager
def _naming_the_problem(
    cost: Tensor,
    x: Tensor | None,
    y: Tensor | None,
    n_rows: Tensor | None,
    n_cols: Tensor | None,
    reg: float,
) -> Iterator[None]:
    """Where the operator refuses a cost, say of which problem, and whether x or y are why."""
    try:
        yield
    except ValueError as error:
        if str(error) != _C.bad_cost():
            raise
        for name, points in (("x", x), ("y", y)):
            if points is not None and not bool((finite := points.isfinite().all(2)).all()):
                problem, point = (~finite).nonzero()[0].tolist()
                what = f"{name} must be finite, got NaN or Inf at {name}[{problem}, {point}]"
                raise ValueError(what) from None
        used = torch.ones_like(cost, dtype=torch.bool)
        for lengths, dim in ((n_rows, 1), (n_cols, 2)):
            if lengths is not None:
                place = torch.arange(cost.shape[dim], device=cost.device)
                inside = place < lengths.to(cost.device)[:, None]
                used &= inside[:, :, None] if dim == 1 else inside[:, None]
        bad = used & ~(cost.abs() < _C.most_cost(reg))
        problem = int(bad.nonzero()[0, 0])
        where = f" in problem {problem}" if len(cost) > 1 else ""
        raise ValueError(f"{error}{where}") from None


def _in_use(name: str, given: Integers | None, problems: int, size: int) -> Tensor | None:
    """Check how many rows or columns of each problem are in use: (B,) integers in [1, size]."""
    if given is None:
        return None
    lengths = as_integers(name, given, problems)
    # compiled, the operator alone looks at the values
    if not torch.compiler.is_compiling() and bool(((lengths < 1) | (lengths > size)).any()):
        raise ValueError(f"{name} must be in [1, {size}], got {lengths.tolist()}")
    return lengths


def _only_used(points: Tensor, name: str, given: Integers | None) -> Tensor:
    """Points (B, k, d) with zeros for those not in use: they have no part in a problem's unit."""
    lengths = _in_use(name, given, points.shape[0], points.shape[1])
    if lengths is None:
        return points
    place = torch.arange(points.shape[1], device=points.device)
    unused = place >= lengths.to(points.device)[:, None]
    return points.masked_fill(unused[:, :, None], 0.0)


def _euclidean(x: Tensor, y: Tensor) -> Tensor:
    if x.shape[0] != y.shape[0] or x.shape[2] != y.shape[2] or x.device != y.device:
        raise ValueError(
            f"y must have x's batch and dimension ({x.shape[0]}, m, {x.shape[2]}) and device "
            f"{x.device}, got {tuple(y.shape)} on {y.device}"
        )
    # not the Gram form: it loses the small costs of near-duplicates to cancellation
    x, y, unit = x.float(), y.float(), x.new_ones(x.shape[0], 1, 1, dtype=torch.float32)
    if x.shape[1] > 0 and y.shape[1] > 0:
        # squares leave float32 where distances do not: each problem in a power of two of its own
        peak = torch.maximum(x.abs().amax((1, 2)), y.abs().amax((1, 2)))
        unit = torch.exp2(torch.frexp(peak).exponent.clamp(-126, 126).float())[:, None, None]
    mode = "donot_use_mm_for_euclid_dist"
    return torch.cdist(x / unit, y / unit, compute_mode=mode) * unit


def labels_from_rewards(rewards: Tensor | Sequence[float], threshold: float = 0.5) -> Tensor:
    """Labels of rollouts from their rewards.

    Args:
        rewards: (B,) numbers, a tensor or a sequence.
        threshold: a rollout is correct if its reward is at least this.

    Returns:
        (B,) int8: 1 correct, 0 incorrect, -1 where the reward is NaN (unscorable).

    Raises:
        TypeError, ValueError: naming the argument, the value seen and the value wanted.
    """
    if not isinstance(rewards, Tensor):
        try:
            rewards = torch.as_tensor(rewards, device="cpu")
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"rewards must be numbers, got {rewards!r:.60}") from error
    check_dense("rewards", rewards)
    if not rewards.is_floating_point() and rewards.dtype not in INTEGER_DTYPES:
        raise TypeError(f"rewards must be real numbers, got {rewards.dtype}")
    if rewards.dim() != 1:
        raise ValueError(f"rewards must be 1-d, got shape {tuple(rewards.shape)}")
    check_threshold(threshold)
    labels = (rewards >= threshold).to(torch.int8)
    return labels.masked_fill(rewards.isnan(), -1)


def plan(
    cu_seqlens: Integers,
    *,
    group_ids: Integers,
    labels: Integers,
    dim: int,
    dtype: torch.dtype = torch.float32,
    config: SpanConfig = SpanConfig(),
    threads: int | None = None,
) -> Plan:
    """What span_weights or a HiddenBank will do on the CPU and allocate, without doing it.

    Args:
        cu_seqlens, group_ids, labels, config: as in span_weights.
        dim: hidden dimension d. dtype: of the hidden states.
        threads: default torch.get_num_threads(); each has scratch of its own.

    Raises:
        TypeError, ValueError: as span_weights.
    """
    check_config(config)
    check_count("dim", dim)
    if threads is not None:
        check_count("threads", threads)
    if dtype not in STATE_DTYPES:
        raise TypeError(f"dtype must be float32, float16 or bfloat16, got {dtype}")
    backends.choose("cpu", torch.device("cpu"), config.distance)
    offsets: list[int] = as_integers("cu_seqlens", cu_seqlens).tolist()
    groups: list[int] = as_integers("group_ids", group_ids).tolist()
    truth: list[int] = as_integers("labels", labels).tolist()

    def counts(offsets: list[int], groups: list[int], truth: list[int]) -> dict[str, Any]:
        found: dict[str, Any] = _C.plan(
            offsets, groups, truth,
            tokens=offsets[-1] if offsets else 0,
            dim=dim,
            span=config.span,
            stride=config.stride,
            distance=CHOICES["distance"].index(config.distance),
            threads=torch.get_num_threads() if threads is None else threads,
        )  # fmt: skip
        return found

    whole = counts(offsets, groups, truth)  # checks them all
    taking: dict[int, list[tuple[int, int]]] = {}  # (label, tokens)
    for group, label, (begin, end) in zip(groups, truth, pairwise(offsets), strict=True):
        if label >= 0 and end > begin:
            taking.setdefault(group, []).append((int(label), end - begin))
    mixed = {tuple(members) for members in taking.values() if len(dict(members)) == 2}

    def workspace(members: tuple[tuple[int, int], ...]) -> int:
        own, lengths = zip(*members, strict=True)
        return int(counts([0, *accumulate(lengths)], [0] * len(own), [*own])["workspace_bytes"])

    row = dim * dtype.itemsize
    return Plan(
        **whole,
        states_bytes=row * sum(t for members in taking.values() for _, t in members),
        regrouping_bytes=row * max((sum(t for _, t in members) for members in mixed), default=0),
        group_workspace_bytes=max(map(workspace, mixed), default=0),
    )
