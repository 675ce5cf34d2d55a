"""Entropy, logsumexp and top k of logits, against what decoders write."""

import torch

from benchmarks.registry import Case, Inputs, Provider, compiled, ours

K = 25


def eager(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, ...]:
    """Softmax, log, multiply, sum, logsumexp, topk."""
    probabilities = logits.softmax(-1, dtype=torch.float32)
    entropy = -(probabilities * probabilities.clamp_min(1e-38).log()).sum(-1)
    return entropy, logits.logsumexp(-1), *logits.topk(k)


def case(rows: int, vocabulary: int, dtype: torch.dtype, **flags: bool) -> Case:
    def inputs() -> Inputs:
        return {"logits": (3 * torch.randn(rows, vocabulary)).to(dtype), "k": K}

    logits = rows * vocabulary
    return Case(
        op="entropy_topk",
        label=f"{rows} x {vocabulary}",
        shape={"rows": rows, "vocabulary": vocabulary, "k": K},
        dtype=dtype,
        bytes=logits * dtype.itemsize,
        # Maximum, shift, exponential (as one), two sums with one product.
        flops=6 * logits,
        inputs=inputs,
        providers=(ours("entropy_topk"), Provider("eager", eager), compiled(eager)),
        **flags,
    )


SMALL = case(3, 1000, torch.float32)

CASES = [
    case(1, 32000, torch.float32, shown=True),
    case(16, 32000, torch.float32),
    case(1, 128256, torch.float32, shown=True),
    case(4, 128256, torch.float32, quick=True),
    case(16, 128256, torch.float32, shown=True),
    case(64, 128256, torch.float32),
    case(1, 128256, torch.bfloat16, shown=True),
    case(16, 128256, torch.bfloat16),
    case(64, 128256, torch.bfloat16, shown=True),
    case(16, 151936, torch.bfloat16),
]
