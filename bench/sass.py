"""What nvcc makes of the CUDA solvers: registers, spills, instructions per iteration. Needs no GPU.

``python -m bench.sass`` writes bench/sass.json, against which tests/test_cuda_compiled.py
holds the sources.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "bench" / "sass.json"
SOURCES = ("sinkhorn", "token_cost")
FLAGS = [
    "-O3",
    "-std=c++20",
    "-DUSE_CUDA",
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
    "-Xptxas",
    "-v",
]


def toolkit() -> str:
    """Return the version of nvcc, such as 13.0.88."""
    version = re.search(r"V([\d.]+)", _output("nvcc", "--version"))
    return version.group(1) if version else "unknown"


def missing_tool() -> str | None:
    """Return why the sources cannot be compiled and read here, or None."""
    if shutil.which("nvcc") is None:
        return "nvcc is not installed"
    if [int(part) for part in re.findall(r"\d+", toolkit())] < [12, 8]:
        return "the CUDA backend needs nvcc 12.8 or later"
    return None if _cuobjdump() else "cuobjdump is not installed (Triton brings one)"


def _cuobjdump() -> str | None:
    triton = find_spec("triton")
    inside = (
        Path(triton.origin).parent / "backends/nvidia/bin" if triton and triton.origin else None
    )
    return shutil.which("cuobjdump") or shutil.which("cuobjdump", path=str(inside))


def _output(*command: str) -> str:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def _name(symbol: str) -> str:
    """Return a short name of a kernel's symbol: sinkhorn<2,7,25,4>, token_costs<2,4,2,1>."""
    function = re.search(r"\d+((?:sinkhorn|token_costs)[a-z_]*)", symbol)
    numbers = ",".join(re.findall(r"(?:L[ib]|DtypeE)(\d+)", symbol))
    return f"{function.group(1)}<{numbers}>" if function else symbol


def _loop(instructions: list[tuple[int, str]]) -> int:
    """Return the instructions of the innermost loop that multiplies the most."""
    loops = []
    for address, text in instructions:
        target = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
        if target and int(target.group(1), 16) <= address:
            body = [t for a, t in instructions if int(target.group(1), 16) <= a <= address]
            loops.append((sum("FFMA" in t or "HMMA" in t for t in body), len(body)))
    most = max((multiplied for multiplied, _ in loops), default=0)
    # outer loops hold more, but at most a few times more per instruction: take the densest
    dense = [(m / length, length) for m, length in loops if m >= 0.05 * most]
    return max(dense)[1] if dense else 0


def measure(architecture: str = "90") -> dict[str, dict[str, int]]:
    """Compile solvers and token costs; per kernel: registers, bytes, loop instructions."""
    tool = _cuobjdump()
    assert tool is not None
    include = Path(torch.__file__).parent / "include"
    found: dict[str, dict[str, int]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for source in SOURCES:
            binary = f"{folder}/{source}.cubin"
            log = _output(
                "nvcc", *FLAGS, f"-arch=sm_{architecture}", "-cubin", "-Icsrc", "-isystem",
                str(include), f"csrc/cuda/{source}.cu", "-o", binary,
            )  # fmt: skip
            for entry in log.split("Compiling entry function")[1:]:
                symbol = re.search(r"'(\S+)'", entry)
                registers = re.search(r"Used (\d+) registers", entry)
                spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", entry)
                stack = re.search(r"(\d+) bytes stack frame", entry)
                shared = re.search(r"(\d+) bytes smem", entry)
                if not (symbol and registers and spills and stack):
                    raise RuntimeError(f"ptxas prints something else: {entry}")
                found[_name(symbol.group(1))] = {
                    "registers": int(registers.group(1)),
                    "spilled_bytes": sum(map(int, spills.groups())),
                    "stack_bytes": int(stack.group(1)),
                    "static_shared_bytes": int(shared.group(1)) if shared else 0,
                }
            for function in _output(tool, "-sass", binary).split("Function : ")[1:]:
                code = re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);", function)
                found[_name(function.split()[0])]["loop_instructions"] = _loop(
                    [(int(address, 16), text) for address, text in code]
                )
    return dict(sorted(found.items()))


def main() -> None:
    """Write the record."""
    record: dict[str, Any] = {
        "toolkit": toolkit(),
        "architecture": "sm_90",
        "kernels": measure(),
    }
    RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
