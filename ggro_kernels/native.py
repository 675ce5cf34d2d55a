"""What every op's native.py needs to hand tensors to the extension."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from threading import local
from types import ModuleType

import torch

from ggro_kernels.dispatch import native

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""`ggro::DType` of csrc/include/ggro/types.h."""


def with_unit_column_stride(x: torch.Tensor) -> torch.Tensor:
    """`x` itself if its last dimension is contiguous, else a contiguous copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def gpu_kernels(device: torch.device) -> ModuleType | None:
    """The extension's functions for tensors on `device`, where that is a GPU."""
    return native().cuda if device.type == "cuda" else None


class _Thread(local):
    observe: Callable[[Callable[[], None]], None] | None = None


_thread = _Thread()


@contextmanager
def observing(observe: Callable[[Callable[[], None]], None]) -> Iterator[None]:
    """Within it, this thread's calls of the extension on a CPU go to `observe`, which makes them, now and later.

    Such a call has the addresses of its tensors, and does not keep them.
    """
    before = _thread.observe
    _thread.observe = observe
    try:
        yield
    finally:
        _thread.observe = before


def is_observed() -> bool:
    """Whether this thread is within `observing`."""
    return _thread.observe is not None


def call_observed(call: Callable[[], None]) -> None:
    """Call it, or let it be called where this thread is within `observing`."""
    if _thread.observe is None:
        call()
    else:
        _thread.observe(call)


def run(op: str, device: torch.device, *fields: object) -> None:
    """Call a function of the extension with the fields of its argument struct but `num_threads`.

    On a CPU it gets torch's threads, on a GPU a workspace, the device and its current stream.
    """
    kernels = gpu_kernels(device)
    if kernels is None:
        call_observed(partial(_run_on_cpu, getattr(native(), op), fields))
        return
    # Floats, so that tests see what is read before it is written.
    floats = -(-getattr(kernels, f"{op}_workspace")(*fields) // 4)
    workspace = torch.empty(floats, dtype=torch.float32, device=device)
    getattr(kernels, op)(*fields, workspace.data_ptr(), *_stream(device))


def _run_on_cpu(kernel: Callable[..., None], fields: tuple[object, ...]) -> None:
    kernel(*fields, torch.get_num_threads())


def _stream(device: torch.device) -> tuple[int, int]:
    """The device's number and the address of its current stream."""
    if device.type != "cuda":
        return 0, 0
    stream = torch.cuda.current_stream(device)
    return stream.device_index, stream.cuda_stream


def address(x: torch.Tensor | None) -> int:
    """Where the elements of `x` lie; null for None."""
    return 0 if x is None else x.data_ptr()
