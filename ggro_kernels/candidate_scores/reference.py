"""The specification of `candidate_scores`, and its gradients, in eager torch: any device, any float dtype."""

import torch

from ggro_kernels.checks import check_indices
from ggro_kernels.precision import accumulation_dtype


def candidate_scores(gradient: torch.Tensor, table: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """scores [P, k] of gradient [P, d], table [V, d] and ids [P, k]."""
    accumulate = accumulation_dtype(gradient, table)
    check_indices("ids", ids, table.shape[0] - 1, "the rows of the table")
    # [P, k, d]; sum adds pairwise, which a batched matrix-vector product does not.
    return (table[ids].to(accumulate) * gradient.to(accumulate).unsqueeze(1)).sum(2)


def gradient_gradient(
    scores_gradient: torch.Tensor, gradient: torch.Tensor, table: torch.Tensor, ids: torch.Tensor
) -> torch.Tensor:
    """What reaches `gradient` [P, d], in its dtype."""
    rows = table[ids].to(scores_gradient.dtype)  # [P, k, d]
    return (scores_gradient.unsqueeze(1) @ rows).squeeze(1).to(gradient.dtype)


def table_gradient(
    scores_gradient: torch.Tensor, gradient: torch.Tensor, table: torch.Tensor, ids: torch.Tensor
) -> torch.Tensor:
    """What reaches `table` [V, d], dense, in its dtype; candidates of the same row are summed in the order of ids."""
    rows, which = ids.unique(return_inverse=True)
    terms = scores_gradient.unsqueeze(2) * gradient.to(scores_gradient.dtype).unsqueeze(1)  # [P, k, d]
    sums = terms.new_zeros(len(rows), table.shape[1]).index_add_(0, which.flatten(), terms.flatten(0, 1))
    dense = table.new_zeros(table.shape)
    dense[rows] = sums.to(table.dtype)
    return dense
