"""Every implementation that a kernel test runs through."""

import pytest

from ggro_kernels import dispatch

ISAS = ("baseline", "avx2", "avx512", "avx512bf16")
IMPLEMENTATIONS = ("reference", *(f"native-{isa}" for isa in ISAS))


def select(name: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The `impl` argument for one of IMPLEMENTATIONS, its instruction set forced; skips what cannot run here."""
    impl, _, isa = name.partition("-")
    if impl == "native":
        if dispatch.native_error is not None:
            pytest.skip(f"native: {dispatch.native_error}")
        if isa not in dispatch.native().available_isas():
            pytest.skip(f"this build and processor have no {isa} kernels")
        monkeypatch.setenv("GGRO_CPU_ISA", isa)
    return impl
