"""What GPU code is made of after compilation, from its disassembly."""

import functools
import importlib.util
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

_BYTES = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}


@functools.cache
def tool(name: str) -> str:
    """Where a program of the CUDA toolkit is: on PATH, or in Triton's wheel.

    Raises RuntimeError where it is in neither.
    """
    found = shutil.which(name)
    if found is not None:
        return found
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        program = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / name
        if program.exists():
            return str(program)
    raise RuntimeError(f"{name} is neither on PATH nor in a package triton: install the CUDA toolkit or Triton")


def disassembled(cubin: Path) -> dict[str, str]:
    """The instructions of every kernel in a file, by its mangled name."""
    listing = subprocess.run([tool("nvdisasm"), str(cubin)], capture_output=True, text=True, check=True).stdout
    _, *parts = re.split(r"^\.text\.(\S+):$", listing, flags=re.MULTILINE)
    return dict(zip(parts[::2], parts[1::2], strict=True))


def accesses(instructions: str, *opcodes: str) -> Counter[int]:
    """Number of the instructions with these opcodes, such as LDG, by the bytes that a thread moves."""
    found = re.findall(rf"\b(?:{'|'.join(opcodes)})\b((?:\.\w+)*)", instructions)
    return Counter(max((_BYTES.get(part, 0) for part in parts.split(".")), default=0) or 4 for parts in found)


def global_loads(instructions: str) -> Counter[int]:
    """Loads of global memory, those that go to shared memory included."""
    return accesses(instructions, "LDG", "LDGSTS")


def global_stores(instructions: str) -> Counter[int]:
    """Stores to global memory."""
    return accesses(instructions, "STG")


def spills(instructions: str) -> int:
    """Loads and stores of local memory."""
    return accesses(instructions, "LDL", "STL").total()


def shown(widths: Counter[int]) -> str:
    """`8x16B 2x4B`, the widest first."""
    return " ".join(f"{count}x{width}B" for width, count in sorted(widths.items(), reverse=True))
