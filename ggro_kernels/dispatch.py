"""Which implementation of an op runs: `impl=`, the environment variable GGRO_IMPL, the device and the dtype."""

import importlib
import os
from types import ModuleType

import torch

IMPLS = ("auto", "native", "triton", "reference")


def _load_native() -> tuple[ModuleType | None, str | None]:
    try:
        return importlib.import_module("ggro_kernels._native"), None
    except ImportError as error:
        return (
            None,
            f"the extension ggro_kernels._native did not load ({error}): reinstall without GGRO_BUILD_NATIVE=0",
        )


_native, native_error = _load_native()
"""The extension, or None and why it is not there."""

NATIVE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_impl(impl: str) -> None:
    """Raise ValueError unless `impl` is one of `IMPLS`."""
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {', '.join(map(repr, IMPLS))}, got {impl!r}")


def native() -> ModuleType:
    """The native extension; RuntimeError with the reason where it is missing."""
    if _native is None:
        raise RuntimeError(f"impl='native' is not available: {native_error}")
    return _native


def resolve(impl: str, device: torch.device, *dtypes: torch.dtype) -> str:
    """The implementation that runs: 'native' or 'reference'.

    'auto' is what GGRO_IMPL names, else native kernels for CPU tensors of fp32, bf16 and fp16 where the extension
    loaded, else the eager reference on the tensors' own device. Anything named explicitly runs or raises RuntimeError.
    """
    if impl == "auto":
        impl = os.environ.get("GGRO_IMPL") or "auto"
        if impl not in IMPLS:
            raise ValueError(f"GGRO_IMPL must be one of {', '.join(map(repr, IMPLS))}, got {impl!r}")
    if impl == "auto":
        if _native is None or device.type != "cpu":
            return "reference"
        for dtype in dtypes:
            if dtype not in NATIVE_DTYPES:
                return "reference"
        return "native"
    if impl == "triton":
        raise RuntimeError("impl='triton' is not available in this version: use 'auto', 'native' or 'reference'")
    if impl == "native":
        native()
        if device.type != "cpu":
            raise RuntimeError(f"impl='native' has CPU kernels only, got a tensor on {device}: use 'auto'")
        for dtype in dtypes:
            if dtype not in NATIVE_DTYPES:
                raise RuntimeError(f"impl='native' takes float32, bfloat16 and float16, got {dtype}: use 'reference'")
    return impl
