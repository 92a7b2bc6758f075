"""docs/: links, pictures, and every number there that the code or a test has, too."""

from __future__ import annotations

import importlib.util
import itertools
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from shear_ops import _C, SpanConfig, reference
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
    assert _C.LEAST_ROLLOUT_NORM == reference.LEAST_ROLLOUT_NORM == 2.0**-24
    said = {
        "far": (1e30, ["Padding** has cost 1e30"]),
        "log2e": (math.log2(math.e), []),
        "top_level": (5, ["omega = 2 - 2^-k for k = 0 .. 5"]),
        "fresh": (
            -1,
            ["The first iteration is plain", "At each heat the first iteration is plain"],
        ),
        "test_every": (4, ["Every 4 iterations"]),
        "retreat_ratio": (1.5, ["ratio >= 1.5"]),
        "first_check": (4, ["iterations 4, 8, 16"]),
        "finish_again": (4, ["goes on for 4 iterations"]),
        "tolerance_share": (0.2, ["<= 0.2 * tol * max(D, eps)", "<= 0.2 * tol * max(L, eps)"]),
        "entropy_offset": (2, ["E = eps (2 + log(max(n, m)))"]),
        "hot_range": (256, ["range <= 256 heat eps ln 2", "more than 256 eps ln 2"]),
        "cooling": (
            4,
            [
                "the smallest power of 4",
                "then at heat / 4 * eps",
                "(heat / 4) E <=",
                "4 E, because",
            ],
        ),
        "few_tokens": (32, ["between up to 32 tokens each"]),
        "few_travel": (3, ["E counts 3 times"]),
        "least_residual": (2e-5, ["not less than 2e-5"]),
        "drift_bits": (20, ["[2^-20, 2^20]"]),
    }
    assert {name: pytest.approx(value) for name, (value, _) in said.items()} == _C.SOLVER
    texts = [text for _, of_constant in said.values() for text in of_constant]
    assert (_C.NEAR_DUPLICATE, _C.NEAR_ROUNDED) == (2.0**-7, 2.0**-4)
    for text in ("q < 2^-7", "q < 2^-4 here", *texts):
        assert text in METHOD, text


def test_defaults_are_those_of_the_code() -> None:
    config = SpanConfig()
    assert f"`n_iters` is {config.n_iters} by default" in METHOD
    assert f"`n_iters` (default {config.n_iters})" in NUMERICS
    assert f"`n_iters` ({config.n_iters})" in (ROOT / "README.md").read_text()
    assert config.tol == 5e-3
    assert "the default tol of 5e-3" in METHOD


def test_when_a_pair_is_heated() -> None:
    """The smallest power of 4 with range <= 256 heat, the range in units of eps ln 2."""
    share, cooling = _C.SOLVER["hot_range"], _C.SOLVER["cooling"]
    for heat in (1, 4, 16, 64):
        assert _C.first_heat(share * heat) == heat
        assert _C.first_heat(share * heat * 1.01) == heat * cooling
    assert _C.first_heat(0.0) == 1
    # an update moves a potential by about eps log n
    assert "(about 40 updates between spans of 100)" in METHOD
    assert share * math.log(2) / math.log(100) == pytest.approx(40, rel=0.05)


def test_where_mass_may_hide() -> None:
    for n, m in itertools.product(range(1, 130, 3), range(1, 130, 7)):
        assert _C.may_hide(n, m, 5e-3) == (2 / math.lcm(n, m) < 5e-3), (n, m)
    assert "2/1900 = 1.1e-3" in METHOD
    assert math.lcm(100, 76) == 1900


def test_what_the_tolerance_is() -> None:
    """Equation (6), and where its second part follows from the first."""
    tol, eps = 5e-3, 0.3
    entropy = _C.entropy_term(eps, math.log(100))
    assert entropy == pytest.approx(eps * (2 + math.log(100)))
    for distance in (0.0, 0.1, 1.0, 4.9 * entropy, 5.1 * entropy, 100.0):
        allowed = min(tol, 0.2 * tol * max(distance, eps) / entropy)
        assert _C.tolerance(tol, entropy, eps, distance) == pytest.approx(allowed)
    assert "Where D >= 5 E" in METHOD
    assert 5 * entropy / eps * SpanConfig().reg == pytest.approx(1, abs=0.05)  # "that is D >= N"


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
    """The same drawing, up to the rounding of its numbers on another machine.

    A residual far below the tolerance moves by a point between instruction sets.
    """
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
        assert values[0] == pytest.approx(values[1], abs=2), path.name
