"""What the CUDA and Triton kernels compile to: registers, memory, spills, loops. Needs no GPU.

    python -m bench.machine_code cuda      # writes bench/sass.json
    python -m bench.machine_code triton    # writes bench/results/offline/triton.json

The loop of a kernel is what most of its time goes into: the smallest loop that does the work, which
is to have so many multiply-adds (LEAST) of the fastest kind that the kernel multiplies with. A loop
is a jump back and everything between it and its target.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import click
import torch

from shear_ops import SpanConfig

from .record import RESULTS, ROOT, run_facts

CUDA_RECORD = ROOT / "bench" / "sass.json"
TRITON_RECORD = RESULTS / "offline" / "triton.json"  # of no device: bench.report leaves it out

# multiply-adds in a loop that does the work: on tensor cores, or not
LEAST = {"IGMMA": 2, "IMMA": 16, "HGMMA": 2, "HMMA": 16, "FFMA": 16}
INSTRUCTION = re.compile(
    r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)([^;]*);", re.M
)  # /*address*/ @predicate NAME.MODIFIERS operands;


@dataclass(frozen=True)
class Loop:
    """The loop of a kernel."""

    multiplies_with: str  # a key of LEAST
    counts: Counter[str]  # of its instructions, by name

    @property
    def instructions(self) -> int:
        """How many it has."""
        return self.counts.total()


def loop(code: str) -> Loop | None:
    """Find the loop in the machine code of a kernel, as cuobjdump prints it."""
    instructions = [(int(at, 16), name, rest) for at, name, rest in INSTRUCTION.findall(code)]
    loops = []
    for at, name, rest in instructions:
        jump = re.search(r"0x([0-9a-f]+)", rest)
        if name.startswith("BRA") and jump and (begin := int(jump[1], 16)) <= at:
            loops.append(Counter(n.split(".")[0] for a, n, _ in instructions if begin <= a <= at))
    for kind, least in LEAST.items():
        if working := [counts for counts in loops if counts[kind] >= least]:
            return Loop(kind, min(working, key=Counter.total))
    return None


def functions(binary: Path) -> dict[str, str]:
    """Machine code of every kernel in a cubin, by symbol."""
    parts = _output(str(cuobjdump()), "-sass", str(binary)).split("Function : ")[1:]
    return {part.split()[0]: part for part in parts}


@cache
def cuobjdump() -> Path | None:
    """The program that reads cubins: Triton brings one, and so does the CUDA toolkit."""
    triton = find_spec("triton")
    if triton and triton.origin:
        inside = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        if inside.exists():
            return inside
    found = shutil.which("cuobjdump")
    return Path(found) if found else None


def _output(*command: str) -> str:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


# CUDA: what nvcc makes of the sources

SOURCES = ("sinkhorn", "token_cost")
FLAGS = (
    "-O3", "-std=c++20", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000", "-Xptxas", "-v",
)  # fmt: skip


def toolkit() -> str:
    """Return the version of nvcc, such as 13.0.88."""
    found = re.search(r"V([\d.]+)", _output("nvcc", "--version"))
    return found[1] if found else "unknown"


def missing_tool() -> str | None:
    """Return why the CUDA sources cannot be compiled and read here, or None."""
    if shutil.which("nvcc") is None:
        return "nvcc is not installed"
    if [int(part) for part in re.findall(r"\d+", toolkit())] < [12, 8]:
        return "the CUDA backend needs nvcc 12.8 or later"
    return None if cuobjdump() else "cuobjdump is not installed (Triton brings one)"


def cuda_kernels() -> dict[str, dict[str, int]]:
    """Compile solvers and token costs for sm_90; what goes into the record of each kernel."""
    include = Path(torch.__file__).parent / "include"
    found: dict[str, dict[str, int]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for source in SOURCES:
            binary = Path(folder, f"{source}.cubin")
            log = _output(
                "nvcc", *FLAGS, "-arch=sm_90", "-cubin", "-Icsrc", "-isystem", str(include),
                f"csrc/cuda/{source}.cu", "-o", str(binary),
            )  # fmt: skip
            resources = dict(map(_resources, log.split("Compiling entry function")[1:]))
            for symbol, code in functions(binary).items():
                most = loop(code)
                found[_short(symbol)] = {
                    **resources[symbol],
                    "loop_instructions": most.instructions if most else 0,
                }
    return dict(sorted(found.items()))


def _resources(entry: str) -> tuple[str, dict[str, int]]:
    """Symbol of a kernel, and what it needs, in the words of ptxas."""
    symbol = re.search(r"'(\S+)'", entry)
    registers = re.search(r"Used (\d+) registers", entry)
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", entry)
    stack = re.search(r"(\d+) bytes stack frame", entry)
    shared = re.search(r"(\d+) bytes smem", entry)
    if not (symbol and registers and spills and stack):
        raise RuntimeError(f"ptxas prints something else: {entry}")
    return symbol[1], {
        "registers": int(registers[1]),
        "spilled_bytes": sum(map(int, spills.groups())),
        "stack_bytes": int(stack[1]),
        "static_shared_bytes": int(shared[1]) if shared else 0,
    }


def _short(symbol: str) -> str:
    """Return a short name of a kernel's symbol: sinkhorn<2,7,25,4>, token_costs<2,4,2,1>."""
    function = re.search(r"\d+((?:sinkhorn|token_costs)[a-z_]*)", symbol)
    numbers = ",".join(re.findall(r"(?:L[ib]|DtypeE)(\d+)", symbol))
    return f"{function[1]}<{numbers}>" if function else symbol


# Triton: a call of span_weights is made under a driver that names a target and launches nothing, so
# that what is compiled is what that call would compile there

TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "gfx942": ("hip", "gfx942", 64)}
SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "gfx942": 64 * 1024}  # bytes of a program
SPANS = (32, 64, 100, 200)  # one for every tile of the solver, and one that fits none
DIM = 3584
HOT = ("token_cost_kernel", "solve_kernel")


@dataclass(frozen=True)
class Kernel:
    """A Triton kernel as it was compiled."""

    name: str
    variant: str  # its compile-time arguments
    shared: int  # bytes
    warps: int
    binary: bytes  # a cubin, or empty


class _Driver:
    """Names a target; nothing runs on it."""

    def __init__(self, name: str) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget(*TARGETS[name])
        self.device = list(TARGETS).index(name)

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self.target


@contextmanager
def compiling_for(name: str) -> Iterator[list[Kernel]]:
    """Inside, launches of Triton kernels compile for this target, and are listed; none runs."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from shear_ops.triton import ops, queue, target, token_cost

    kernels: dict[tuple[str, str], Kernel] = {}
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        compiled = run(self, *args, grid=grid, warmup=True, **options)
        variant = ", ".join(f"{k}={v}" for k, v in options.items() if k.isupper() or len(k) == 1)
        kernels[self.__name__, variant] = Kernel(
            self.__name__, variant, compiled.metadata.shared, compiled.metadata.num_warps,
            compiled.asm.get("cubin", b""),
        )  # fmt: skip
        found[:] = kernels.values()
        return compiled

    found: list[Kernel] = []
    backend = TARGETS[name][0]
    on_nvidia = backend == "cuda"
    facts = target.Target(
        132, on_nvidia, "tf32x3" if on_nvidia else "ieee", SHARED[name], int(not on_nvidia)
    )
    with (
        mock.patch.object(driver, "_active", _Driver(name)),
        mock.patch.object(JITFunction, "run", compile_only),
        mock.patch.object(ops, "_check_on_gpu"),  # tensors are on the CPU here
        mock.patch.object(queue, "target_of", return_value=facts),
        mock.patch.object(token_cost, "target_of", return_value=facts),
    ):
        yield found


def compile_all(name: str, spans: tuple[int, ...] = SPANS) -> list[Kernel]:
    """Compile every kernel that calls with these spans take, for all dtypes and distances."""
    from shear_ops.triton import ops

    offsets, groups, labels = (torch.tensor(v) for v in ([0, 256, 512], [0, 0], [1, 0]))
    with compiling_for(name) as kernels:
        for dtype in (torch.bfloat16, torch.float32):
            hidden = torch.zeros(512, DIM, dtype=dtype)
            for span in spans:
                config = SpanConfig(span=span, stride=span // 4, check_finite=False)
                ops.span_weights(hidden, offsets, groups, labels, **config.op_arguments())
            for distance in ("mmd", "cosine"):
                config = SpanConfig(distance=distance, check_finite=False)
                ops.span_weights(hidden, offsets, groups, labels, **config.op_arguments())
    return list(kernels)


def facts(kernel: Kernel) -> dict[str, Any]:
    """What goes into the record of a Triton kernel."""
    out: dict[str, Any] = {
        "kernel": kernel.name, "variant": kernel.variant, "warps": kernel.warps,
        "shared_bytes": kernel.shared,
    }  # fmt: skip
    if not kernel.binary or cuobjdump() is None:
        return out
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder, "kernel.cubin")
        binary.write_bytes(kernel.binary)
        usage = _output(str(cuobjdump()), "-res-usage", str(binary))
        (code,) = functions(binary).values()
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    out |= {"registers": int(found[1]), "stack_bytes": int(found[2])}
    if kernel.name in HOT and (most := loop(code)) is not None:
        out["hot_loop"] = {
            "instructions": most.instructions, "multiplies_with": most.multiplies_with,
            "spills": most.counts["LDL"] + most.counts["STL"],
            **dict(most.counts.most_common(8)),
        }  # fmt: skip
    return out


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Compile kernels for GPUs that need not be here, and record what came out."""


@main.command("cuda")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), default=CUDA_RECORD)
def _cuda(out: Path) -> None:
    """The solvers and the token costs of the CUDA backend.

    The tests hold the sources against the record. Wants nvcc; takes about a minute.
    """
    if why := missing_tool():
        raise click.ClickException(why)
    _write(out, {"toolkit": toolkit(), "architecture": "sm_90", "kernels": cuda_kernels()})


@main.command("triton")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), default=TRITON_RECORD)
@click.option("--target", multiple=True, type=click.Choice(list(TARGETS)), help="[default: all]")
def _triton(out: Path, target: tuple[str, ...]) -> None:
    """All Triton kernels.

    Takes about two minutes; nothing in the record was measured on a GPU.

    Example: python -m bench.machine_code triton --target sm_90 --out /tmp/sm_90.json
    """
    targets = {name: [facts(k) for k in compile_all(name)] for name in target or TARGETS}
    run = {k: v for k, v in run_facts("").items() if k in ("commit", "dirty", "date")}
    _write(out, {"run": run, "triton": version("triton"), "targets": targets})


def _write(out: Path, record: dict[str, Any]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    click.echo(f"written: {out}")


if __name__ == "__main__":
    main()
