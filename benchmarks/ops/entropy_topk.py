"""Entropy, logsumexp and top k of logits, against what decoders write."""

from dataclasses import replace
from itertools import product

import torch

from benchmarks.registry import Case, Inputs, Provider, compiled, importable, ours

K = 25


def eager(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, ...]:
    """Softmax, log, multiply, sum, logsumexp, topk."""
    probabilities = logits.softmax(-1, dtype=torch.float32)
    entropy = -(probabilities * probabilities.clamp_min(1e-38).log()).sum(-1)
    return entropy, logits.logsumexp(-1), *logits.topk(k)


def flashinfer_softmax_topk(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, ...]:
    """Its softmax and its top k, which are what it has; the entropy by torch, no logsumexp."""
    import flashinfer

    probabilities = flashinfer.sampling.softmax(logits.float())
    return torch.special.entr(probabilities).sum(-1), *flashinfer.top_k(logits, k, sorted=True)


def case(rows: int, vocabulary: int, dtype: torch.dtype, k: int = K, **flags: bool) -> Case:
    def inputs() -> Inputs:
        return {"logits": (3 * torch.randn(rows, vocabulary)).to(dtype), "k": k}

    logits = rows * vocabulary
    return Case(
        op="entropy_topk",
        label=f"{rows} x {vocabulary}" + (f", k={k}" if k != K else ""),
        shape={"rows": rows, "vocabulary": vocabulary, "k": k},
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


def gpu_case(vocabulary: int, dtype: torch.dtype, k: int, rows: int) -> Case:
    common = vocabulary == 128256 and k == K and (rows, dtype) != (16, torch.float32)
    made = case(rows, vocabulary, dtype, k, quick=common and (rows, dtype) == (64, torch.bfloat16), shown=common)
    library = Provider("flashinfer softmax + top_k", flashinfer_softmax_topk, available=importable("flashinfer"))
    # Compiling takes seconds, and what it gains does not depend on k. Liger's softmax ends at 65536 columns.
    torchs = [provider for provider in made.providers if k == K or not provider.compiled]
    return replace(made, providers=(*torchs, library))


GPU_CASES = [
    gpu_case(*arguments)
    for arguments in product((128256, 151936), (torch.bfloat16, torch.float32), (K, 64), (1, 16, 64))
]
