"""Which implementation of an op runs: `impl=`, the environment variable GGRO_IMPL, the device and the dtype."""

import functools
import importlib
import importlib.util
import os
from types import ModuleType

import torch

IMPLS = ("auto", "native", "triton", "reference")

AUTOMATIC = {"cpu": ("native",), "cuda": ("native", "triton")}
"""What 'auto' runs by the type of device, the first that can run there; the eager reference everywhere else."""

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What native and Triton kernels take."""

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
"""Triton decides when it is imported whether it compiles its kernels or interprets them."""


def _load_native() -> tuple[ModuleType | None, str | None]:
    try:
        return importlib.import_module("ggro_kernels._native"), None
    except ImportError as error:
        return (
            None,
            f"the extension ggro_kernels._native did not load ({error}): reinstall without GGRO_BUILD_NATIVE=0",
        )


def _find_triton() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "there is no package triton: pip install triton"
    if not INTERPRETING and not torch.cuda.is_available():
        return "torch sees no GPU; TRITON_INTERPRET=1, set before Python starts, interprets the kernels slowly"
    return None


_native, native_error = _load_native()
"""The extension, or None and why it is not there."""

triton_error = _find_triton()
"""Why Triton kernels cannot run, or None; Triton itself is imported by the first that runs."""


def check_impl(impl: str) -> None:
    """Raise ValueError unless `impl` is one of `IMPLS`."""
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {', '.join(map(repr, IMPLS))}, got {impl!r}")


def native() -> ModuleType:
    """The native extension; RuntimeError with the reason where it is missing."""
    if _native is None:
        raise RuntimeError(f"impl='native' is not available: {native_error}")
    return _native


@functools.lru_cache
def cuda_error(device: int | None = None) -> str | None:
    """Why the extension's CUDA kernels cannot run on this GPU, the current one by default; None if they can."""
    if native_error is not None:
        return native_error
    if not hasattr(native(), "cuda"):
        return "the extension was built without its CUDA part: reinstall with nvcc on PATH (GGRO_CUDA=ON insists on it)"
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    return native().cuda.obstacle(torch.cuda.current_device() if device is None else device) or None


def resolve(impl: str, device: torch.device, *dtypes: torch.dtype, cuda: bool = False, triton: bool = True) -> str:
    """The implementation that runs: 'native', 'triton' or 'reference'.

    'auto' is what GGRO_IMPL names, else what `AUTOMATIC` has for the device if it can run, else the eager reference on
    the tensors' own device. Anything named explicitly runs or raises RuntimeError. `cuda`, `triton`: whether the op has
    CUDA kernels, and Triton's.
    """
    if impl == "auto":
        impl = os.environ.get("GGRO_IMPL") or "auto"
        if impl not in IMPLS:
            raise ValueError(f"GGRO_IMPL must be one of {', '.join(map(repr, IMPLS))}, got {impl!r}")
    if impl == "reference":
        return impl
    # Asked once: it costs a quarter of a microsecond.
    kind = device.type
    if impl == "auto":
        for chosen in AUTOMATIC.get(kind, ()):
            if _obstacle(chosen, kind, device, dtypes, cuda, triton) is None:
                return chosen
        return "reference"
    obstacle = _obstacle(impl, kind, device, dtypes, cuda, triton)
    if obstacle is not None:
        raise RuntimeError(f"impl={impl!r} {obstacle}")
    return impl


def _obstacle(
    impl: str, kind: str, device: torch.device, dtypes: tuple[torch.dtype, ...], cuda: bool, triton: bool
) -> str | None:
    """Why 'native' or 'triton' cannot run on tensors of these dtypes on this device of this kind; None if it can."""
    if impl == "triton" and not triton:
        return "has no kernel of this op: use 'auto'"
    error = triton_error if impl == "triton" else cuda_error(device.index) if kind == "cuda" else native_error
    if error is not None:
        return f"is not available: {error}"
    if impl == "native" and kind == "cuda" and not cuda:
        return f"has no kernel of this op for a GPU, got a tensor on {device}: use 'auto'"
    if impl == "native" and kind not in AUTOMATIC:
        return f"runs on a CPU or an NVIDIA GPU, got a tensor on {device}: use 'auto'"
    if impl == "triton" and kind != "cuda" and not (INTERPRETING and kind == "cpu"):
        return f"runs on a GPU, got a tensor on {device}: use 'auto'"
    for dtype in dtypes:
        if dtype not in KERNEL_DTYPES:
            return f"takes float32, bfloat16 and float16, got {dtype}: use 'reference'"
    return None
