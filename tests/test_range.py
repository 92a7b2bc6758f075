"""The range of float32: linear in the unit inside it, refused by name outside, never a wrong number."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import shear_ops
from shear_ops import SpanConfig, reference
from test_backends import COMPILED, device_of

UNITS = [2.0**k for k in (-100, -60, -20, 20, 29, 30, 60, 100)]
REFUSED = "must be finite with norms below|must have a mean norm of at least"


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def weights(backend: str, hidden: torch.Tensor, **options: Any) -> torch.Tensor:
    return shear_ops.span_weights(
        hidden.to(device_of(backend)), cu_seqlens=[0, 12, 20], group_ids=[7, 7], labels=[1, 0],
        config=SpanConfig(span=6, stride=3, **options), backend=backend,
    ).cpu()  # fmt: skip


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("backend", COMPILED)
def test_sinkhorn_is_linear_in_a_power_of_two(backend: str, unit: float) -> None:
    cost = random(2, 7, 5).abs().to(device_of(backend))
    x, y = random(2, 9, 3).to(device_of(backend)), random(2, 4, 3).to(device_of(backend))
    for given in ({"cost": cost}, {"x": x, "y": y}):
        wanted = shear_ops.sinkhorn(**given, reg=0.0625, backend=backend)
        scaled = {name: tensor * unit for name, tensor in given.items()}
        seen = shear_ops.sinkhorn(**scaled, reg=0.0625 * unit, backend=backend)
        assert torch.equal(seen.value / unit, wanted.value)
        assert torch.equal(seen.iterations, wanted.iterations)
        assert seen.converged.all()


@pytest.mark.parametrize("unit", [1e-30, 1e-20, 1e-10, 1e9, 1e12, 1e20, 1e30])
@pytest.mark.parametrize("backend", COMPILED)
def test_sinkhorn_in_any_unit_against_float64(backend: str, unit: float) -> None:
    cost = random(1, 7, 5).abs()
    wanted = reference.sinkhorn(cost.double(), 0.05).value
    given = (cost * unit).to(device_of(backend))
    seen = shear_ops.sinkhorn(given, reg=0.05 * unit, backend=backend)
    torch.testing.assert_close(seen.value.cpu().double() / unit, wanted, rtol=2e-3, atol=0)


@pytest.mark.parametrize("reg", [1e5, 1e6, 1e9])
@pytest.mark.parametrize("backend", COMPILED)
def test_a_large_reg_gives_the_mean_cost(backend: str, reg: float) -> None:
    cost = random(1, 37, 5).abs().to(device_of(backend))
    seen = shear_ops.sinkhorn(cost, reg=reg, backend=backend)
    torch.testing.assert_close(seen.value, cost.mean((1, 2)), rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("unit", "reg", "message"),
    [
        (1, 1e-37, "reg must be in"), (1, 1e34, "reg must be in"), (1e34, 1e30, "cost must be finite"),
        (1, 1e-30, "cost must be finite"), (float("nan"), 1, "cost must be finite"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("backend", COMPILED)
def test_sinkhorn_refuses_by_name(backend: str, unit: float, reg: float, message: str) -> None:
    cost = random(1, 3, 3).to(device_of(backend))
    with pytest.raises(ValueError, match=message):
        shear_ops.sinkhorn(cost * unit, reg=reg, backend=backend)


@pytest.mark.parametrize("distance", ["sinkhorn", "chamfer"])
@pytest.mark.parametrize("exponent", [-44, -20, 20, 57])
@pytest.mark.parametrize("backend", COMPILED)
def test_weights_do_not_depend_on_the_unit(backend: str, exponent: int, distance: str) -> None:
    hidden = random(20, 8)
    seen = weights(backend, hidden * 2.0**exponent, distance=distance)
    assert torch.equal(seen, weights(backend, hidden, distance=distance))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm", [1e-40, 1e-30, 1e-22, 1e-18, 1e-15, 5e18, 9.5e18, 1.8e19, 1e30])
@pytest.mark.parametrize("backend", COMPILED)
def test_norms_out_of_range(backend: str, norm: float, dtype: torch.dtype) -> None:
    hidden = random(20, 8)
    hidden = (hidden / hidden.norm(dim=1, keepdim=True) * norm).to(dtype)
    with pytest.raises(ValueError, match=f"^hidden ({REFUSED}).*group 7"):
        weights(backend, hidden)
    assert weights(backend, hidden, check_finite=False).isnan().all()


@pytest.mark.parametrize("norm", [1e-10, 1.0, 1e18])
@pytest.mark.parametrize("backend", COMPILED)
def test_a_reg_in_units_of_cost_far_from_the_norms(backend: str, norm: float) -> None:
    """Below 1e-38 of them weights were inf, then bounds; above 1e43 they were off by up to 40 %."""
    hidden = random(20, 8)
    hidden *= norm / hidden.norm(dim=1).mean()
    refused = r"reg must be in \[1e-20, 1e\+14\] times the mean norm of every group.*in group 7"
    for reg in (max(norm * 1e-39, 1e-36), norm * 0.9e-20, norm * 1.1e14):
        with pytest.raises(ValueError, match=refused):
            weights(backend, hidden, reg=reg, reg_unit="cost")
        unchecked = weights(backend, hidden, reg=reg, reg_unit="cost", check_finite=False)
        assert unchecked.isnan().all()
        with pytest.raises(
            ValueError, match=r"times the mean norm of every group, got .* of [^ ]*$"
        ):
            shear_ops.pair_distances(
                *hidden.to(device_of(backend)).split(10), backend=backend,
                config=SpanConfig(reg=reg, reg_unit="cost"),
            )  # fmt: skip
        chamfer = {"distance": "chamfer", "reg": reg, "reg_unit": "cost"}
        assert weights(backend, hidden, **chamfer).isfinite().all()  # plays no part there
    for reg in (norm * 1.1e-20, norm * 0.9e14):
        within = weights(backend, hidden, reg=reg, reg_unit="cost", n_iters=9)
        assert within.isfinite().all()
    assert not weights(backend, 0 * hidden, reg=1e-36, reg_unit="cost").any()


@pytest.mark.parametrize("backend", COMPILED)
def test_zeros_of_either_sign_are_zero(backend: str) -> None:
    hidden = torch.zeros(20, 8)
    hidden[::2] = -0.0
    assert not weights(backend, hidden).any()


@pytest.mark.parametrize("backend", COMPILED)
def test_pair_distances_names_no_group(backend: str) -> None:
    x = 1e-20 * random(9, 4).to(device_of(backend))
    with pytest.raises(ValueError, match=r"^x and y must have a mean norm of at least"):
        shear_ops.pair_distances(x, x, backend=backend)


def test_mmd_of_nearly_equal_spans() -> None:
    """The square root of a difference of nearly equal numbers: what is left of rounding."""
    for seed, offset in enumerate((0, 1, 10, 100)):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(103, 24, generator=generator) + offset
        others = [x[torch.randperm(103, generator=generator)]]
        others += [x + noise * torch.randn(x.shape, generator=generator) for noise in (1e-5, 1e-3)]
        for dtype in (torch.float32, torch.bfloat16):
            for y in others:
                given: dict[str, Any] = {
                    "hidden": torch.cat([x, y]).to(dtype), "cu_seqlens": [0, 103, 206],
                    "group_ids": [0, 0], "labels": [1, 0],
                    "config": SpanConfig(span=100, stride=1, distance="mmd"),
                }  # fmt: skip
                seen = shear_ops.span_distances(**given, backend="cpu").distance.double()
                wanted = shear_ops.span_distances(**given, backend="reference").distance.double()
                norm = given["hidden"].double().norm(dim=1).mean()
                assert (seen - wanted).abs().max() <= 3e-4 * norm, (offset, dtype)
