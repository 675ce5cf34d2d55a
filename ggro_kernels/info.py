"""What is installed, what loaded and what runs: `python -m ggro_kernels.info`."""

import importlib.metadata
import json
import os
import platform
from typing import Any

import torch

import ggro_kernels
from ggro_kernels import dispatch
from ggro_kernels.library import NAMESPACE, automatic, registered_ops

ENVIRONMENT = ("GGRO_IMPL", "GGRO_CPU_ISA", "GGRO_AUTOTUNE", "TRITON_INTERPRET")
"""What changes which kernels run."""


def capabilities() -> dict[str, Any]:
    """Versions, the native extension's state, and the implementation that `impl="auto"` picks per op and device.

    JSON-serialisable. `native["error"]` says why the extension is missing (None when it is there);
    `native["isa"]` is the instruction set in use, or None. `cuda_kernels`, also of the extension, and `triton` have the
    same.
    """
    native: dict[str, Any] = {"loaded": dispatch.native_error is None, "error": dispatch.native_error}
    if dispatch.native_error is None:
        extension = dispatch.native()
        native["openmp"] = extension.openmp
        native["isas"] = extension.available_isas()
        native["isa"] = extension.selected_isa()
    else:
        native.update(openmp=None, isas=[], isa=None)
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    error = dispatch.cuda_error()
    cuda_kernels = {"loaded": error is None, "error": error}
    error = dispatch.triton_error
    triton = {"loaded": error is None, "error": error, "interpreted": error is None and dispatch.INTERPRETING}
    triton["version"] = None if error else importlib.metadata.version("triton")
    return {
        "versions": {
            "ggro_kernels": ggro_kernels.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "machine": f"{platform.system()} {platform.machine()}",
        },
        "native": native,
        "triton": triton,
        "cuda_kernels": cuda_kernels,
        "cuda": {
            "available": torch.cuda.is_available(),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
        "threads": torch.get_num_threads(),
        "environment": {name: os.environ.get(name) for name in ENVIRONMENT},
        "ops": {
            f"{NAMESPACE}::{op}": {device: automatic(op, torch.device(device), torch.float32) for device in devices}
            for op in registered_ops()
        },
    }


def main() -> None:
    """Print the capabilities, one per line."""
    for section, content in capabilities().items():
        if not isinstance(content, dict):
            print(f"{section}: {content}")
            continue
        print(f"{section}:")
        for name, value in content.items():
            print(f"  {name}: {value if isinstance(value, str) else json.dumps(value)}")


if __name__ == "__main__":
    main()
