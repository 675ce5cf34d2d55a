"""The specification of `candidate_scores` in eager torch: any device, any float dtype."""

import torch

from ggro_kernels.checks import check_indices


def score_dtype(gradient: torch.Tensor, table: torch.Tensor) -> torch.dtype:
    """The dtype of accumulation and result."""
    return torch.float64 if torch.float64 in (gradient.dtype, table.dtype) else torch.float32


def candidate_scores(gradient: torch.Tensor, table: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """scores [P, k] of gradient [P, d], table [V, d] and ids [P, k]."""
    accumulate = score_dtype(gradient, table)
    check_indices("ids", ids, table.shape[0] - 1, "the rows of the table")
    # [P, k, d]; sum adds pairwise, which a batched matrix-vector product does not.
    return (table[ids].to(accumulate) * gradient.to(accumulate).unsqueeze(1)).sum(2)
