"""Records of measurements: one JSON file per device, one entry per thing measured."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import shear_ops

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
GENERATED = ("bench/results", "bench/README.md", "README.md")  # written by these commands
PACKAGES = ("torch", "triton", "numpy", "POT", "geomloss", "ott-jax", "jax")
VECTOR_FLAGS = re.compile(r"avx|fma|amx|f16c|bf16|sve|asimd")

Record = dict[str, Any]


def device_facts(device: torch.device | None = None) -> dict[str, Any]:
    """What a time depends on that does not change from run to run."""
    import cpuinfo

    cpu = cpuinfo.get_cpu_info()
    name = cpu.get("brand_raw") or platform.machine()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    facts: dict[str, Any] = {
        "kind": "cpu",
        # clouds hide the model, and what counts is what it can multiply
        "name": f"{name} ({shear_ops.cpu_isa()}), {cores} core{'' if cores == 1 else 's'}",
        "cpu": name,
        "cores": cores,
        "flags": sorted(f for f in cpu.get("flags", []) if VECTOR_FLAGS.search(f)),
        "system": platform.platform(),
    }
    if device is not None and device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        facts |= {
            "kind": "gpu",
            "name": gpu.name,
            "capability": f"{gpu.major}.{gpu.minor}",
            "memory_gib": gpu.total_memory / 2**30,
            "cuda": torch.version.cuda,
        }
    return facts


def slug(facts: dict[str, Any]) -> str:
    """Name of a device's record: nvidia-h200, amd-epyc-avx2-2-cores."""
    return re.sub(r"[^a-z0-9]+", "-", facts["name"].lower()).strip("-")


def run_facts(tests: str) -> dict[str, Any]:
    """What a time depends on that may change from run to run; tests: what passed before it."""
    changes = _git("status", "--porcelain", "--", ".", *(f":!{p}" for p in GENERATED))
    return {
        "commit": _git("rev-parse", "HEAD") or os.environ.get("COMMIT") or "unknown",
        "dirty": bool(changes),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "shear_ops": shear_ops.__version__,
            **{name: _version(name) for name in PACKAGES},
        },
        "build": {"isa": shear_ops.cpu_isa(), "compiler": shear_ops.build_info()["compiler"]},
        "tests": tests,
    }


def _git(*arguments: str) -> str:
    """Output of git; nothing where git, or the history of these sources, is missing."""
    try:
        found = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return ""
    return found.stdout.strip() if found.returncode == 0 else ""


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def save(path: Path, device: dict[str, Any], name: str, entry: dict[str, Any]) -> None:
    """Put an entry into the record of a device; its other entries stay as they are.

    Raises:
        ValueError: if the record there is of another device.
    """
    record: Record = {"device": device, "entries": {}}
    if path.exists():
        record = load(path)
        if record["device"]["name"] != device["name"]:
            raise ValueError(f"{path} is a record of {record['device']['name']}")
    record["device"] = device
    record["entries"][name] = entry
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")


def load(path: Path) -> Record:
    """Read one record."""
    record: Record = json.loads(path.read_text())
    return record


def load_all(folder: Path = RESULTS) -> dict[str, Record]:
    """All records by the name of their file, in alphabetical order."""
    return {path.stem: load(path) for path in sorted(folder.glob("*.json"))}
