"""`project_topk` in Triton."""

import torch

from ggro_kernels.triton_parts.projection import project


def project_topk(
    gradient: torch.Tensor,
    table: torch.Tensor,
    k: int,
    bias: torch.Tensor | None,
    forbidden: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`(scores[P, k], indices[P, k])` of gradient [P, d], table [V, d], bias [V] and forbidden [V]."""
    positions = gradient.shape[0]
    scores = torch.empty(positions, k, device=gradient.device)
    indices = torch.empty(positions, k, dtype=torch.int64, device=gradient.device)
    if positions > 0:
        project(gradient, table, scores, indices, bias=bias, forbidden=forbidden)
    return scores, indices
