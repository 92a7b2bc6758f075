"""docs/: links, pictures, and every number there that the code or a test has, too."""

from __future__ import annotations

import importlib.util
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from shear_ops import _C, reference
from test_backends import SCALE, TOLERANCES

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "bench" / "README.md",
         *sorted(DOCS.glob("*.md"))]  # fmt: skip
METHOD, NUMERICS = ((DOCS / name).read_text() for name in ("method.md", "numerics.md"))


def anchors(page: Path) -> set[str]:
    """Names that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if link.startswith("http"):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_tests_that_are_named_exist() -> None:
    named = re.findall(r"`(?:tests/)?(test_\w+\.py)(?:::(\w+))?`", METHOD + NUMERICS)
    assert len(named) > 10
    for file, test in named:
        text = (ROOT / "tests" / file).read_text()
        assert not test or f"def {test}(" in text, (file, test)


def test_tolerances_are_those_of_the_tests() -> None:
    rows = re.findall(r"^\| (\w+) \| (\S+) \| (\S+) \| (\S+) \| (\S+)", NUMERICS, re.M)
    seen = {row[0]: [float(x) for x in row[1:4]] for row in rows if row[0] in TOLERANCES}
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    assert seen == {name: [of[d] for d in dtypes] for name, of in TOLERANCES.items()}
    scales = {row[0]: float(row[4]) for row in rows if row[0] in SCALE}
    assert scales == SCALE


def test_levels_are_those_of_the_solver() -> None:
    rows = re.findall(
        r"^\| (\d) \| ([\d.]+) \| ([\d.]+) \| ([\d.]*) ?\| ([\d.]*) ?\|", METHOD, re.M
    )
    assert [int(row[0]) for row in rows] == list(range(_C.SOLVER["top_level"] + 1))
    for level, omega, contraction, plain, relaxed in rows:
        assert float(omega) == _C.omega_of(int(level))
        best = 2 / (1 + math.sqrt(1 - float(contraction)))
        assert best == pytest.approx(float(omega), rel=1e-4)
        if level != "0":
            assert float(plain) == pytest.approx(-1 / math.log10(float(contraction)), rel=0.03)
            assert float(relaxed) == pytest.approx(-1 / math.log10(float(omega) - 1), rel=0.03)


def test_when_the_level_goes_up() -> None:
    (said,) = re.findall(r"It goes up from 1 to 2 if the(.*?)\. A residual", METHOD, re.S)
    for level, ratio in enumerate(re.findall(r"0\.\d\d", said), 1):
        assert _C.next_level(level, float(ratio) + 0.01) == level + 1
        assert _C.next_level(level, float(ratio) - 0.01) == level
    assert level == _C.SOLVER["top_level"] - 1


def test_constants_are_those_of_the_code() -> None:
    """A constant that changes has to change in the text."""
    assert _C.NEAR_DUPLICATE == 2.0**-7
    assert _C.MEAN_SHARE == 0.95
    assert _C.LEAST_ROLLOUT_NORM == reference.LEAST_ROLLOUT_NORM == 2.0**-24
    solver = {"test_every": 4, "first_check": 4, "finish_again": 4, "retreat_ratio": 1.5,
              "drift_bits": 20}  # fmt: skip
    assert {name: _C.SOLVER[name] for name in solver} == solver
    assert _C.SOLVER["tolerance_share"] == pytest.approx(0.2)
    for text in ("q < 2^-7", "m = 0.95", "ratio >= 1.5", "Every 4 iterations", "iterations 4, 8, 16",
                 "goes on for 4 iterations", "<= 0.2 * tol", "[2^-20, 2^20]"):  # fmt: skip
        assert text in METHOD, text


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("ot", reason="POT computes W1 in the pictures")
    spec = importlib.util.spec_from_file_location("pictures", DOCS / "pictures.py")
    assert spec is not None and spec.loader is not None  # noqa: PT018
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    out = tmp_path_factory.mktemp("pictures")
    module.draw(out)
    return out


def test_pictures_are_those_of_the_script(drawn: Path) -> None:
    shown = {
        name for page in PAGES for name in re.findall(r"\]\(([\w-]+\.svg)\)", page.read_text())
    }
    assert {p.name for p in drawn.iterdir()} == {p.name for p in DOCS.glob("*.svg")} == shown


def test_pictures_are_up_to_date(drawn: Path) -> None:
    """The same drawing, up to the rounding of its numbers on another machine."""
    version = f"Matplotlib v{sys.modules['matplotlib'].__version__}"
    number = re.compile(r"(?<![\w#.-])-?\d+\.?\d*(?:e-?\d+)?(?![\w.])")
    for path in sorted(DOCS.glob("*.svg")):
        committed, seen = path.read_text(), (drawn / path.name).read_text()
        if version not in committed:
            pytest.skip(f"the pictures were made by another matplotlib than {version}")
        committed, seen = (
            re.sub(r'id="[^"]*"|url\([^)]*\)|#\w+', "", t) for t in (committed, seen)
        )
        assert number.sub("", seen) == number.sub("", committed), path.name
        values = [[float(x) for x in number.findall(t)] for t in (seen, committed)]
        assert values[0] == pytest.approx(values[1], abs=0.5), path.name
