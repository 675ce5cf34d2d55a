"""The CUDA kernels on a CPU: `emulated_kernels()` is the module that `make emulation` builds."""

import functools
import importlib.machinery
import importlib.util
from pathlib import Path
from types import ModuleType

FOLDER = Path(__file__).resolve().parents[2] / "build" / "emulation"


@functools.cache
def emulated_kernels() -> ModuleType:
    """The functions of the extension's CUDA part, with tensors on the CPU.

    Raises RuntimeError where they are not built.
    """
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = FOLDER / f"_emulated{suffix}"
        if path.exists():
            spec = importlib.util.spec_from_file_location("_emulated", path)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            return module
    raise RuntimeError(f"{FOLDER} holds no emulation of the CUDA kernels: make emulation")
