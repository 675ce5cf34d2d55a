"""Every implementation that a kernel test runs through.

"cuda" is the extension's CUDA kernels: on a GPU where there is one, else on the CPU by the emulation of
tests/emulation, which `make test` builds.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

import ggro_kernels.native
from ggro_kernels import dispatch
from ggro_kernels.library import has_cuda_kernels, registered_ops
from tests.emulation import emulated_kernels

ISAS = ("baseline", "avx2", "avx512", "avx512bf16")
NATIVE = tuple(f"native-{isa}" for isa in ISAS)
KERNELS = (*NATIVE, "triton")
IMPLEMENTATIONS = ("reference", *KERNELS)
HAS_GPU = torch.cuda.is_available()

cuda_is_native = False
"""Whether `impl="native"` is the CUDA kernels in the test that runs, not those of the CPU."""

on_gpu: frozenset[str] = frozenset({"triton"} if HAS_GPU else ())
"""The values of `impl=` that get their tensors on the GPU in the test that runs."""


def select(name: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The `impl` argument for one of IMPLEMENTATIONS, its instruction set forced; skips what cannot run here."""
    impl, _, isa = name.partition("-")
    if impl == "native":
        if dispatch.native_error is not None:
            pytest.skip(f"native: {dispatch.native_error}")
        if isa not in dispatch.native().available_isas():
            pytest.skip(f"this build and processor have no {isa} kernels")
        monkeypatch.setenv("GGRO_CPU_ISA", isa)
    if impl == "cuda":
        _select_cuda(monkeypatch)
        return "native"
    if impl == "triton" and dispatch.triton_error is not None:
        pytest.skip(f"triton: {dispatch.triton_error}")
    return impl


def _select_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    if not HAS_GPU:
        emulated = emulated_kernels()
        monkeypatch.setattr(ggro_kernels.native, "gpu_kernels", lambda device: emulated)
    elif dispatch.cuda_error() is not None:
        pytest.skip(f"cuda: {dispatch.cuda_error()}")
    monkeypatch.setattr("tests.ggro_kernels.implementations.on_gpu", frozenset({"native"} if HAS_GPU else ()))
    monkeypatch.setattr("tests.ggro_kernels.implementations.cuda_is_native", True)


def emulates_cuda(impl: str) -> bool:
    """Whether `impl` is the emulated CUDA kernels in the test that runs."""
    return impl == "native" and cuda_is_native and not HAS_GPU


def tested_op(*names: str) -> str | None:
    """The op with CUDA kernels that the first of these names of tests has in it: "a.b.test_OP" or "test_OP"."""
    ops = {f"test_{op}": op for op in registered_ops() if has_cuda_kernels(op)}
    return next((ops[last] for name in names if (last := name.rpartition(".")[2]) in ops), None)


@contextmanager
def on_threads(count: int) -> Iterator[None]:
    """torch and the native kernels on `count` threads, back to one afterwards."""
    try:
        torch.set_num_threads(count)
        yield
    finally:
        torch.set_num_threads(1)


def thread_counts(impl: str, *counts: int) -> tuple[int, ...]:
    """`counts` for the CPU's kernels, which share their work between threads; one thread for the others."""
    return counts if impl == "native" and not cuda_is_native else (1,)
