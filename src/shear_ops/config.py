"""SpanConfig: every parameter of the method, with the paper's defaults."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from . import _C

# By field of SpanConfig. The position of a name is its enumerator in csrc/problem.h; what only the
# reference computes has none and comes after them.
CHOICES: dict[str, tuple[str, ...]] = {
    **_C.CHOICES,
    "distance": (*_C.CHOICES["distance"], "exact"),
}


@dataclass(frozen=True)
class SpanConfig:
    """Parameters of SHEAR (arXiv 2604.23318). Immutable; every field is checked on construction.

    Args:
        span: tokens per span (paper: 100).
        stride: tokens from one span to the next, 1 <= stride <= span (paper: 25).
        reg: entropic regularisation eps, in the unit of ``reg_unit``. Checked against float64
            from 0.005 to 0.5 of the mean norm.
        reg_unit: ``"mean_norm"``: eps = reg * mean norm of the group, so that weights do not
            change when hidden states are rescaled; ``"cost"``: eps = reg (paper: about 4.5).
        n_iters: most Sinkhorn iterations per span pair; only slow pairs take more than a few
            dozen. A warning, once per process, says if it stopped some (on a GPU only with
            check_finite).
        tol: stop a span pair when the L1 error of its marginal is at most this, or less where
            eps * (2 + log(tokens)) exceeds a fifth of the distance: the default keeps span
            distances within 2e-3 of the converged ones.
        distance: between two spans. ``"sinkhorn"``: sharp transport cost of the entropic plan,
            corrected for the marginal error left, never below the certified bounds on W1;
            ``"chamfer"``: (R + Q) / 2, the mean of both directed nearest-token costs; ``"mmd"``:
            sigma times the RBF maximum mean discrepancy, sigma = mean norm of the group;
            ``"cosine"``: mean norm * (1 - cos of the span means); ``"exact"``: W1 by linear
            programming (reference backend only, needs POT).
        normalization: distances are divided by the mean norm of the ``"group"`` or ``"rollout"``
            (of the group, too, where a rollout's is below 2^-24 of it: all states zero).
        pooling: of the spans that cover a token, ``"max"`` or ``"mean"``.
        aggregation: over the spans of the opposing set, ``"min"`` or ``"mean"``.
        check_finite: raise ValueError on NaN or Inf in hidden. Without, a group that has one gets
            NaN weights.

    Raises:
        TypeError, ValueError: naming the field, the value seen and the value wanted.
    """

    span: int = 100
    stride: int = 25
    reg: float = 0.03
    reg_unit: str = "mean_norm"
    n_iters: int = 5000
    tol: float = 5e-3
    distance: str = "sinkhorn"
    normalization: str = "group"
    pooling: str = "max"
    aggregation: str = "min"
    check_finite: bool = True

    def __post_init__(self) -> None:
        """Check every field."""
        for name in ("span", "stride", "n_iters"):
            check_count(name, getattr(self, name))
        if self.stride > self.span:
            raise ValueError(f"stride must be at most span ({self.span}), got {self.stride}")
        check_reg(self.reg)
        check_tol(self.tol)
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                wanted = ", ".join(repr(c) for c in choices)
                raise ValueError(f"{name} must be one of {wanted}, got {getattr(self, name)!r}")
        if not isinstance(self.check_finite, bool):
            raise TypeError(f"check_finite must be a bool, got {self.check_finite!r}")

    def op_arguments(self) -> dict[str, int | float | bool]:
        """Return the keyword arguments of torch.ops.shear: names become enumerators."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return values | {name: CHOICES[name].index(values[name]) for name in CHOICES}


def check_config(config: object) -> None:
    """Raise unless config is a SpanConfig; its fields were checked when it was made."""
    if not isinstance(config, SpanConfig):
        raise TypeError(f"config must be a SpanConfig, got {type(config).__name__}")


def check_count(name: str, value: object) -> None:
    """Raise unless value is an int in [1, 2^31)."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if not 1 <= value < 2**31:
        raise ValueError(f"{name} must be in [1, 2^31), got {value}")


def check_number(name: str, value: object) -> float:
    """Return value, or raise TypeError unless it is an int or a float."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    return value


def check_threshold(threshold: object) -> None:
    """Raise unless threshold is a number other than NaN, at which no rollout would be correct."""
    number = check_number("threshold", threshold)
    if number != number:
        raise ValueError("threshold must be a number, got nan")


def check_reg(reg: object) -> None:
    """Raise unless reg is a positive finite number."""
    reg = check_number("reg", reg)
    if not 0 < reg < math.inf:  # not by math.isfinite, which torch.compile does not trace
        raise ValueError(f"reg must be positive and finite, got {reg}")


def check_tol(tol: object) -> None:
    """Raise unless tol is a non-negative finite number."""
    tol = check_number("tol", tol)
    if not 0 <= tol < math.inf:
        raise ValueError(f"tol must be non-negative and finite, got {tol}")
