"""The pictures of docs/method.md: python docs/pictures.py [folder], default this one.

Every curve is computed here, by shear_ops or by the few lines below.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

import shear_ops
from shear_ops import reference
from shear_ops.cli.rollouts import load_rollouts, shipped_rollouts

Array = NDArray[np.float64]

# the same numbers give the same file
mpl.rcParams |= {"svg.hashsalt": "shear_ops", "svg.fonttype": "none", "font.size": 9}


def axes(width: float, height: float, **settings: object) -> Axes:
    """Return the axes of a new picture."""
    one = Figure(figsize=(width, height), layout="constrained").subplots()
    one.set(**settings)
    one.spines[["top", "right"]].set_visible(False)
    return one


def slow_pair() -> tuple[Array, float]:
    """Costs (100, 100) of a span pair of the recorded rollouts, and 0.01 of their mean norm."""
    rollouts = load_rollouts(shipped_rollouts())
    states = rollouts.hidden.double().split(rollouts.cu_seqlens.diff().tolist())
    x, y = (
        next(s[150:250] for s, label in zip(states, rollouts.labels.tolist(), strict=True)
             if label == wanted and len(s) >= 250) for wanted in (1, 0)
    )  # fmt: skip
    return reference.token_cost(x, y).numpy(), 0.01 * torch.cat(states).norm(dim=1).mean().item()


def two_clusters() -> tuple[Array, float]:
    """Costs of two sets of 30 points in two clusters, 13 and 14 of them in the first."""
    generator = torch.Generator().manual_seed(0)
    sides = []
    for first in (13, 14):
        points = 0.05 * torch.randn(30, 16, generator=generator, dtype=torch.float64)
        points[:first] += 3
        sides.append(points)
    return reference.token_cost(*sides).numpy(), 0.7


def pair_with_sinks() -> tuple[Array, float]:
    """Costs of two sets of 100 tokens, 3 and 4 of them 300 times as long, and 0.03 mean norms."""
    x, y = torch.randn(2, 100, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[:3] *= 300
    y[:4] *= 300
    return reference.token_cost(x, y).numpy(), 0.03 * torch.cat([x, y]).norm(dim=1).mean().item()


def soft_min(cost: Array, eps: float) -> Array:
    """-eps log mean_j exp(-C_ij / eps)."""
    lowest = cost.min(1, keepdims=True)
    return (lowest[:, 0] - eps * np.log(np.exp((lowest - cost) / eps).mean(1))).astype(float)


def iterate(cost: Array, eps: float, omega: float, count: int) -> dict[str, list[float]]:
    """Sinkhorn with one omega from the second iteration on: what each iteration reached."""
    f, g = cost.min(1), (cost - cost.min(1)[:, None]).min(0)
    seen: dict[str, list[float]] = {"residual": [], "sharp": [], "dual": []}
    for it in range(count):
        relaxed = omega if it > 0 else 1.0
        f = f + relaxed * (soft_min(cost - g, eps) - f)
        exact = soft_min((cost - f[:, None]).T, eps)
        plan = np.exp((f[:, None] + exact - cost) / eps) / cost.size
        seen["residual"].append(np.abs(plan.sum(1) - 1 / len(f)).sum())
        seen["sharp"].append((plan * cost).sum())
        seen["dual"].append(f.mean() + (cost - f[:, None]).min(0).mean())
        g = g + relaxed * (exact - g)
    return seen


def solver(cost: Array, eps: float, count: int, tol: float = 0.0) -> shear_ops.SinkhornResult:
    """What the solver itself reached after 1 to count iterations."""
    one = torch.tensor(cost, dtype=torch.float32)
    found = [shear_ops.sinkhorn(one, reg=eps, n_iters=k + 1, tol=tol) for k in range(count)]
    return shear_ops.SinkhornResult(*(torch.stack(field) for field in zip(*found, strict=True)))


def spans() -> Axes:
    """The spans of a rollout, the last one ragged."""
    length = 151
    picture = axes(6, 1.6, xlabel="token", xlim=(0, 155), xticks=[0, 25, 50, 75, 100, 125, length])
    for k, (a, b) in enumerate(reference.spans(length, 100, 25)):
        last = b == length
        picture.barh(-k, b - a, left=a, height=0.7, color="tab:orange" if last else "tab:blue")
        picture.text((a + b) / 2, -k, f"span {k}: {b - a} tokens", ha="center", va="center",
                     color="white")  # fmt: skip
    picture.set_yticks([])
    picture.spines["left"].set_visible(False)
    return picture


def sharing() -> Axes:
    """One block of token costs and some of the span pairs in it."""
    size, ticks = 250, range(0, 251, 50)
    picture = axes(
        3.6, 3.2, xlabel="token of an incorrect rollout", ylabel="token of a correct one"
    )
    picture.add_patch(Rectangle((0, 0), size, size, color="0.93"))
    for edge in range(0, size, 25):
        picture.axhline(edge, color="white", lw=1)
        picture.axvline(edge, color="white", lw=1)
    for k, begin in enumerate((25, 75, 100)):
        picture.add_patch(Rectangle((begin, begin), 100, 100, color=f"C{k}", alpha=0.25, lw=0))
        picture.add_patch(Rectangle((begin, begin), 100, 100, color=f"C{k}", fill=False, lw=1.5))
    picture.add_patch(Rectangle((100, 100), 25, 25, color="0.25"))
    picture.set(xlim=(0, size), ylim=(size, 0), aspect="equal", xticks=ticks, yticks=ticks)
    return picture


def near_duplicates() -> Axes:
    """How far a distance by |x|^2 + |y|^2 - 2 <x, y> in float32 is off, by the share left."""
    rng = np.random.default_rng(0)
    exponents = np.arange(-16, 0.1, 0.5)
    errors = []
    for share in 2.0**exponents:
        x = rng.standard_normal((40, 1024)).astype(np.float32)
        step = rng.standard_normal(x.shape)
        y = (x + np.sqrt(share) * (step - x)).astype(np.float32)
        xx, yy, xy = (np.cumsum(a * b, 1, dtype=np.float32)[:, -1]
                      for a, b in ((x, x), (y, y), (x, y)))  # fmt: skip
        seen = np.sqrt(np.maximum(xx + yy - 2 * xy, 0), dtype=float)
        truth = np.linalg.norm(x.astype(float) - y, axis=1)
        errors.append((np.abs(seen - truth) / truth).max())
    picture = axes(4.5, 2.6, xscale="log", yscale="log", ylabel="largest relative error")
    picture.set_xscale("log", base=2)
    picture.plot(2.0**exponents, errors)
    picture.axvline(2.0**-7, color="tab:orange")
    picture.text(2.0**-7.3, max(errors), "recomputed  ", ha="right", va="top", color="tab:orange")
    picture.set_xlabel("|x − y|² over |x|² + |y|²")
    return picture


def values() -> Axes:
    """The values of one pair as the iterations go, where they mix slowly."""
    cost, eps = two_clusters()
    count = 45
    iteration = range(1, count + 1)
    plain = iterate(cost, eps, 1.0, count)
    picture = axes(
        5.5, 2.9, xlabel="iteration", ylabel="cost", xlim=(0, count + 14), ylim=(0, 0.75)
    )
    curves = {
        "D, the solver's\nvalue": solver(cost, eps, count).value.tolist(),
        "⟨P, C⟩,\nplain updates": plain["sharp"],
        "dual value,\nplain updates": plain["dual"],
    }
    for (label, curve), up in zip(curves.items(), (0.02, -0.06, 0.05), strict=True):
        (line,) = picture.plot(iteration, curve, lw=1.5)
        picture.text(count + 0.7, curve[-1] + up, label, color=line.get_color(), va="center")
    w1 = reference.exact(torch.tensor(cost)[None]).item()
    picture.axhline(w1, color="gray", lw=1, ls="--")
    picture.text(1, w1 + 0.01, "W1", color="gray")
    return picture


def five_numbers() -> Axes:
    """What goes by Sinkhorn distance, for one pair of sets, over eps."""
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(2, 20, 2, generator=generator, dtype=torch.float64)
    y += 1
    cost, own = reference.token_cost(x, y), [reference.token_cost(s, s) for s in (x, y)]

    def numbers(c: torch.Tensor, eps: float) -> tuple[float, float, float]:
        array = c.numpy()
        g = np.zeros(len(array[0]))
        for _ in range(500):
            f = soft_min(array - g, eps)
            g = soft_min((array - f[:, None]).T, eps)
        plan = np.exp((f[:, None] + g - array) / eps) / array.size
        dual = f.mean() + (array - f[:, None]).min(0).mean()
        return float((plan * array).sum()), float(f.mean() + g.mean()), float(dual)

    regs = np.geomspace(0.02, 5, 20)
    sharp, regularised, dual = np.array([numbers(cost, e) for e in regs]).T
    self_terms = np.array([sum(numbers(c, e)[1] for c in own) / 2 for e in regs])
    picture = axes(
        5.5, 3, xscale="log", xlabel="eps", ylabel="cost", ylim=(0, 3.3), xlim=(0.02, 22)
    )
    curves = {
        "KL-regularised": regularised,
        "sharp, ⟨P, C⟩: ours": sharp,
        "debiased": regularised - self_terms,
        "dual, of hard potentials": dual,
        "entropy-regularised": regularised - regs * np.log(cost.numel()),
    }
    for (label, curve), dy in zip(curves.items(), (0.12, -0.1, 0, 0, 0), strict=True):
        shown = (curve >= 0) & (curve < 3.3)
        (line,) = picture.plot(regs[shown], curve[shown], lw=1.5)
        last = np.flatnonzero(shown)[-1]
        side = "left" if last == len(regs) - 1 else "right"
        x_at = regs[last] * (1.1 if side == "left" else 0.8)
        picture.text(x_at, curve[last] + dy, label, color=line.get_color(), va="center", ha=side)
    w1 = reference.exact(cost[None]).item()
    picture.axhline(w1, color="gray", lw=1, ls="--")
    picture.text(0.022, w1 + 0.05, "W1", color="gray")
    return picture


def pruning() -> Axes:
    """Bound and distance of one span to all of its opposing spans."""
    rollouts = load_rollouts(shipped_rollouts())
    first = rollouts.group(int(rollouts.group_ids[0]))
    states = first.hidden.split(first.cu_seqlens.diff().tolist())
    labels = first.labels.tolist()
    own = next(s for s, label in zip(states, labels, strict=True) if label == 1 and len(s) >= 250)
    x = own[150:250].double()
    others = [
        s[a:b].double()
        for s, label in zip(states, labels, strict=True)
        for a, b in reference.spans(len(s), 100, 25)
        if label == 0
    ]
    eps = 0.03 * first.hidden.double().norm(dim=1).mean().item()
    costs = [reference.token_cost(x, y)[None] for y in others]
    bounds = torch.tensor([max(b.item() for b in reference.bounds(c)) for c in costs])
    distances = torch.tensor([reference.sinkhorn(c, eps, tol=1e-3).value.item() for c in costs])
    order = bounds.argsort()
    bounds, distances = bounds[order], distances[order]
    picture = axes(5.5, 2.6, xlabel="opposing spans, by their bound", ylabel="cost")
    place = range(len(order))
    solved = bounds <= distances.min()
    picture.vlines(place, bounds, distances, color="0.85")
    picture.plot(place, distances, "o", ms=3, label="distance D")
    picture.plot(place, bounds, "o", ms=3, label="bound max(R, Q)")
    picture.axhline(distances.min(), color="gray", lw=1, ls="--")
    picture.axvline(int(solved.sum()) - 0.5, color="tab:green", lw=1)
    picture.set_ylim(0, None)
    picture.text(int(solved.sum()), 1, " skipped: bound above the nearest distance",
                 color="tab:green")  # fmt: skip
    picture.legend(frameon=False, loc="center right", bbox_to_anchor=(1, 0.35))
    return picture


def over_relaxation() -> Axes:
    """The residual of one pair with fixed omegas and with the rule."""
    cost, eps = slow_pair()
    count = 120
    picture = axes(5.5, 2.9, yscale="log", xlabel="iteration", ylabel="residual")
    for omega in (1.0, 1.5, 1.75, 1.9375):
        curve = iterate(cost, eps, omega, count)["residual"]
        (line,) = picture.plot(range(1, count + 1), curve, lw=1)
        picture.text(count + 1, curve[-1], f"ω = {omega:g}", color=line.get_color(), va="center")
    rule = solver(cost, eps, count).residual.tolist()
    picture.plot(range(1, count + 1), rule, lw=2, color="black")
    picture.text(count + 1, rule[-1], "the rule", va="center")
    picture.axhline(5e-3, color="gray", lw=1, ls="--")
    picture.text(1, 2.5e-3, "default tol", color="gray")
    picture.set_xlim(0, count + 14)
    return picture


def eps_scaling() -> Axes:
    """The residual of one pair with sink tokens, at eps from the start and cooled."""
    cost, eps = pair_with_sinks()
    count = 270
    picture = axes(5.5, 2.9, yscale="log", xlabel="iteration", ylabel="residual")
    for omega in (1.0, 1.75):
        curve = iterate(cost, eps, omega, count)["residual"]
        (line,) = picture.plot(range(1, count + 1), curve, lw=1)
        picture.text(count + 3, curve[-1], f"ω = {omega:g}", color=line.get_color(), va="center")
    found = solver(cost, eps, 60, tol=5e-3)
    done = int(found.iterations[-1])
    picture.plot(range(1, done + 1), found.residual[:done].tolist(), lw=2, color="black")
    picture.text(done + 3, float(found.residual[-1]), "cooled", va="center")
    picture.axhline(5e-3, color="gray", lw=1, ls="--")
    picture.text(count, 5.5e-3, "default tol", color="gray", ha="right")
    picture.set_xlim(0, count + 35)
    return picture


PICTURES: dict[str, Callable[[], Axes]] = {
    "spans": spans,
    "sharing": sharing,
    "near-duplicates": near_duplicates,
    "values": values,
    "five-numbers": five_numbers,
    "pruning": pruning,
    "over-relaxation": over_relaxation,
    "eps-scaling": eps_scaling,
}


def draw(folder: Path) -> None:
    """Write every picture as an SVG file."""
    for name, make in PICTURES.items():
        figure = make().figure
        figure.savefig(folder / f"{name}.svg", metadata={"Date": None}, bbox_inches="tight")


if __name__ == "__main__":
    torch.set_num_threads(1)
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
