"""The compiled module: what it links, which symbols it needs, that every instruction set agrees."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import shear_ops
from rollouts_for_tests import CONFIG, arguments
from shear_ops import _C, SpanConfig
from shear_ops.ops import torch_op

MODULE = Path(_C.__file__ or "")
CUDA_MODULE = MODULE.with_name("shear_cuda.so")
MODULES = [MODULE, *([CUDA_MODULE] if CUDA_MODULE.exists() else [])]


def tool(*command: str) -> str:
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("module", MODULES, ids=lambda p: p.name.split(".")[0])
def test_only_stable_abi_symbols(module: Path) -> None:
    undefined = tool("nm", "-D", "--undefined-only", str(module))
    assert (
        "torch_parallel_for" if module == MODULE else "torch_get_current_cuda_stream"
    ) in undefined
    assert not re.findall(r"_ZN(?:K)?(?:2at|3c10|5torch)\S*", undefined)


@pytest.mark.parametrize("module", MODULES, ids=lambda p: p.name.split(".")[0])
def test_links_torch_and_the_system_only(module: Path) -> None:
    dynamic = tool("readelf", "-d", str(module))
    needed = set(re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic))
    assert "libtorch.so" in needed  # brings libtorch_cuda into scope on a CUDA build
    system = {"libtorch.so", "libtorch_cpu.so", "libstdc++.so.6", "libgcc_s.so.1", "libc.so.6",
              "libm.so.6", "ld-linux-x86-64.so.2"}  # fmt: skip
    assert needed <= system
    assert "RUNPATH" not in dynamic
    assert "RPATH" not in dynamic


@pytest.mark.parametrize("module", MODULES, ids=lambda p: p.name.split(".")[0])
def test_no_build_path_in_the_binary(module: Path) -> None:
    content = module.read_bytes()
    assert len(content) < 20e6
    for path in (Path(__file__).parents[1], Path(torch.__file__).parent):
        assert str(path).encode() not in content


def test_version_is_one() -> None:
    from importlib.metadata import version

    assert shear_ops.__version__ == version("shear_ops")
    assert shear_ops.build_info()["torch_abi"] == "2.10"


def test_operators_are_defined_once() -> None:
    for name in torch_op.NAMES:
        assert getattr(torch.ops.shear, name).overloads() == ["default"]


RUN = """
import sys, torch, shear_ops
sys.path.insert(0, sys.argv[1])
from rollouts_for_tests import CONFIG, arguments
seen = [shear_ops.span_weights(**arguments(dtype), config=shear_ops.SpanConfig(**CONFIG, distance=d))
        for dtype in (torch.float32, torch.float16, torch.bfloat16)
        for d in ("sinkhorn", "chamfer", "mmd", "cosine")]
torch.save((shear_ops.cpu_isa(), seen), sys.argv[2])
"""


def run_with(isa: str, out: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", RUN, str(Path(__file__).parent), str(out)],
        env={**os.environ, "SHEAR_ISA": isa}, capture_output=True, text=True,
    )  # fmt: skip


@pytest.mark.parametrize("isa", shear_ops.build_info()["instruction_sets"])
def test_every_instruction_set_computes_the_same(isa: str, tmp_path: Path) -> None:
    if not shear_ops.build_info()["instruction_sets"][isa]:
        failed = run_with(isa, tmp_path / "out.pt")
        assert f"SHEAR_ISA={isa}: this machine does not support it" in failed.stderr
        pytest.skip(f"this machine has no {isa}")
    done = run_with(isa, tmp_path / "out.pt")
    assert done.returncode == 0, done.stderr
    name, weights = torch.load(tmp_path / "out.pt")
    assert name == isa
    seen = iter(weights)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for distance in ("sinkhorn", "chamfer", "mmd", "cosine"):
            config = SpanConfig(**CONFIG, distance=distance)
            wanted = shear_ops.span_weights(**arguments(dtype), config=config, backend="reference")
            torch.testing.assert_close(next(seen), wanted, rtol=2e-3, atol=0)


def test_unknown_instruction_set(tmp_path: Path) -> None:
    assert "SHEAR_ISA must be one of" in run_with("sse9", tmp_path / "out.pt").stderr


def configure(folder: Path, *arguments: str, **environment: str) -> str:
    # that of the environment first, as a build has it
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    cmake = shutil.which("cmake", path=path)
    if cmake is None:
        pytest.skip("cmake is not installed")
    done = subprocess.run(
        [cmake, *arguments, "-B", str(folder / "build")],
        env={**os.environ, **environment}, capture_output=True, text=True,
    )  # fmt: skip
    return " ".join((done.stdout + done.stderr).split())


ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(("compiler", "found"), [("g++-11", "GNU 11"), ("clang++", "Clang")])
def test_compilers_that_cannot_build_are_refused(compiler: str, found: str, tmp_path: Path) -> None:
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not installed")
    options = ["-DSKBUILD_PROJECT_NAME=shear_ops", "-DSKBUILD_PROJECT_VERSION=0.1.0"]
    seen = configure(tmp_path, "-S", str(ROOT), *options, CXX=compiler)
    assert f"shear_ops needs g++ 12 or later, found {found}" in seen


FIND_TORCH = """
cmake_minimum_required(VERSION 3.25.2)
project(find LANGUAGES NONE)
list(APPEND CMAKE_MODULE_PATH "{root}/cmake")
set(Python_EXECUTABLE "{isolated}")
find_package(TorchStable 2.10 REQUIRED)
message(STATUS "the torch of ${{TORCH_DIR}}")
"""


def test_torch_is_found_from_an_isolated_build(tmp_path: Path) -> None:
    """uv builds in an environment that knows nothing of the one it builds for."""

    def python(where: Path, platlib: Path) -> Path:
        where.parent.mkdir(parents=True)
        where.write_text(f"#!/bin/sh\necho {platlib}\n")
        where.chmod(0o755)
        return where

    target = tmp_path / "target"
    target.mkdir()
    (target / "torch").symlink_to(Path(torch.__file__).parent)
    isolated = python(tmp_path / "isolated" / "python", tmp_path / "nothing")
    on_path = python(tmp_path / "activated" / "python", target)
    system = os.environ["PATH"].split(os.pathsep)
    tools = [p for p in system if not (Path(p) / "python").exists()]
    cmake = Path(shutil.which("cmake") or "")
    source = tmp_path / "source"
    source.mkdir()
    (source / "CMakeLists.txt").write_text(FIND_TORCH.format(root=ROOT, isolated=isolated))
    (tmp_path / "tools").mkdir()
    if cmake.name:
        (tmp_path / "tools" / "cmake").symlink_to(cmake)
    without = os.pathsep.join([str(tmp_path / "tools"), str(isolated.parent), *tools])

    seen = configure(tmp_path, "-S", str(source), "--fresh", PATH=without)
    assert f"no torch >= 2.10 for '{isolated}', in .venv, or for a python on PATH" in seen
    assert "set TORCH_DIR=<site-packages>/torch" in seen
    paths = os.pathsep.join([without, str(on_path.parent)])
    seen = configure(tmp_path, "-S", str(source), "--fresh", PATH=paths)
    assert f"the torch of {target}/torch" in seen
    python(source / ".venv" / "bin" / "python", target)
    seen = configure(tmp_path, "-S", str(source), "--fresh", PATH=without)
    assert f"the torch of {target}/torch" in seen
    torch_dir = str(tmp_path / "elsewhere" / "torch")
    seen = configure(tmp_path, "-S", str(source), "--fresh", PATH=without, TORCH_DIR=torch_dir)
    assert f"no torch >= 2.10 in TORCH_DIR='{torch_dir}'" in seen


def test_import_brings_no_trainer() -> None:
    code = "import shear_ops, sys; print(*{m.split('.')[0] for m in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"trl", "transformers", "peft", "verl", "accelerate"} & set(done.stdout.split())
