"""CONTRIBUTING: its map has every file and no other, its recipe for a distance leaves nothing out."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from problems import PROBLEMS
from shear_ops import _C, SpanConfig, reference
from shear_ops.config import CHOICES
from shear_ops.ops import backends
from test_backends import SCALE, TOLERANCES

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
# what a build, a run or an editor leaves, and what says nothing
UNLISTED = re.compile(r"__pycache__|__init__\.py|py\.typed|\.\w+|.*(\.(so|pyd|pyc|orig|rej|bak)|~)")
OPERATORS = _C.CHOICES["distance"]  # what torch.ops.shear can be asked for


def entries() -> Iterator[tuple[str, bool]]:
    """Paths of the map, folders without their slash; whether it has children there."""
    (tree,) = re.findall(r"```\n(csrc/.*?)```", TEXT, re.S)
    lines = [re.fullmatch(r"( *)(.*?)(?:  +.*)?", line) for line in tree.splitlines()]
    folders: list[str] = []
    for match, after in itertools.zip_longest(lines, lines[1:]):
        assert match is not None
        depth = len(match[1]) // 2
        del folders[depth:]
        for name in match[2].split(", "):
            path = "".join(folders) + name
            yield path.rstrip("/"), after is not None and len(after[1]) > len(match[1])
        if name.endswith("/"):
            folders.append(name)


MAP = dict(entries())


def tree(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if not UNLISTED.fullmatch(path.name):
            yield path
            if path.is_dir():
                yield from tree(path)


def is_listed(path: Path) -> bool:
    """By its own name, by a pattern, or by a folder above it that has no children in the map."""
    above = [str(p.relative_to(ROOT)) for p in path.parents if p.is_relative_to(ROOT)]
    if any(MAP.get(folder) is False for folder in above):
        return True
    names = [p for p in MAP if p.rpartition("/")[0] == str(path.parent.relative_to(ROOT))]
    return any(path.match(name) for name in names)


def test_the_map_has_every_file() -> None:
    folders = {path.split("/")[0] for path in MAP}
    assert {"csrc", "src", "tests", "bench", "docs", "examples"} <= folders
    missing = [
        str(path.relative_to(ROOT))
        for folder in sorted(folders - {"src"})
        for path in tree(ROOT / folder)
        if not is_listed(path)
    ]
    missing += [
        str(path.relative_to(ROOT))
        for path in tree(ROOT / "src" / "shear_ops")
        if not is_listed(path)
    ]
    assert not missing


def test_the_map_has_nothing_else() -> None:
    gone = [path for path in MAP if not any(ROOT.glob(path))]
    assert not gone
    assert len(MAP) > 100


def test_files_that_are_named_exist() -> None:
    named = set(re.findall(r"`([\w.][\w./-]*(?:/|\.(?:py|h|cpp|cu|cuh|md|json|toml|txt)))`", TEXT))
    gone = [
        name for name in named if not name.startswith(".no-deps") and not (ROOT / name).exists()
    ]
    assert not gone
    assert len(named) > 25


@pytest.mark.parametrize("argument", CHOICES)
def test_choices_are_the_enumerators(argument: str) -> None:
    """In their order; distance="exact" is the reference's alone, and comes after them."""
    compiled = _C.CHOICES[argument]
    assert CHOICES[argument][: len(compiled)] == compiled
    assert CHOICES[argument][len(compiled) :] == (("exact",) if argument == "distance" else ())
    for number, name in enumerate(compiled):
        assert SpanConfig(**{argument: name}).op_arguments()[argument] == number


@pytest.mark.parametrize("distance", CHOICES["distance"])
def test_distance_is_in_the_reference_and_the_words(distance: str) -> None:
    if distance == "exact":
        pytest.importorskip("ot", reason="W1 needs POT")
    x = torch.arange(12.0).reshape(6, 2)
    seen = reference.pair_distances(x, x + torch.tensor([3.0, -4.0]), distance=distance)
    assert (seen > 0).all()
    assert f'``"{distance}"``' in str(SpanConfig.__doc__)
    assert distance in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("distance", OPERATORS)
def test_distance_is_computed_and_judged(distance: str) -> None:
    """test_backends.py computes the problems of a distance on each backend that lists it."""
    assert distance in backends.DISTANCES["cpu"]
    assert distance in TOLERANCES
    assert distance == "sinkhorn" or distance in SCALE
    assert any(p.config.get("distance", "sinkhorn") == distance for p in PROBLEMS)
    numerics = (ROOT / "docs" / "numerics.md").read_text()
    assert re.search(rf"^\| {distance} \| ", numerics, re.M)


def test_no_backend_lists_what_is_no_distance() -> None:
    assert {d for of_backend in backends.DISTANCES.values() for d in of_backend} <= set(OPERATORS)
    assert TOLERANCES.keys() <= set(OPERATORS)


def test_triton_has_the_same_enumerators() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    from shear_ops.triton import pipeline

    for distance in backends.DISTANCES["triton"]:
        assert getattr(pipeline, distance.upper()) == OPERATORS.index(distance)
