"""No module of the package imports one that imports it: not in a function, not for types only."""

from __future__ import annotations

import ast
import graphlib
from pathlib import Path

import shear_ops

ROOT = Path(shear_ops.__file__).parent


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path, modules: set[str]) -> set[str]:
    """Those of modules that the file at path imports, anywhere in it."""
    found = set()
    package = path.relative_to(ROOT.parent).parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else ()
            source = ".".join([*above, *([node.module] if node.module else [])])
            names = {f"{source}.{alias.name}" for alias in node.names} - {"shear_ops._C"}
            found |= {name if name in modules else source for name in names}
    return (found & modules) - {name_of(path)}


def test_no_import_cycle() -> None:
    paths = sorted(ROOT.rglob("*.py"))
    modules = {name_of(path) for path in paths}
    graph = {name_of(path): imports(path, modules) for path in paths}
    assert "shear_ops.integrations.unsloth" in graph["shear_ops.integrations.trl"]  # not vacuous
    assert "shear_ops.training.bank" in graph["shear_ops"]
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the modules
