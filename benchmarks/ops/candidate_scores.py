"""Dot products of gradients with the embeddings of candidates, against a gather and against the whole vocabulary."""

import torch

from benchmarks.registry import Case, Inputs, Provider, ours

K = 25


def gather_einsum(gradient: torch.Tensor, table: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return torch.einsum("pd,pkd->pk", gradient, table[ids])


def projection(gradient: torch.Tensor, table: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return (gradient @ table.t()).gather(1, ids)


def case(
    positions: int,
    width: int,
    dtype: torch.dtype = torch.float32,
    vocabulary: int = 32000,
    **flags: bool,
) -> Case:
    def inputs() -> Inputs:
        return {
            "gradient": torch.randn(positions, width).to(dtype),
            "table": torch.randn(vocabulary, width).to(dtype),
            "ids": torch.randint(vocabulary, (positions, K)),
        }

    return Case(
        op="candidate_scores",
        label=f"{positions} x {width} of {vocabulary}",
        shape={"positions": positions, "width": width, "vocabulary": vocabulary, "k": K},
        dtype=dtype,
        bytes=positions * (K + 1) * width * dtype.itemsize,
        flops=2 * positions * K * width,
        inputs=inputs,
        providers=(
            ours("candidate_scores"),
            Provider("gather + einsum", gather_einsum),
            Provider("full projection", projection),
        ),
        **flags,
    )


SMALL = case(3, 64, vocabulary=1000)

CASES = [
    case(1, 1024),
    case(20, 1024, quick=True),
    case(256, 1024, shown=True),
    case(1, 4096),
    case(20, 4096, shown=True),
    case(20, 4096, torch.bfloat16),
]

GPU_CASES = [
    case(20, 4096, torch.bfloat16, 128256, quick=True, shown=True),
    case(256, 4096, torch.bfloat16, 128256, shown=True),
    case(20, 4096, torch.float32, 128256),
]
