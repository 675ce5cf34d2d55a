"""`entropy_topk` and its gradient by csrc/*/entropy_topk and entropy_topk_backward."""

import torch

from ggro_kernels.native import DTYPE_CODES, run, with_unit_column_stride


def entropy_topk(
    logits: torch.Tensor, k: int, temperature: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`(entropy[R], logsumexp[R], values[R, k], indices[R, k])` of logits [R, V]."""
    logits = with_unit_column_stride(logits)
    rows, vocab = logits.shape
    entropy = torch.empty(rows, dtype=torch.float32, device=logits.device)
    logsumexp = torch.empty(rows, dtype=torch.float32, device=logits.device)
    values = torch.empty(rows, k, dtype=logits.dtype, device=logits.device)
    indices = torch.empty(rows, k, dtype=torch.int64, device=logits.device)
    run(
        "entropy_topk",
        logits.device,
        logits.data_ptr(),
        DTYPE_CODES[logits.dtype],
        rows,
        vocab,
        logits.stride(0),
        k,
        temperature,
        entropy.data_ptr(),
        logsumexp.data_ptr(),
        values.data_ptr(),
        indices.data_ptr(),
    )
    return entropy, logsumexp, values, indices


def entropy_topk_backward(
    entropy_gradient: torch.Tensor,
    logsumexp_gradient: torch.Tensor,
    values_gradient: torch.Tensor,
    logits: torch.Tensor,
    entropy: torch.Tensor,
    logsumexp: torch.Tensor,
    indices: torch.Tensor,
    temperature: float,
) -> torch.Tensor:
    """Gradient [R, V] of logits, in their dtype."""
    entropy_gradient, logsumexp_gradient = entropy_gradient.contiguous(), logsumexp_gradient.contiguous()
    values_gradient, logits = values_gradient.contiguous(), with_unit_column_stride(logits)
    rows, vocab = logits.shape
    gradient = torch.empty(rows, vocab, dtype=logits.dtype, device=logits.device)
    run(
        "entropy_topk_backward",
        logits.device,
        entropy_gradient.data_ptr(),
        logsumexp_gradient.data_ptr(),
        values_gradient.data_ptr(),
        logits.data_ptr(),
        DTYPE_CODES[logits.dtype],
        rows,
        vocab,
        logits.stride(0),
        indices.shape[1],
        entropy.data_ptr(),
        logsumexp.data_ptr(),
        indices.data_ptr(),
        temperature,
        gradient.data_ptr(),
    )
    return gradient
