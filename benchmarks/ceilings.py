"""What the machine can do, measured in the same run as the kernels: bandwidth and matrix products."""

import torch

from benchmarks.registry import Case, Inputs, Provider

# 256 MiB of fp32, far beyond any cache.
_READ_ELEMENTS = 1 << 26
_SIZE = 2048
# 512 MiB of bf16 read and written, and products that take a GPU about a millisecond.
_COPY_ELEMENTS = 1 << 28
_GPU_SIZE = 8192

READ = "read"
COPY = "copy"
MATMUL = "matmul"


def _read() -> Case:
    return Case(
        op=READ,
        label="amax of 256 MiB",
        shape={"elements": _READ_ELEMENTS},
        dtype=torch.float32,
        bytes=4 * _READ_ELEMENTS,
        flops=_READ_ELEMENTS,
        inputs=lambda: {"input": torch.randn(_READ_ELEMENTS)},
        providers=(Provider("torch", torch.amax),),
    )


def _copy() -> Case:
    def inputs() -> Inputs:
        source = torch.randn(_COPY_ELEMENTS, dtype=torch.bfloat16)
        return {"target": torch.empty_like(source), "source": source}

    return Case(
        op=COPY,
        label="copy of 512 MiB",
        shape={"elements": _COPY_ELEMENTS},
        dtype=torch.bfloat16,
        bytes=2 * 2 * _COPY_ELEMENTS,
        flops=_COPY_ELEMENTS,
        inputs=inputs,
        providers=(Provider("torch", lambda target, source: target.copy_(source)),),
    )


def _matmul(dtype: torch.dtype, size: int) -> Case:
    def inputs() -> Inputs:
        return {"input": torch.randn(size, size).to(dtype), "mat2": torch.randn(size, size).to(dtype)}

    return Case(
        op=MATMUL,
        label=f"{size} x {size}",
        shape={"size": size},
        dtype=dtype,
        bytes=3 * size**2 * dtype.itemsize,
        flops=2 * size**3,
        inputs=inputs,
        providers=(Provider("torch", torch.mm),),
    )


CASES = [_read(), _matmul(torch.float32, _SIZE), _matmul(torch.bfloat16, _SIZE)]
GPU_CASES = [_matmul(torch.bfloat16, _GPU_SIZE), _matmul(torch.float32, _GPU_SIZE), _copy()]
