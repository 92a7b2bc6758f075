"""HiddenBank: groups computed as soon as they are complete, budgets, exchanges in pieces."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import ranks
from problems import Text
from shear_ops import BankedWeights, HiddenBank, SpanConfig, Weighting, distributed, span_weights
from shear_ops.ops.api import PairCounts
from shear_ops.training import bank as bank_module
from shear_ops.training import link

DIM, SIZE = 72, 4  # wide enough to be rounded to int8
CONFIG = SpanConfig(span=20, stride=6)
WEIGHTING = Weighting(mean_one=True, warmup_steps=4)

# Group 2 is all correct, group 3 has one label and an ignored rollout, group 4 an empty rollout and
# a correct one that is ignored.
LENGTHS = [60, 75, 52, 64, 33, 80, 45, 41, 20, 90, 17, 16, 50, 40, 30, 20, 70, 0, 25, 35]
LABELS = [1, 0, 0, 1, 0, 1, 0, 0, 1, 1, 1, 1, 1, 1, -1, 1, 0, 0, -1, 1]
ALL = list(range(len(LABELS)))
SHUFFLED = [9, 4, 13, 1, 16, 7, 2, 18, 5, 0, 12, 11, 3, 19, 6, 8, 17, 10, 14, 15]
ROW = DIM * 4  # bytes


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Of several, who comes first changes the counts of pairs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def states() -> list[Tensor]:
    return made_states()


def made_states() -> list[Tensor]:
    return list(Text(5, DIM).rollouts(*LENGTHS))


def add(bank: HiddenBank, states: list[Tensor], places: list[int], **change: Any) -> None:
    given = {
        "cu_seqlens": torch.tensor([0, *(LENGTHS[i] for i in places)]).cumsum(0),
        "sample_ids": places,
        "group_ids": [i // SIZE for i in places],
        "labels": [LABELS[i] for i in places],
    }
    bank.add(torch.cat([torch.empty(0, DIM), *(states[i] for i in places)]), **given | change)


def weigh(bank: HiddenBank, states: list[Tensor], order: list[int], part: int) -> BankedWeights:
    for first in range(0, len(order), part):
        add(bank, states, order[first : first + part])
    return bank.finalize(weighting=WEIGHTING, step=1)


def assert_equal(found: BankedWeights, wanted: BankedWeights) -> None:
    assert sorted(found.weights) == sorted(wanted.weights)
    assert all(torch.equal(found.weights[i], wanted.weights[i]) for i in wanted.weights)
    assert found[1:] == wanted[1:]


@pytest.fixture(scope="module")
def late(states: list[Tensor]) -> BankedWeights:
    found = weigh(HiddenBank(config=CONFIG), states, ALL, 4)
    assert (found.groups, found.mixed_groups) == (5, 3)
    assert sum(bool((w != 1).any()) for w in found.weights.values()) == 4 + 4 + 2  # not vacuous
    return found


@pytest.mark.parametrize("storage", ["device", "cpu"])
@pytest.mark.parametrize("order", [ALL, SHUFFLED], ids=["in order", "shuffled"])
@pytest.mark.parametrize("part", [1, 3, 20])
def test_a_complete_group_is_computed_at_once(
    states: list[Tensor], late: BankedWeights, part: int, order: list[int], storage: str
) -> None:
    """Bit by bit as at the end, and after each add only the incomplete groups are stored."""
    bank = HiddenBank(group_size=SIZE, config=CONFIG, storage=storage)
    for first in range(0, len(order), part):
        add(bank, states, order[first : first + part])
        seen = order[: first + part]
        complete = [g for g in range(5) if sum(i // SIZE == g for i in seen) == SIZE]
        stored = [i for i in seen if LABELS[i] >= 0 and i // SIZE not in complete]
        assert bank.nbytes == sum(LENGTHS[i] for i in stored) * ROW
        assert len(bank) == len(seen)
    assert bank.nbytes == 0
    found = bank.finalize(weighting=WEIGHTING, step=1)
    assert list(found.weights) == order
    assert_equal(found, late)
    assert len(bank) == 0
    assert_equal(weigh(bank, states, order, part), late)  # used again


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_the_mode_of_a_forward_changes_nothing(states: list[Tensor], backend: str) -> None:
    """Weights computed within it are tensors that autograd takes."""
    config = SpanConfig(span=20, stride=10, distance="chamfer")
    banks = [HiddenBank(group_size=s, config=config, backend=backend) for s in (SIZE, None)]
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        for bank in banks:
            add(bank, states, ALL)
    early, late = (bank.finalize() for bank in banks)
    assert_equal(early, late)
    ratio = torch.ones(LENGTHS[0], requires_grad=True)
    (ratio * early.weights[0]).sum().backward()
    assert torch.equal(ratio.grad, late.weights[0])  # type: ignore[arg-type]


def test_a_group_that_stays_incomplete(states: list[Tensor], late: BankedWeights) -> None:
    """Filtered rollouts, and groups that are larger than was said elsewhere."""
    some = [i for i in SHUFFLED if i != 3]
    early = weigh(HiddenBank(group_size=SIZE, config=CONFIG), states, some, 2)
    assert_equal(early, weigh(HiddenBank(config=CONFIG), states, some, 19))
    never = HiddenBank(group_size=100, config=CONFIG)
    assert_equal(weigh(never, states, ALL, 7), late)


def test_mixed_groups_and_group_size(states: list[Tensor], late: BankedWeights) -> None:
    bank = HiddenBank(group_size=SIZE, mixed_groups={0, 4}, config=CONFIG)
    found = weigh(bank, states, SHUFFLED, 2).weights
    for i in ALL:
        known = late.weights[i] if i // SIZE in (0, 4) else torch.ones(LENGTHS[i])
        assert torch.equal(found[i], known)


@pytest.mark.parametrize("normalization", ["group", "rollout"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_config_and_backend_are_those_of_the_bank(
    states: list[Tensor], normalization: str, backend: str
) -> None:
    config = SpanConfig(span=20, stride=10, distance="chamfer", normalization=normalization)
    found = [
        weigh(HiddenBank(group_size=size, config=config, backend=backend), states, ALL[:8], 3)
        for size in (SIZE, None)
    ]
    assert_equal(*found)
    plain = span_weights(
        torch.cat(states[:8]), cu_seqlens=torch.tensor([0, *LENGTHS[:8]]).cumsum(0),
        group_ids=[i // SIZE for i in range(8)], labels=LABELS[:8], config=config, backend=backend,
    )  # fmt: skip
    first = WEIGHTING.apply(plain[: sum(LENGTHS[:4])], 1)
    torch.testing.assert_close(torch.cat([found[0].weights[i] for i in range(4)]), first)


def test_pairs_that_were_stopped_are_counted(states: list[Tensor]) -> None:
    config = SpanConfig(span=20, stride=6, n_iters=1, tol=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        early, late = (
            weigh(HiddenBank(group_size=size, config=config), states, SHUFFLED, 3)
            for size in (SIZE, None)
        )
    assert early.pairs == late.pairs
    assert early.pairs.stopped > 0


def test_a_rollout_too_many_is_named(states: list[Tensor], late: BankedWeights) -> None:
    bank = HiddenBank(group_size=SIZE, config=CONFIG)
    add(bank, states, ALL[:6])
    with pytest.raises(ValueError, match=r"got 4 and another rollout of group 0 \(sample id 7\)"):
        add(bank, states, [6, 7], group_ids=[1, 0])
    with pytest.raises(ValueError, match="got 4 and another rollout of group 1"):
        add(bank, states, [6, 7, 8], group_ids=[1, 1, 1])
    with pytest.raises(ValueError, match="new and unique"):
        add(bank, states, [0])
    assert len(bank) == 6
    for first in range(6, len(ALL), 2):
        add(bank, states, ALL[first : first + 2])
    assert_equal(bank.finalize(weighting=WEIGHTING, step=1), late)


@pytest.mark.parametrize("group_size", [SIZE, None])
def test_what_is_not_finite_is_told_by_finalize(
    states: list[Tensor], group_size: int | None
) -> None:
    """Not by add, which other ranks do not take part in."""
    bank = HiddenBank(group_size=group_size, config=CONFIG)
    for i in SHUFFLED:
        own = states[i].clone()
        if i == 5:
            own[7, 3] = torch.inf
        add(bank, [own] * len(ALL), [i])
    kept = [i for i in ALL if LABELS[i] >= 0 and (group_size is None or i // SIZE == 1)]
    assert bank.nbytes == sum(LENGTHS[i] for i in kept) * ROW
    where = rf"token 7 of rollout {SHUFFLED.index(5)} of rank 0 \(sample id 5, group 1\)"
    with pytest.raises(ValueError, match=f"hidden must be finite.* at {where}"):
        bank.finalize()
    assert len(bank) == 0


def test_other_settings_in_finalize() -> None:
    HiddenBank().finalize(config=CONFIG, backend="cpu")
    bank = HiddenBank(group_size=SIZE)
    bank.finalize(config=SpanConfig())
    with pytest.raises(ValueError, match="config must be that of HiddenBank where group_size is"):
        bank.finalize(config=CONFIG)
    with pytest.raises(ValueError, match=r"backend must be that of HiddenBank .*: None, got 'cpu'"):
        bank.finalize(backend="cpu")


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"group_size": 0}, ValueError, "group_size must be"),
        ({"group_size": 2.0}, TypeError, "group_size must be"),
        ({"max_bytes": 0}, ValueError, "max_bytes must be at least 1, got 0"),
        ({"max_bytes": 1e9}, TypeError, "max_bytes must be an int, got 1000000000.0"),
        ({"config": {"span": 3}}, TypeError, "config must be"),
    ],
)
def test_refuses(given: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        HiddenBank(**given)
    HiddenBank(group_size=1, max_bytes=2**40)


def test_max_bytes_on_the_host(states: list[Tensor], late: BankedWeights) -> None:
    """Of states on the CPU: no more than that, and what does not fit is not added."""
    needed = sum(LENGTHS[:4]) * ROW
    with pytest.raises(
        MemoryError, match=rf"max_bytes must be at least {needed} .*got {needed - 1}"
    ):
        add(HiddenBank(max_bytes=needed - 1), states, ALL[:4])
    bank = HiddenBank(max_bytes=needed, config=CONFIG)
    add(bank, states, ALL[:4])
    add(bank, states, [14, 17])  # ignored, and without tokens
    before = len(bank)
    with pytest.raises(MemoryError, match="group_size, and with fewer groups"):
        add(bank, states, ALL[4:6])
    assert (len(bank), bank.nbytes) == (before, needed)
    largest = max(sum(LENGTHS[g : g + 3]) for g in range(0, 20, 4)) * ROW
    within = HiddenBank(max_bytes=largest, group_size=SIZE, config=CONFIG)
    assert_equal(weigh(within, states, ALL, 1), late)


def test_max_bytes_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is above goes to pinned memory of the host, and what comes later may fit again."""
    monkeypatch.setattr(
        bank_module, "_pinned", lambda states: torch.empty_like(states, device="cpu")
    )
    bank = HiddenBank(max_bytes=100 * ROW)
    for sample, tokens in enumerate((60, 50, 40, 1)):
        bank._check_budget([torch.empty(tokens, DIM, device="meta")], [])
        bank._store(sample, torch.empty(tokens, DIM, device="meta"))
    assert [own.device.type for own in bank._states.values()] == ["meta", "cpu", "meta", "cpu"]
    assert bank._held == {torch.device("meta"): 100 * ROW, torch.device("cpu"): 51 * ROW}
    assert bank.nbytes == 151 * ROW
    on_host = HiddenBank(max_bytes=100 * ROW, storage="cpu")
    on_host._store(0, torch.empty(60, DIM, device="meta"))
    assert on_host._held[torch.device("cpu")] == on_host.nbytes == 60 * ROW
    with pytest.raises(MemoryError, match=f"at least {101 * ROW}"):
        on_host._check_budget([torch.empty(41, DIM, device="meta")], [])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_max_bytes_on_a_gpu(states: list[Tensor]) -> None:
    on_gpu = [own.cuda() for own in states]
    found = []
    for given in ({}, {"max_bytes": 200 * ROW}, {"storage": "cpu"}, {"group_size": SIZE}):
        bank = HiddenBank(config=CONFIG, **given)
        for i in SHUFFLED:
            bank.add(
                on_gpu[i], cu_seqlens=torch.tensor([0, LENGTHS[i]]), sample_ids=[i],
                group_ids=[i // SIZE], labels=[LABELS[i]],
            )  # fmt: skip
        held = [own for own in bank._states.values() if own.is_cuda]
        assert sum(own.nbytes for own in held) <= given.get("max_bytes", 2**40)
        assert all(own.is_cuda or own.is_pinned() for own in bank._states.values())
        found.append(bank.finalize(weighting=WEIGHTING, step=1))
    for other in found[1:]:
        assert all(torch.equal(other.weights[i], found[0].weights[i]) for i in ALL)


@pytest.fixture
def launching(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """As on a GPU: groups of each call."""
    calls: list[int] = []
    real = distributed.Computed.add

    def counted(self: Any, groups: Any, *rest: Any) -> None:
        calls.append(len(groups))
        real(self, groups, *rest)

    monkeypatch.setattr(distributed.Computed, "add", counted)
    monkeypatch.setattr(distributed, "NO_LAUNCH", ())
    return calls


def test_small_groups_in_one_call(
    states: list[Tensor], late: BankedWeights, launching: list[int]
) -> None:
    """Where it launches kernels: as far as earlier groups made room."""
    found = weigh(HiddenBank(config=CONFIG), states, ALL, 4)
    assert launching == [1, 2]
    # pairs of a call wait in one queue, so that other ones are bounded
    counts = late.pairs._replace(stopped=found.pairs.stopped, total=found.pairs.total)
    assert_equal(found._replace(pairs=counts), late)
    launching.clear()
    assert_equal(weigh(HiddenBank(config=CONFIG, group_size=SIZE), states, ALL, 20), late)
    assert launching == [1, 1, 1]  # beside a micro-batch nothing gets free: 251, 199 and 105 tokens


def groups_of(tokens: list[int]) -> dict[int, list[distributed.Rollout]]:
    return {
        g: [distributed.Rollout(g, 0, 1, one, 0, 0), distributed.Rollout(g, 1, 0, one, 0, 1)]
        for g, one in enumerate(tokens)
    }


def test_groups_of_a_call() -> None:
    def calls(tokens: list[int], *limits: Any) -> list[int]:
        return [len(call) for call in distributed._calls(groups_of(tokens), *limits)]

    equal = [5] * 64
    assert calls(equal, False) == [1] * 64
    assert calls(equal, True) == [1] * 64
    assert calls(equal, True, 10_000) == [1, 2, 4, 8, 16, 32, 1]
    assert calls(equal, True, 80) == [1, 2, 4, *[8] * 7, 1]
    assert calls(equal, True, 3) == [1] * 64  # a large group is alone
    assert calls([5, 20, 5, 5, 5, 5, 5, 20, 1], True) == [1, 1, 4, 1, 1, 1]
    assert calls([], True) == []


def alternating(rank: int) -> Any:
    """Groups 0, 2 and 4 are complete on a rank, the others lie on both; then what is refused."""
    states = made_states()
    holder = [(i // SIZE if i // SIZE % 2 == 0 else i) % 2 for i in ALL]
    mine = [i for i in SHUFFLED if holder[i] == rank or (i // SIZE == 4 and rank == 1)]
    mine = [i for i in mine if not (i // SIZE == 4 and rank == 0)]
    bank = HiddenBank(group_size=SIZE, config=CONFIG)
    for i in mine:
        add(bank, states, [i])
    stored = bank.nbytes
    found = bank.finalize(weighting=WEIGHTING, step=1)
    messages = []
    for rollouts, size in (([ALL[:4], [4]], SIZE), ([ALL[:2], ALL[2:4]], 3 + rank)):
        bad = HiddenBank(group_size=size, config=CONFIG)
        add(bank=bad, states=states, places=rollouts[rank], group_ids=[0] * len(rollouts[rank]))
        try:
            bad.finalize()
        except ValueError as error:
            messages.append(str(error))
    link.PIECE_BYTES = 7 * ROW
    largest = 0
    real = dist.all_to_all_single

    def watched(output: Tensor, input: Tensor, **given: Any) -> None:
        nonlocal largest
        largest = max(largest, output.numel(), input.numel())
        real(output=output, input=input, **given)

    dist.all_to_all_single = watched
    pieces = HiddenBank(config=CONFIG)
    for i in mine:
        add(pieces, states, [i])
    return found, stored, messages, pieces.finalize(weighting=WEIGHTING, step=1), largest


def test_ranks(late: BankedWeights) -> None:
    results = ranks.run(2, alternating)
    stored = [
        sum(LENGTHS[i] for i in (4 + r, 6 + r, 12 + r, 14 + r) if LABELS[i] >= 0) for r in (0, 1)
    ]
    for rank, result in enumerate(results):
        if isinstance(result, Exception):
            raise result
        found, nbytes, messages, in_pieces, largest = result
        assert nbytes == stored[rank] * ROW
        assert messages[0] == (
            "group_size must be that of every group, got 4 and more rollouts of group 0, on ranks "
            "[0, 1]"
        )
        assert messages[1].startswith(f"group_size must be the same on all ranks, got {3 + rank}")
        assert_equal(in_pieces, found)  # bytes sent, too
        assert 6 * ROW <= largest <= 7 * ROW
        assert found[3:] == late[3:]
    both = results[0][0].weights | results[1][0].weights
    assert all(torch.equal(both[i], late.weights[i]) for i in ALL)
    sent = [result[0].states_sent for result in results]
    assert sum(sent) in (sum(LENGTHS[4:8:2]) * ROW, sum(LENGTHS[5:8:2]) * ROW)


@pytest.mark.parametrize("most", [1, 7, 30, 1000])
def test_pieces_of_an_exchange(most: int) -> None:
    """Each row once, in order, and no rank sends or receives more than most rows in a piece."""
    generator = torch.Generator().manual_seed(most)
    ends = torch.randint(0, 4, (40, 3), generator=generator).tolist()
    moves = [
        link.Move(key, 13 * rows, source, target)
        for key, (rows, source, target) in enumerate(ends)
        if source != target
    ]
    pieces = link._pieces(moves, most)
    for piece in pieces:
        for end in ("source", "target"):
            loads = [sum(len(p) for p in piece if getattr(p, end) == r) for r in range(4)]
            assert max(loads) <= most
    for move in moves:
        parts = [p for piece in pieces for p in piece if p.key == move.key]
        assert all((p.source, p.target) == (move.source, move.target) for p in parts)
        assert [row for p in parts for row in range(p.begin, p.end)] == list(range(move.rows))
    busiest = max(
        sum(m.rows for m in moves if end(m) == r)
        for r in range(4)
        for end in (lambda m: m.source, lambda m: m.target)
    )
    assert -(-busiest // most) <= len(pieces) <= 2 * -(-busiest // most)


def test_counts_of_no_call() -> None:
    found = HiddenBank(group_size=SIZE).finalize()
    assert found == BankedWeights({}, 0, 0, 0, 0, PairCounts(0, 0, 0, 0, 0))
