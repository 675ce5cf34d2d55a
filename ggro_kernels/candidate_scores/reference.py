"""The specification of `candidate_scores` in eager torch: any device, any float dtype."""

import torch


def score_dtype(gradient: torch.Tensor, table: torch.Tensor) -> torch.dtype:
    """The dtype of accumulation and result."""
    return torch.float64 if torch.float64 in (gradient.dtype, table.dtype) else torch.float32


def candidate_scores(gradient: torch.Tensor, table: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """scores [P, k] of gradient [P, d], table [V, d] and ids [P, k]."""
    accumulate = score_dtype(gradient, table)
    if ids.device.type == "cpu":
        bad = ((ids < 0) | (ids >= table.shape[0])).nonzero()
        if len(bad):
            raise out_of_range(ids, table, *bad[0].tolist())
    # [P, k, d]; sum adds pairwise, which a batched matrix-vector product does not.
    return (table[ids].to(accumulate) * gradient.to(accumulate).unsqueeze(1)).sum(2)


def out_of_range(ids: torch.Tensor, table: torch.Tensor, position: int, candidate: int) -> IndexError:
    """The error for an id that names no row of the table."""
    return IndexError(
        f"ids[{position}, {candidate}] must be in 0 .. {table.shape[0] - 1}, the rows of the table, "
        f"got {ids[position, candidate].item()}"
    )
