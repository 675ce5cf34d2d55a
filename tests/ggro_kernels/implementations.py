"""Every implementation that a kernel test runs through."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from ggro_kernels import dispatch

ISAS = ("baseline", "avx2", "avx512", "avx512bf16")
NATIVE = tuple(f"native-{isa}" for isa in ISAS)
KERNELS = (*NATIVE, "triton")
IMPLEMENTATIONS = ("reference", *KERNELS)


def select(name: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The `impl` argument for one of IMPLEMENTATIONS, its instruction set forced; skips what cannot run here."""
    impl, _, isa = name.partition("-")
    if impl == "native":
        if dispatch.native_error is not None:
            pytest.skip(f"native: {dispatch.native_error}")
        if isa not in dispatch.native().available_isas():
            pytest.skip(f"this build and processor have no {isa} kernels")
        monkeypatch.setenv("GGRO_CPU_ISA", isa)
    if impl == "triton" and dispatch.triton_error is not None:
        pytest.skip(f"triton: {dispatch.triton_error}")
    return impl


@contextmanager
def on_threads(count: int) -> Iterator[None]:
    """torch and the native kernels on `count` threads, back to one afterwards."""
    try:
        torch.set_num_threads(count)
        yield
    finally:
        torch.set_num_threads(1)


def thread_counts(impl: str, *counts: int) -> tuple[int, ...]:
    """`counts` for native kernels, which share their work between threads; one thread for the others."""
    return counts if impl == "native" else (1,)
