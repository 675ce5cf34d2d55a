"""What the machine can do, measured in the same run as the kernels: read bandwidth and matrix products."""

import torch

from benchmarks.registry import Case, Inputs, Provider

# 256 MiB of fp32, far beyond any cache.
_READ_ELEMENTS = 1 << 26
_SIZE = 2048

READ = "read"
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


def _matmul(dtype: torch.dtype) -> Case:
    def inputs() -> Inputs:
        return {"input": torch.randn(_SIZE, _SIZE).to(dtype), "mat2": torch.randn(_SIZE, _SIZE).to(dtype)}

    return Case(
        op=MATMUL,
        label=f"{_SIZE} x {_SIZE}",
        shape={"size": _SIZE},
        dtype=dtype,
        bytes=3 * _SIZE**2 * dtype.itemsize,
        flops=2 * _SIZE**3,
        inputs=inputs,
        providers=(Provider("torch", torch.mm),),
    )


CASES = [_read(), _matmul(torch.float32), _matmul(torch.bfloat16)]
