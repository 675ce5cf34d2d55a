"""Products of a few rows with weights that come from memory, against the BLAS."""

from collections.abc import Callable

import torch
from torch.nn.functional import linear

from benchmarks.registry import Case, Inputs, Provider, ours

# Weights of so many bytes take turns, as the layers of a model do: one matrix alone might stay in a cache.
_BYTES = 1 << 27


def through_layers(product: Callable[..., torch.Tensor]) -> Callable[..., list[torch.Tensor]]:
    """The product with each of the weights."""

    def run(x: torch.Tensor, weights: list[torch.Tensor]) -> list[torch.Tensor]:
        return [product(x, weight) for weight in weights]

    return run


def case(
    rows: int, outputs: int, width: int, dtype: torch.dtype = torch.float32, total: int = _BYTES, **flags: bool
) -> Case:
    layers = max(1, total // (outputs * width * dtype.itemsize))

    def inputs() -> Inputs:
        return {
            "x": torch.randn(rows, width).to(dtype),
            "weights": [torch.randn(outputs, width).to(dtype) for _ in range(layers)],
        }

    return Case(
        op="batch_invariant_linear",
        label=f"{rows} x {width} x {outputs}, {layers} layers",
        shape={"rows": rows, "width": width, "outputs": outputs, "layers": layers},
        dtype=dtype,
        bytes=layers * (outputs * width + rows * (outputs + width)) * dtype.itemsize,
        flops=2 * layers * rows * outputs * width,
        inputs=inputs,
        providers=(ours("batch_invariant_linear", through_layers), Provider("linear", through_layers(linear))),
        **flags,
    )


SMALL = case(3, 20, 30, total=0)

CASES = [
    case(1, 1376, 512, quick=True, shown=True),
    case(2, 1376, 512),
    case(4, 1376, 512, shown=True),
    case(8, 1376, 512),
    case(16, 1376, 512),
    case(32, 1376, 512),
    *(case(rows, 512, 1376) for rows in (1, 2, 4, 8, 16, 32)),
    *(case(rows, 32000, 512, shown=rows == 1) for rows in (1, 2, 4, 8, 16, 32)),
    *(case(rows, 4096, 4096, shown=rows == 16) for rows in (1, 2, 4, 8, 16, 32)),
    case(1, 4096, 4096, torch.bfloat16),
    case(4, 4096, 4096, torch.bfloat16),
]

# There are CPU kernels only.
GPU_CASES: list[Case] = []
