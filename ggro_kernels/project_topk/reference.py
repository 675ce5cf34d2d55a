"""The specification of `project_topk` in eager torch: any device, any float dtype."""

import torch

from ggro_kernels.precision import accumulation_dtype
from ggro_kernels.selection import top_k_indices


def project_topk(
    gradient: torch.Tensor,
    table: torch.Tensor,
    k: int,
    bias: torch.Tensor | None,
    forbidden: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`(scores[P, k], indices[P, k])` of gradient [P, d], table [V, d], bias [V] and forbidden [V]."""
    accumulate = accumulation_dtype(gradient, table)
    scores = gradient.to(accumulate) @ table.to(accumulate).t()  # [P, V]
    if bias is not None:
        scores = scores + bias.to(accumulate)
    if forbidden is not None:
        scores = scores.masked_fill(forbidden, -torch.inf)
    indices = top_k_indices(scores, k)
    return scores.gather(1, indices), indices
