"""The steps of one call: states -> token costs -> bounds -> sinkhorn -> nearest spans -> token
weights; from int8 rows, with a second look at the nearest spans.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.profiler import record_function

from .. import _C
from . import bounds, nearest, queue, second_look
from .nearest import Nearest, Pairs
from .rounding import Rows, round_states
from .span_means import cosine_distances, span_means
from .states import States, measure
from .tables import Chunk, Tables
from .tasks import TOKENS
from .token_cost import token_costs
from .token_weights import token_weights_kernel

SINKHORN, CHAMFER, MMD, COSINE = (
    _C.CHOICES["distance"].index(name) for name in ("sinkhorn", "chamfer", "mmd", "cosine")
)
BYTES_PER_PAIR = 40  # value, residual, iterations, and what sorting them takes


@dataclass(frozen=True)
class Options:
    """The keyword arguments of torch.ops.shear."""

    span: int
    stride: int
    reg: float
    n_iters: int
    tol: float
    reg_unit: int
    distance: int
    normalization: int
    pooling: int
    aggregation: int
    check_finite: bool
    prune: bool

    def chose(self, option: str, name: str) -> bool:
        """Whether an option has the value of this name."""
        return bool(getattr(self, option) == _C.CHOICES[option].index(name))


@dataclass(frozen=True)
class Found:
    """What a call found; counts: (5,) int64 pairs in all, bounded, abandoned, solved, stopped."""

    states: States
    nearest: Nearest
    counts: Tensor


def run(
    hidden: Tensor,
    tables: Tables,
    options: Options,
    offer: Callable[[int, Tensor], None] | None = None,
) -> Found:
    """Find the nearest spans; offer: called with the values of the pairs of every chunk."""
    norm_range = _C.norm_range(options.distance, options.reg_unit, options.reg)
    states = measure(hidden, tables, center=options.distance != COSINE, norm_range=norm_range)
    known = span_means(states, tables) if options.distance == COSINE else states
    found = nearest.nothing_found(tables)
    best = found.distance.clone().view(torch.int32)  # bits of +inf
    counts = torch.zeros(5, dtype=torch.int64, device=hidden.device)
    if tables.chunks:
        counts[0].fill_(sum(chunk.pairs.total for chunk in tables.chunks))  # a[0] = n would wait
    room = _Room(tables, options, hidden.device)
    _look(known, tables, room, found, best, counts, options, offer=offer)
    if tables.second is not None:
        shows = _look_again(known, tables, tables.second, room, found, best, counts, options)
        _look_exactly(known, tables, room, found, best, counts, options, shows)
    mean = options.chose("aggregation", "mean")
    return Found(states, found.mean() if mean else found, counts)


def _look(
    states: States, tables: Tables, room: _Room, found: Nearest, best: Tensor, counts: Tensor,
    options: Options, *, offer: Callable[[int, Tensor], None] | None = None,
    shows: Tensor | None = None,
) -> None:  # fmt: skip
    """Find the nearest spans: of all groups, from int8 rows if there are any.

    Or of the groups whose rounding shows (G,), from float32 products; the others have no norm then.
    """
    mean = options.chose("aggregation", "mean")
    rows = room.rows if shows is None else None
    self_similarity = _self_similarity(states, tables, room) if options.distance == MMD else None
    for number, chunk in enumerate(tables.chunks):
        pairs = room.pairs(chunk.pairs.total)
        if options.distance == COSINE:
            token_costs(states, chunk, pairs.value)
            cosine_distances(states, chunk, pairs.value)
        else:
            if rows is not None:
                with record_function("shear::states"):
                    round_states(states.hidden, states.center, states.group_norm, chunk, rows)
            with record_function("shear::token_costs"):
                token_costs(states, chunk, room.costs, rows)
            with record_function("shear::bounds"):
                _reduce(states, tables, chunk, room, pairs.value, options.distance, self_similarity)
        with record_function("shear::solve"):
            if options.distance == SINKHORN:
                _solve(
                    states, tables, chunk, room, pairs, best, counts[1:], options,
                    prune=options.prune and not mean,
                )  # fmt: skip
            else:
                counts[3].add_(chunk.pairs.total)
        with record_function("shear::nearest_spans"):
            nearest.collect(tables, chunk, pairs, found, mean=mean, shows=shows)
        if offer is not None:
            offer(number, pairs.value)


def _solve(
    states: States, tables: Tables, chunk: Chunk, room: _Room, pairs: Pairs, best: Tensor,
    counts: Tensor, options: Options, *, prune: bool,
) -> None:  # fmt: skip
    queue.solve(
        tables, chunk, states.group_norm, room.costs, pairs, best, counts,
        reg=options.reg, unit_is_norm=options.chose("reg_unit", "mean_norm"),
        n_iters=options.n_iters, tol=options.tol, prune=prune,
    )  # fmt: skip


def _look_again(
    states: States, tables: Tables, template: Chunk, room: _Room, found: Nearest, best: Tensor,
    counts: Tensor, options: Options,
) -> Tensor:  # fmt: skip
    """Solve every span and its nearest one by token costs from the exact product.

    Returns for every group (G,) whether rounding shows in one of its distances.
    """
    # one more group, without a scale: that of blocks which have no pair
    norm = torch.cat([states.group_norm, states.group_norm.new_zeros(1)])
    known = states._replace(group_norm=norm)
    shows = torch.zeros_like(norm, dtype=torch.int32)
    # apart from those of a call, which tell what the first look did, but for pairs that are stopped
    own = torch.zeros(4, dtype=torch.int64, device=norm.device)
    with record_function("shear::second_look"):
        for begin in range(0, len(tables.spans), len(template.blocks)):
            chunk = second_look.nearest_pairs(tables, template, found, begin)
            pairs = room.pairs(chunk.pairs.total)
            token_costs(known, chunk, room.costs)
            _reduce(known, tables, chunk, room, pairs.value, SINKHORN, None)
            _solve(known, tables, chunk, room, pairs, best, own, options, prune=False)
            second_look.keep(
                tables, norm, pairs, found, shows, counts[4:], begin, reg=options.reg,
                unit_is_norm=options.chose("reg_unit", "mean_norm"), n_iters=options.n_iters,
            )  # fmt: skip
    return shows[:-1] != 0


def _look_exactly(
    states: States, tables: Tables, room: _Room, found: Nearest, best: Tensor, counts: Tensor,
    options: Options, shows: Tensor,
) -> None:  # fmt: skip
    """Look once more, from float32 products, at the groups in which rounding shows.

    Which these are, only the device knows: where there are none, every launch of a look is made for
    programs that leave at once, and the bounds of all pairs, zeros, are sorted.
    """
    nearest.forget(tables, found, best, shows)
    known = states._replace(group_norm=states.group_norm * shows)
    own = torch.zeros_like(counts)
    _look(known, tables, room, found, best, own, options, shows=shows)
    counts[4:].add_(own[4:])


class _Room:
    """Workspace, as large as the largest chunk."""

    def __init__(self, tables: Tables, options: Options, device: torch.device) -> None:
        second = [] if tables.second is None else [tables.second]
        solved = [*tables.chunks, *second]
        tokens = [] if options.distance == COSINE else [*solved, *tables.self_chunks]
        self.device = device
        self.costs = self.new(max((c.cost_floats for c in tokens), default=0))
        self.windows = self.new(max((c.window_floats for c in tokens), default=0))
        self.most = max((c.pairs.total for c in solved), default=0)
        self.rows = None
        if tables.row_bytes > 0:
            places = max((c.places for c in tables.chunks), default=0)
            rows = self.new(places * tables.row_bytes, torch.int8)
            self.rows = Rows(rows.view(places, tables.row_bytes), self.new(places))
        self.solved = Pairs(
            self.new(self.most), self.new(self.most), self.new(self.most, torch.int32)
        )

    def new(self, size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(size, dtype=dtype, device=self.device)

    def pairs(self, total: int) -> Pairs:
        pairs = Pairs(*(t[:total] for t in self.solved))
        pairs.residual.zero_()
        pairs.iterations.zero_()
        return pairs


def _reduce(
    states: States, tables: Tables, chunk: Chunk, room: _Room, values: Tensor, distance: int,
    self_similarity: Tensor | None,
) -> None:  # fmt: skip
    """Token costs to bounds, or for the distances made of the same reductions to distances."""
    norm, spans, longest = states.group_norm, tables.spans, tables.longest
    for columns in (False,) if distance == MMD else (False, True):
        bounds.windows(
            norm, spans, chunk, room.costs, room.windows, None, columns=columns,
            what=bounds.SIMILARITY if distance == MMD else bounds.MINIMUM, longest=longest,
        )  # fmt: skip
        bounds.means(
            norm, spans, chunk, room.windows, values, self_similarity, columns=columns,
            what={MMD: bounds.MMD, CHAMFER: bounds.CHAMFER}.get(distance, bounds.BOUND),
            longest=longest,
        )  # fmt: skip


def _self_similarity(states: States, tables: Tables, room: _Room) -> Tensor:
    """mmd: the mean of k(x, x') over the token pairs of every span."""
    out = room.new(len(tables.spans))
    for chunk in tables.self_chunks:
        token_costs(states, chunk, room.costs)
        _reduce(states, tables, chunk, room, out, MMD, None)
    return out


def token_weights(found: Found, tables: Tables, options: Options) -> Tensor:
    """Weights (N,) of the tokens."""
    states = found.states
    weights = torch.empty(len(states.hidden), dtype=torch.float32, device=states.hidden.device)
    if tables.tokens.total:
        token_weights_kernel[tables.tokens.total,](
            tables.rollouts, tables.spans, tables.tokens.first, len(tables.rollouts),
            found.nearest.distance, states.group_norm, states.rollout_norm, weights,
            BY_GROUP=options.chose("normalization", "group"), T=TOKENS,
            MAXIMUM=options.chose("pooling", "max"),
        )  # fmt: skip
    return weights
