"""Tables of losses in docs/trainers.md: the tests of a trainer measure them, and can write them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

PAGE = Path(__file__).parents[2] / "docs" / "trainers.md"
WRITE = "SHEAR_WRITE_TABLES"  # in the environment: replace the table by what was measured
EQUAL = 1e-6  # of the largest change of a parameter: float32 rounding
HEAD = "| loss | advantages | gradient | the two | auto |\n|---|---|---|---|---|\n"
REASONS = {  # a word of a refusal: the reason in a cell
    "one ratio per rollout": "one ratio per rollout",
    "one advantage per rollout": "one advantage per rollout",
    "mean over a rollout": "one advantage per rollout",
    "KL term with the ratio": "ratio on the KL term",
    "a penalty of its own": "penalty in the loss",
}


def difference(a: Tensor, b: Tensor) -> float:
    """Largest difference, of the largest change of a parameter."""
    return ((a - b).abs().max() / b.abs().max()).item()


def row(name: str, found: dict[str, Tensor | str], selects: bool = False) -> str:
    """A row of a table.

    Args:
        found: by way ("advantages", "gradient", "auto") the step, or why the way is refused.
        selects: whether the loss selects tokens by their advantages.
    """
    advantages, gradient, auto = (found[way] for way in ("advantages", "gradient", "auto"))
    both = "-"
    if isinstance(advantages, Tensor) and isinstance(gradient, Tensor):
        measured = difference(advantages, gradient)
        print(f"{name}: {measured:.1e}")  # shown by pytest -s
        both = "equal" if measured < EQUAL else "differ"
        if selects:
            both += ": selects tokens by advantage"
    chosen = "refused"
    for way in ("gradient", "advantages"):
        if isinstance(auto, Tensor) and isinstance(found[way], Tensor):
            chosen = way if bool((auto == found[way]).all()) else chosen
    cells = [_cell(advantages), _cell(gradient), both, chosen]
    return f"| {name} | {' | '.join(cells)} |"


def _cell(result: Tensor | str) -> str:
    if isinstance(result, Tensor):
        return "yes"
    (why,) = {short for word, short in REASONS.items() if word in result}
    return f"refused: {why}"


def check(title: str, rows: Iterable[str]) -> None:
    """Compare a table with that in the docs."""
    marks = f"<!-- losses of {title}:begin -->\n", f"<!-- losses of {title}:end -->"
    table = HEAD + "\n".join(rows) + "\n"
    text = PAGE.read_text()
    pattern = f"(?<={re.escape(marks[0])}).*?(?={re.escape(marks[1])})"
    (written,) = re.findall(pattern, text, re.S)
    if os.environ.get(WRITE):
        PAGE.write_text(re.sub(pattern, lambda _: table, text, flags=re.S))
    else:
        assert written == table, f"{WRITE}=1 writes the table that was measured"
