"""`score_select` by Triton: one launch, a program per row of the batch."""

import torch
import triton
import triton.language as tl

from ggro_kernels.checks import check_unit_interval
from ggro_kernels.native import with_unit_column_stride
from ggro_kernels.triton_parts.conversion import widened
from ggro_kernels.triton_parts.tuning import tuned


# 512 bytes of a state are one load of 16 bytes in each lane of a warp.
@tuned(
    triton.Config({"BLOCK_K": 32, "BLOCK_BYTES": 512, "STAGES": 4}, num_warps=16),
    triton.Config({"BLOCK_K": 32, "BLOCK_BYTES": 1024, "STAGES": 3}, num_warps=16),
    triton.Config({"BLOCK_K": 16, "BLOCK_BYTES": 1024, "STAGES": 4}, num_warps=8),
    key=("width", "K_PADDED"),
)
@triton.jit(do_not_specialize=["candidates"])
def _score_select_kernel(
    p_hidden,
    hidden_row_stride,
    hidden_candidate_stride,
    p_head,
    p_logits,
    p_uniforms,
    p_index,
    p_reward,
    p_score,
    candidates,
    width,
    weight,
    inverse_temperature: tl.float64,
    SAMPLE: tl.constexpr,
    K_PADDED: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Program = one row; rewards and scores of BLOCK_K candidates at a time, then the choice."""
    row = tl.program_id(0).to(tl.int64)
    BLOCK_D: tl.constexpr = BLOCK_BYTES * 8 // p_hidden.dtype.element_ty.primitive_bitwidth
    BLOCKS: tl.constexpr = (K_PADDED + BLOCK_K - 1) // BLOCK_K
    # Kept in registers: what other threads wrote to memory could be read after a barrier only.
    b_scores = tl.full([BLOCKS, BLOCK_K], float("-inf"), tl.float32)
    for block in range((candidates + BLOCK_K - 1) // BLOCK_K):
        o_k = block * BLOCK_K + tl.arange(0, BLOCK_K)
        m_k = o_k < candidates
        b_logit = widened(tl.load(p_logits + row * candidates + o_k, mask=m_k, other=0.0))
        p_block = p_hidden + row * hidden_row_stride + o_k.to(tl.int64)[:, None] * hidden_candidate_stride
        b_sum = tl.full([BLOCK_K, BLOCK_D], 0.0, tl.float32)
        for first in tl.range(0, width, BLOCK_D, num_stages=STAGES):
            o_d = first + tl.arange(0, BLOCK_D)
            m_d = o_d < width
            b_hidden = widened(tl.load(p_block + o_d[None, :], mask=m_k[:, None] & m_d[None, :], other=0.0))
            b_head = widened(tl.load(p_head + o_d, mask=m_d, other=0.0))
            b_sum += b_hidden * b_head[None, :]
        b_reward = tl.sum(b_sum, axis=1)  # [BLOCK_K]
        # Padding stays out of reach whatever its reward, which may be NaN.
        b_score = tl.where(b_logit == float("-inf"), b_logit, b_logit + weight * b_reward)
        tl.store(p_reward + row * candidates + o_k, b_reward, mask=m_k)
        tl.store(p_score + row * candidates + o_k, b_score, mask=m_k)
        b_scores = tl.where(tl.arange(0, BLOCKS)[:, None] == block, b_score[None, :], b_scores)

    if SAMPLE:
        uniform = tl.load(p_uniforms + row).to(tl.float64)
    o_k = tl.arange(0, BLOCKS * BLOCK_K)
    m_k = o_k < candidates
    b_score = tl.reshape(b_scores, [BLOCKS * BLOCK_K])
    # Integers in the order of the scores: -0.0 equals +0.0, NaN is the largest, below -inf is what is not there.
    b_bits = b_score.to(tl.int32, bitcast=True)
    b_bits = tl.where(b_bits == -0x80000000, 0, b_bits)
    b_order = tl.where(b_score == b_score, b_bits ^ ((b_bits >> 31) & 0x7FFFFFFF), 0x7FFFFFFF)
    order, index = tl.max(tl.where(m_k, b_order, -0x80000000), axis=0, return_indices=True)
    if SAMPLE:
        largest = (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
        b_exponent = (b_score.to(tl.float64) - largest.to(tl.float64)) * inverse_temperature
        b_probability = tl.where(m_k, tl.exp(b_exponent), 0.0)
        b_cumulative = tl.cumsum(b_probability, axis=0)
        threshold = uniform * tl.max(b_cumulative, axis=0)
        # Sums in parallel may differ in their last bit where nothing is added between them.
        m_above = (b_cumulative > threshold) & (b_probability > 0.0)
        sampled = tl.min(tl.where(m_above, o_k, candidates - 1), axis=0)
        index = tl.where(tl.abs(largest) < float("inf"), sampled, index)
    tl.store(p_index + row, index.to(tl.int64))


def score_select(
    hidden: torch.Tensor,
    head: torch.Tensor,
    logits: torch.Tensor,
    weight: float,
    temperature: float,
    uniforms: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`(index[B], reward[B, k], score[B, k])`; greedy without uniforms."""
    if uniforms is not None:
        check_unit_interval("uniforms", uniforms)
        uniforms = uniforms.contiguous()
    hidden, head, logits = with_unit_column_stride(hidden), head.contiguous(), logits.contiguous()
    rows, candidates, width = hidden.shape
    index = torch.empty(rows, dtype=torch.int64, device=hidden.device)
    reward = torch.empty(rows, candidates, dtype=torch.float32, device=hidden.device)
    score = torch.empty(rows, candidates, dtype=torch.float32, device=hidden.device)
    if rows > 0:
        _score_select_kernel[(rows,)](
            hidden,
            hidden.stride(0),
            hidden.stride(1),
            head,
            logits,
            uniforms,
            index,
            reward,
            score,
            candidates,
            width,
            weight,
            1.0 / temperature,
            SAMPLE=uniforms is not None,
            K_PADDED=triton.next_power_of_2(candidates),
        )
    return index, reward, score
