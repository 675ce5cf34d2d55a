"""`candidate_scores` by csrc/cpu/candidate_scores.cpp."""

import torch

from ggro_kernels.dispatch import native
from ggro_kernels.native import DTYPE_CODES, with_unit_column_stride


def candidate_scores(gradient: torch.Tensor, table: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """scores [P, k] of CPU gradient [P, d], table [V, d] and ids [P, k]."""
    gradient, table, ids = with_unit_column_stride(gradient), with_unit_column_stride(table), ids.contiguous()
    positions, candidates = ids.shape
    scores = torch.empty(positions, candidates, dtype=torch.float32)
    native().candidate_scores(
        gradient.data_ptr(),
        DTYPE_CODES[gradient.dtype],
        gradient.stride(0),
        table.data_ptr(),
        DTYPE_CODES[table.dtype],
        table.stride(0),
        ids.data_ptr(),
        positions,
        candidates,
        table.shape[0],
        table.shape[1],
        scores.data_ptr(),
        torch.get_num_threads(),
    )
    return scores
