"""The best tokens of a whole vocabulary by a gradient, against the product with the table, then topk."""

import torch

from benchmarks.registry import Case, Inputs, Provider, ours

K = 25


def matmul_topk(gradient: torch.Tensor, table: torch.Tensor, k: int) -> tuple[torch.Tensor, ...]:
    return (gradient @ table.t()).topk(k)


def case(positions: int, width: int, vocabulary: int, dtype: torch.dtype, **flags: bool) -> Case:
    def inputs() -> Inputs:
        return {
            "gradient": torch.randn(positions, width).to(dtype),
            "table": torch.randn(vocabulary, width, dtype=dtype),
            "k": K,
        }

    return Case(
        op="project_topk",
        label=f"{positions} x {width} x {vocabulary}",
        shape={"positions": positions, "width": width, "vocabulary": vocabulary, "k": K},
        dtype=dtype,
        bytes=(vocabulary + positions) * width * dtype.itemsize,
        flops=2 * positions * width * vocabulary,
        inputs=inputs,
        providers=(ours("project_topk"), Provider("mm + topk", matmul_topk)),
        **flags,
    )


SMALL = case(3, 64, 1000, torch.float32)

CASES = [
    case(1, 1024, 151936, torch.float32, shown=True),
    case(1, 4096, 32000, torch.float32),
    case(20, 512, 128256, torch.float32, quick=True, memory=True),
    case(20, 4096, 32000, torch.float32, shown=True),
    case(64, 1024, 128256, torch.float32),
    case(256, 512, 151936, torch.float32, shown=True, memory=True),
    case(256, 4096, 32000, torch.float32),
    case(1, 2048, 128256, torch.bfloat16),
    case(20, 2048, 128256, torch.bfloat16, shown=True),
    case(64, 4096, 32000, torch.bfloat16),
    case(256, 1024, 128256, torch.bfloat16, memory=True),
    case(256, 4096, 32000, torch.bfloat16),
]

GPU_CASES = [
    case(20, 4096, 128256, torch.bfloat16, quick=True, shown=True),
    case(256, 4096, 128256, torch.bfloat16, shown=True),
]
