"""`candidate_scores` by Triton: every row of the table that is named is read once, into registers."""

import torch
import triton
import triton.language as tl

from ggro_kernels.checks import check_indices
from ggro_kernels.native import with_unit_column_stride
from ggro_kernels.triton_parts.conversion import widened
from ggro_kernels.triton_parts.tuning import tuned


# One version for any number of candidates: the order of the sums must not depend on it.
@tuned(
    triton.Config({"BLOCK_K": 4, "BLOCK_D": 1024}, num_warps=4),
    triton.Config({"BLOCK_K": 8, "BLOCK_D": 1024}, num_warps=4),
    triton.Config({"BLOCK_K": 4, "BLOCK_D": 1024}, num_warps=8),
    triton.Config({"BLOCK_K": 4, "BLOCK_D": 512}, num_warps=2),
    key=("width",),
)
@triton.jit(do_not_specialize=["candidates", "vocab"])
def _candidate_scores_kernel(
    p_gradient,
    gradient_stride,
    p_table,
    table_stride,
    p_ids,
    p_scores,
    candidates,
    vocab,
    width,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Program = BLOCK_K candidates of one position."""
    blocks = (candidates + BLOCK_K - 1) // BLOCK_K
    position = (tl.program_id(0) // blocks).to(tl.int64)
    o_k = tl.program_id(0) % blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    m_k = o_k < candidates
    b_id = tl.load(p_ids + position * candidates + o_k, mask=m_k, other=0)
    m_table = m_k & (b_id >= 0) & (b_id < vocab)
    b_sum = tl.full([BLOCK_K, BLOCK_D], 0.0, tl.float32)
    for first in range(0, width, BLOCK_D):
        o_d = first + tl.arange(0, BLOCK_D)
        m_d = o_d < width
        b_table = widened(
            tl.load(
                p_table + b_id[:, None] * table_stride + o_d[None, :], mask=m_table[:, None] & m_d[None, :], other=0.0
            )
        )  # [BLOCK_K, BLOCK_D]
        b_gradient = widened(tl.load(p_gradient + position * gradient_stride + o_d, mask=m_d, other=0.0))
        b_sum += b_table * b_gradient[None, :]
    b_score = tl.sum(b_sum, axis=1)
    # An id outside the table cannot raise here.
    b_score = tl.where(m_table, b_score, float("nan"))
    tl.store(p_scores + position * candidates + o_k, b_score, mask=m_k)


def candidate_scores(gradient: torch.Tensor, table: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """scores [P, k] of gradient [P, d], table [V, d] and ids [P, k]; NaN on a GPU for an id outside the table."""
    check_indices("ids", ids, table.shape[0] - 1, "the rows of the table")
    gradient, table, ids = with_unit_column_stride(gradient), with_unit_column_stride(table), ids.contiguous()
    positions, candidates = ids.shape
    scores = torch.empty(positions, candidates, dtype=torch.float32, device=gradient.device)
    if scores.numel():
        _candidate_scores_kernel[lambda meta: (positions * triton.cdiv(candidates, meta["BLOCK_K"]),)](
            gradient, gradient.stride(0), table, table.stride(0), ids, scores, candidates, *table.shape
        )
    return scores
