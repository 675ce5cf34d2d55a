"""`candidate_scores` by csrc/cpu/candidate_scores.cpp and csrc/cuda/candidate_scores.cu."""

import torch

from ggro_kernels.native import DTYPE_CODES, run, with_unit_column_stride


def candidate_scores(gradient: torch.Tensor, table: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """scores [P, k] of gradient [P, d], table [V, d] and ids [P, k]; NaN on a GPU for an id outside the table."""
    gradient, table, ids = with_unit_column_stride(gradient), with_unit_column_stride(table), ids.contiguous()
    positions, candidates = ids.shape
    scores = torch.empty(positions, candidates, dtype=torch.float32, device=gradient.device)
    run(
        "candidate_scores",
        gradient.device,
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
    )
    return scores
