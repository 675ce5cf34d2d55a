"""Entropy, logsumexp and top k from hidden states, against computing the logits first."""

import torch

from benchmarks.ops.entropy_topk import eager as eager_entropy_topk
from benchmarks.registry import Case, Inputs, Provider, compiled, ours
from ggro_kernels import entropy_topk

K = 25


def eager(hidden: torch.Tensor, weight: torch.Tensor, k: int) -> tuple[torch.Tensor, ...]:
    return eager_entropy_topk(torch.nn.functional.linear(hidden, weight), k)


def linear_then_entropy_topk(hidden: torch.Tensor, weight: torch.Tensor, k: int) -> tuple[torch.Tensor, ...]:
    return entropy_topk(torch.nn.functional.linear(hidden, weight), k)


def case(rows: int, width: int, vocabulary: int, dtype: torch.dtype, **flags: bool) -> Case:
    def inputs() -> Inputs:
        return {
            # Logits of a standard deviation of 3.
            "hidden": (3 * width**-0.5 * torch.randn(rows, width)).to(dtype),
            "weight": torch.randn(vocabulary, width, dtype=dtype),
            "k": K,
        }

    return Case(
        op="lm_head_entropy_topk",
        label=f"{rows} x {width} x {vocabulary}",
        shape={"rows": rows, "width": width, "vocabulary": vocabulary, "k": K},
        dtype=dtype,
        bytes=(vocabulary + rows) * width * dtype.itemsize,
        flops=rows * vocabulary * (2 * width + 6),
        inputs=inputs,
        providers=(
            ours("lm_head_entropy_topk"),
            Provider("eager", eager),
            compiled(eager),
            Provider("linear + entropy_topk", linear_then_entropy_topk),
        ),
        **flags,
    )


SMALL = case(3, 64, 1000, torch.float32)

CASES = [
    case(1, 512, 32000, torch.float32, quick=True),
    case(1, 1024, 128256, torch.float32, shown=True),
    case(16, 1024, 128256, torch.float32, shown=True, memory=True),
    case(64, 512, 32000, torch.float32),
    case(1, 2048, 128256, torch.bfloat16, shown=True),
    case(16, 2048, 128256, torch.bfloat16, memory=True),
]

GPU_CASES = [
    case(1, 4096, 128256, torch.bfloat16, shown=True),
    case(16, 4096, 128256, torch.bfloat16, quick=True, shown=True),
    case(64, 4096, 128256, torch.bfloat16, shown=True),
]
