"""Compiling the kernels that a call launches, for a GPU that is not there."""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from ggro_kernels import dispatch
from tests import sass
from tests.cubins.cases import Case


@dataclass(frozen=True)
class Cubin:
    """What a compiled kernel uses."""

    case: str
    kernel: str
    architecture: int
    warps: int
    registers: int
    shared_bytes: int
    spilled: int
    """Instructions that store to or load from local memory."""
    loads: Counter[int]
    """Number of load instructions of global memory by their width in bytes."""


class _Absent:
    """As much of a driver as compiling asks for."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int:
        # Compiled kernels are kept by device.
        return self.architecture

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self) -> None:
        return None


def compile_case(case: Case, architecture: int) -> list[Cubin]:
    """The different kernels of `case` for sm_`architecture`, in the order of their first launches."""
    compiled: list[Any] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        compiled.append(run(self, *args, grid=grid, warmup=True, **options))
        return compiled[-1]

    obstacle = dispatch._obstacle
    try:
        driver.set_active(_Absent(architecture))
        JITFunction.run = compile_only
        dispatch._obstacle = lambda *_: None
        case.call()
    finally:
        JITFunction.run = run
        dispatch._obstacle = obstacle
    return [_inspect(case.name, architecture, kernel) for kernel in dict.fromkeys(compiled)]


def _inspect(case: str, architecture: int, kernel: Any) -> Cubin:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [sass.tool("cuobjdump"), "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
        (instructions,) = sass.disassembled(Path(file.name)).values()
    registers = re.search(r"REG:(\d+)", usage)
    if registers is None:
        raise RuntimeError(f"cuobjdump did not tell the registers of {case}: {usage}")
    return Cubin(
        case=case,
        kernel=kernel.metadata.name,
        architecture=architecture,
        warps=kernel.metadata.num_warps,
        registers=int(registers[1]),
        shared_bytes=kernel.metadata.shared,
        spilled=sass.spills(instructions),
        loads=sass.global_loads(instructions),
    )
