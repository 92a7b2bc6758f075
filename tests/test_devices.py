"""Tensors on other devices, in other layouts, of other kinds: each works, or is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import shear_ops
from rollouts_for_tests import CONFIG, arguments, padded
from shear_ops import SpanConfig
from shear_ops.ops import torch_op

OPS = torch.ops.shear
CONFIGURED = SpanConfig(**CONFIG)
INTEGERS = ("cu_seqlens", "group_ids", "labels")
PACKED = arguments()
PADDED = padded(PACKED, holes=True)
X, Y = PACKED["hidden"][:30], PACKED["hidden"][30:]
PROBLEMS = {
    "cost": torch.rand(2, 3, 4), "n_rows": torch.tensor([1, 3]), "n_cols": torch.tensor([4, 2])
}  # fmt: skip


def weights(**given: Any) -> Tensor:
    return shear_ops.span_weights(**given, config=CONFIGURED)


def distances(**given: Any) -> Tensor:
    return shear_ops.span_distances(**given, config=CONFIGURED).distance


def advantages(**given: Any) -> Tensor:
    return shear_ops.weighted_advantages(**given, config=CONFIGURED)


def pair(**given: Any) -> Tensor:
    return shear_ops.pair_distances(**given, config=CONFIGURED)


def solved(**given: Any) -> Tensor:
    return shear_ops.sinkhorn(**given, reg=0.1).value


def planned(**given: Any) -> Tensor:
    return torch.tensor(shear_ops.plan(**given, dim=12, config=CONFIGURED).pairs)


def without_states(given: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: given[name] for name in INTEGERS}


FUNCTIONS: dict[str, tuple[Callable[..., Tensor], dict[str, Tensor]]] = {
    "span_weights packed": (weights, PACKED),
    "span_weights padded": (weights, PADDED),
    "span_distances packed": (distances, PACKED),
    "span_distances padded": (distances, PADDED),
    "weighted_advantages": (advantages, {"advantages": torch.rand(5), **PACKED}),
    "pair_distances": (pair, {"x": X, "y": Y}),
    "sinkhorn": (solved, PROBLEMS),
    "sinkhorn of points": (solved, {"x": torch.rand(2, 3, 5), "y": torch.rand(2, 4, 5)}),
    "plan": (planned, without_states(PACKED)),
    "labels_from_rewards": (shear_ops.labels_from_rewards, {"rewards": torch.rand(5)}),
}
OF_ONE = [(name, argument) for name, (_, given) in FUNCTIONS.items() for argument in given]


@pytest.mark.parametrize(("function", "argument"), OF_ONE)
def test_one_argument_on_meta(function: str, argument: str) -> None:
    call, given = FUNCTIONS[function]
    if function == "labels_from_rewards":  # element by element: works anywhere
        assert call(given[argument].to("meta")).device.type == "meta"
        return
    with pytest.raises(ValueError, match=rf"^{argument} .*\bmeta\b"):
        call(**{**given, argument: given[argument].to("meta")})


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("backend", [None, "reference"])
def test_all_arguments_on_meta(function: str, backend: str | None) -> None:
    call, given = FUNCTIONS[function]
    if function == "labels_from_rewards":
        return
    if backend and not function.startswith(("plan", "sinkhorn")):
        given = {**given, "backend": backend}
    with pytest.raises(ValueError, match=r"^(hidden|x|cost|cu_seqlens) is on meta"):
        call(**{k: v.to("meta") if isinstance(v, Tensor) else v for k, v in given.items()})


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "sparse": lambda t: t.to_sparse(),
    "nested": lambda t: torch.nested.nested_tensor([t, t]),
    "jagged": lambda t: torch.nested.nested_tensor([t, t], layout=torch.jagged),
    "quantized": lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
    "complex": lambda t: t.to(torch.complex64),
    "no tensor": lambda t: object(),  # type: ignore[return-value]
}


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's own, about nested tensors
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("function", "argument"), OF_ONE)
def test_other_layouts_are_refused(function: str, argument: str, layout: str) -> None:
    call, given = FUNCTIONS[function]
    with pytest.raises((TypeError, ValueError), match=f"^{argument} must be"):
        call(**{**given, argument: LAYOUTS[layout](given[argument])})


class Subclass(Tensor):
    pass


def strided(tensor: Tensor) -> Tensor:
    """The same numbers, every other one in memory, from an odd offset."""
    room = torch.full((*tensor.shape, 2), 7).to(tensor.dtype)
    room[..., 1] = tensor
    return room[..., 1]


SAME: dict[str, Callable[[Tensor], Tensor]] = {
    "strided": strided,
    "negated view": lambda t: torch._neg_view(-t) if t.dtype != torch.bool else t,
    "parameter": lambda t: torch.nn.Parameter(t, requires_grad=t.is_floating_point()),
    "subclass": lambda t: t.as_subclass(Subclass),
    "flipped": lambda t: t.flip(0).contiguous().flip(0),
    "other integers": lambda t: t if t.is_floating_point() else t.int(),
}


@pytest.mark.parametrize("kind", SAME)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_same_numbers_in_another_tensor(function: str, kind: str) -> None:
    call, given = FUNCTIONS[function]
    seen = call(**{name: SAME[kind](tensor) for name, tensor in given.items()})
    assert torch.equal(seen.detach().as_subclass(Tensor), call(**given))


def test_zero_tensors_and_expanded_states() -> None:
    zero = torch._efficientzerotensor(5, dtype=torch.int64)
    assert (weights(**{**PACKED, "labels": zero}) == 1).all()
    expanded = PACKED["hidden"][:1].expand(126, 12)
    assert torch.equal(
        weights(**{**PACKED, "hidden": expanded}),
        weights(**{**PACKED, "hidden": expanded.contiguous()}),
    )


def operator(name: str) -> tuple[Callable[..., Any], dict[str, Tensor]]:
    if name == "pair_distances":
        return OPS.pair_distances, {"x": X, "y": Y}
    if name == "sinkhorn":
        return lambda **given: OPS.sinkhorn(**given, reg=0.1), PROBLEMS
    return getattr(OPS, name), PACKED


DEVICES = ("cpu", "cuda", "xpu", "meta")
OPERATORS = torch_op.NAMES


def first(out: Any) -> Tensor:
    return out if isinstance(out, Tensor) else out[0]


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_with_fake_tensors_on_every_mixture_of_devices(name: str) -> None:
    """Integers are on the CPU or on the device of the states; x and y on one device."""
    call, given = operator(name)
    states, *others = given
    shapes = {argument: tensor.to("meta") for argument, tensor in given.items()}
    with FakeTensorMode(shape_env=ShapeEnv()) as mode:
        for devices in product(DEVICES, repeat=len(given)):
            on = dict(zip(given, devices, strict=True))
            fakes = {k: FakeTensor(mode, t, torch.device(on[k])) for k, t in shapes.items()}
            allowed = (on[states],) if name == "pair_distances" else ("cpu", on[states])
            wrong = [other for other in others if on[other] not in allowed]
            if wrong:
                with pytest.raises(ValueError, match=f"^{wrong[0]} must|^x and y must"):
                    call(**fakes)
            else:
                assert first(call(**fakes)).device.type == on[states]


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_on_every_mixture_of_cpu_and_meta(name: str) -> None:
    """Not fake: a kernel of meta, which would return memory of the CPU as it is."""
    call, given = operator(name)
    states, *others = given
    for devices in product(("cpu", "meta"), repeat=len(given)):
        on = dict(zip(given, devices, strict=True))
        moved = {k: v.to(on[k]) for k, v in given.items()}
        allowed = (on[states],) if name == "pair_distances" else ("cpu", on[states])
        if any(on[other] not in allowed for other in others):
            with pytest.raises(ValueError, match=r"must .*on the CPU, got meta|on one device"):
                call(**moved)
        elif name == "span_distances" and on[states] == "meta":
            with pytest.raises(RuntimeError):  # a count of spans that is data
                call(**moved)
        else:
            assert first(call(**moved)).device.type == on[states]


REFUSED: list[tuple[str, str, Callable[[Tensor], Tensor]]] = [
    ("hidden", "hidden must be a .*tokens, dim", lambda t: t[None]),
    ("hidden", "hidden must be a .*tokens, dim", lambda t: t[:, 0]),
    ("hidden", "hidden must be a .*tokens, dim", lambda t: t[:, :0]),
    ("hidden", "hidden must be a .*tokens, dim", lambda t: t[0, 0]),
    ("hidden", "hidden must be float32", lambda t: t.double()),
    *((name, f"{name} must be a 1-d", lambda t: t[None]) for name in INTEGERS),
    *((name, f"{name} must be a 1-d", lambda t: t[0]) for name in INTEGERS),
    *((name, f"{name} must be int64", lambda t: t.float()) for name in INTEGERS),
    *((name, f"{name} must be int64", lambda t: t.short()) for name in INTEGERS),
]


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(("argument", "message", "change"), REFUSED)
@pytest.mark.parametrize("op", [OPS.span_weights, OPS.span_weights_and_pairs, OPS.span_distances])
def test_what_a_kernel_refuses_its_fake_refuses(
    op: Any, argument: str, message: str, change: Callable[[Tensor], Tensor], device: str
) -> None:
    given = {**PACKED, argument: change(PACKED[argument])}
    with pytest.raises((RuntimeError, ValueError), match=message):
        op(*(tensor.to(device) for tensor in given.values()))


@pytest.mark.parametrize("name", OPERATORS)
def test_vmap_is_a_loop(name: str) -> None:
    call, given = operator(name)
    states = next(iter(given))
    stacked = torch.stack([given[states], given[states] * 1.5])
    seen = torch.vmap(lambda t: call(**{**given, states: t}))(stacked)
    wanted = [call(**{**given, states: one}) for one in stacked]
    for both, *each in zip(
        *((out,) if isinstance(out, Tensor) else out for out in (seen, *wanted)), strict=True
    ):
        assert torch.equal(both, torch.stack(each))


def test_transforms_give_no_derivative_in_silence() -> None:
    def loss(hidden: Tensor, advantages: Tensor) -> Tensor:
        return (OPS.span_weights(hidden, *list(PACKED.values())[1:], **CONFIG) * advantages).sum()

    ones = torch.ones(126)
    seen = torch.func.grad(loss, argnums=1)(PACKED["hidden"], ones)
    assert torch.equal(seen, weights(**PACKED))
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.grad(loss)(PACKED["hidden"], ones)
