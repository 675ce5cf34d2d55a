"""`entropy_topk` and its gradient in Triton."""

import torch

from ggro_kernels.native import with_unit_column_stride
from ggro_kernels.triton_parts.vocabulary import empty_reduced, reduce_tiles, select


def entropy_topk(
    logits: torch.Tensor, k: int, temperature: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`(entropy[R], logsumexp[R], values[R, k], indices[R, k])` of logits [R, V]."""
    logits = with_unit_column_stride(logits)
    rows, vocab = logits.shape
    device = logits.device
    entropy, logsumexp = (torch.empty(rows, device=device) for _ in range(2))
    values = torch.empty(rows, k, dtype=logits.dtype, device=device)
    indices = torch.empty(rows, k, dtype=torch.int64, device=device)
    if rows > 0:
        reduced = empty_reduced(rows, vocab, k, device, with_sums=True)
        reduce_tiles(logits, k, reduced, temperature)
        select(logits, reduced, values, indices, statistics=(entropy, logsumexp))
    return entropy, logsumexp, values, indices
