"""Compiling csrc/cuda as CMakeLists.txt says, and reading what its kernels use."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tests import sass

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "cuda_budget"


@dataclass(frozen=True)
class Usage:
    """What a kernel uses on one architecture."""

    kernel: str
    """As `entropy_topk: SelectKernel<float>`: its source and its instance."""
    architecture: str
    registers: int
    stack_bytes: int
    spilled_bytes: int
    shared_bytes: int
    """Without what a launch adds."""
    loads: Counter[int]
    """Loads of global memory by their width in bytes."""
    stores: Counter[int]
    generic: int
    """Loads and stores of which the compiler does not know the memory."""


@dataclass(frozen=True)
class Compilation:
    """One source for one architecture."""

    source: Path
    architecture: str
    """As nvcc has it: sm_90a."""
    command: tuple[str, ...]
    """Makes the cubin and prints what ptxas has to say."""
    cubin: Path


def nvcc() -> str | None:
    """Where the compiler is, None where there is none."""
    named = os.environ.get("CUDACXX")
    return shutil.which(named) if named else shutil.which("nvcc")


def nvcc_release() -> str:
    """Such as 13.0."""
    output = subprocess.run([nvcc() or "nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release ([\d.]+)", output)
    return found[1] if found else "unknown"


def configured() -> list[dict[str, str]]:
    """The commands with which CMake compiles everything.

    Raises subprocess.CalledProcessError where CMake fails; what it said is on the terminal.
    """
    pybind11 = subprocess.run(
        [sys.executable, "-m", "pybind11", "--cmakedir"], capture_output=True, text=True, check=True
    ).stdout.strip()
    command = ["cmake", "-S", str(ROOT), "-B", str(BUILD), "-G", "Ninja", "--log-level=WARNING", "-DGGRO_CUDA=ON"]
    command += ["-DCMAKE_BUILD_TYPE=Release", "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON"]
    command += [f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11}"]
    # cmake and ninja may lie beside the interpreter.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "PATH": path})
    return json.loads((BUILD / "compile_commands.json").read_text(encoding="utf-8"))


def compilations(commands: list[dict[str, str]], folder: Path) -> list[Compilation]:
    """One for every .cu and architecture that machine code is made for."""
    found = []
    for entry in commands:
        source = Path(entry["file"])
        if source.suffix != ".cu":
            continue
        arguments = shlex.split(entry["command"])
        targets = [argument for argument in arguments if argument.startswith("--generate-code=")]
        output = arguments[arguments.index("-o") + 1]
        flags = [argument for argument in arguments if argument not in (*targets, "-o", output, "-c", str(source))]
        for target in targets:
            virtual, _, code = target.removeprefix("--generate-code=arch=").partition(",code=")
            for architecture in re.findall(r"sm_\w+", code):
                cubin = folder / f"{source.stem}.{architecture}.cubin"
                command = [*flags, f"-gencode=arch={virtual},code={architecture}", "-Xptxas=-v", "-cubin"]
                command += ["-o", str(cubin), str(source)]
                found.append(Compilation(source, architecture, tuple(command), cubin))
    return found


def compiled(compilation: Compilation) -> list[Usage]:
    """What the kernels of a source use on an architecture.

    Raises RuntimeError with what nvcc said where it fails.
    """
    result = subprocess.run(compilation.command, cwd=BUILD, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"{compilation.source.name}, {compilation.architecture}: {result.stderr or result.stdout}")
    return usages(
        compilation.source.stem,
        compilation.architecture,
        result.stdout + result.stderr,
        sass.disassembled(compilation.cubin),
    )


def usages(source: str, architecture: str, ptxas: str, instructions: dict[str, str]) -> list[Usage]:
    """Of what ptxas says and of the instructions of every kernel."""
    names = readable(list(instructions))
    return [
        _usage(f"{source}: {names[mangled]}", architecture, _of_kernel(ptxas, mangled), listing)
        for mangled, listing in instructions.items()
    ]


def _of_kernel(ptxas: str, mangled: str) -> str:
    _, found, rest = ptxas.partition(f"Compiling entry function '{mangled}'")
    if not found:
        raise RuntimeError(f"ptxas did not tell what {mangled} uses: {ptxas}")
    return rest.partition("Compiling entry function")[0]


def _usage(kernel: str, architecture: str, ptxas: str, instructions: str) -> Usage:
    def number(pattern: str) -> int:
        found = re.search(pattern, ptxas)
        return int(found[1]) if found else 0

    return Usage(
        kernel=kernel,
        architecture=architecture,
        registers=number(r"Used (\d+) registers"),
        stack_bytes=number(r"(\d+) bytes stack frame"),
        spilled_bytes=number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads"),
        shared_bytes=number(r"(\d+) bytes smem"),
        loads=sass.global_loads(instructions),
        stores=sass.global_stores(instructions),
        generic=sass.accesses(instructions, "LD", "ST").total(),
    )


def readable(mangled: list[str]) -> dict[str, str]:
    """The kernels that `entry` is an instance of, such as `SelectKernel<float>`."""
    if not mangled:
        return {}
    output = subprocess.run(["c++filt", *mangled], capture_output=True, text=True, check=True).stdout
    return {name: instance_of(demangled) for name, demangled in zip(mangled, output.splitlines(), strict=True)}


def instance_of(demangled: str) -> str:
    """`ReduceKernel<float, 32>` of `void ggro::cuda::entry<ggro::cuda::ReduceKernel<float, 32> >(...)`."""
    found = re.search(r"\bentry<(.*?)\s*>\(", demangled)
    return re.sub(r"\b(?:ggro|cuda)::|\(anonymous namespace\)::", "", found[1] if found else demangled)


def measured() -> list[Usage]:
    """What every kernel uses on every architecture, compiled on all processors."""
    folder = BUILD / "cubins"
    commands = configured()
    folder.mkdir(exist_ok=True)
    work = compilations(commands, folder)
    # What takes longest first.
    work.sort(key=lambda compilation: -compilation.source.stat().st_size)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return [usage for result in pool.map(compiled, work) for usage in result]
