"""`project_topk` by csrc/cpu/project_topk.cpp and csrc/cuda/projection.cu."""

import torch

from ggro_kernels.native import DTYPE_CODES, address, run, with_unit_column_stride


def project_topk(
    gradient: torch.Tensor,
    table: torch.Tensor,
    k: int,
    bias: torch.Tensor | None,
    forbidden: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`(scores[P, k], indices[P, k])` of gradient [P, d], table [V, d], bias [V] and forbidden [V]."""
    gradient, table = with_unit_column_stride(gradient), with_unit_column_stride(table)
    bias = None if bias is None else bias.to(torch.float32).contiguous()
    forbidden = None if forbidden is None else forbidden.contiguous()
    positions, width = gradient.shape
    scores = torch.empty(positions, k, dtype=torch.float32, device=gradient.device)
    indices = torch.empty(positions, k, dtype=torch.int64, device=gradient.device)
    run(
        "project_topk",
        gradient.device,
        gradient.data_ptr(),
        DTYPE_CODES[gradient.dtype],
        gradient.stride(0),
        table.data_ptr(),
        DTYPE_CODES[table.dtype],
        table.stride(0),
        address(bias),
        address(forbidden),
        positions,
        table.shape[0],
        width,
        k,
        scores.data_ptr(),
        indices.data_ptr(),
    )
    return scores, indices
