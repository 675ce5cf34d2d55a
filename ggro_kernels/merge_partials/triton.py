"""`merge_partials` in Triton: one launch, whatever the number of shards and k."""

import torch
import triton
import triton.language as tl

from ggro_kernels.triton_parts.conversion import widened
from ggro_kernels.triton_parts.selection import order_keys
from ggro_kernels.triton_parts.tuning import tuned


@triton.jit
def _store_statistics(
    p_entropies, p_logsumexps, p_offsets, p_entropy, p_logsumexp, row, rows, shards, BLOCK_S: tl.constexpr
):
    # The shards in the order of their offsets, so that the order in which they are given changes no bit of a sum.
    o_shard = tl.arange(0, BLOCK_S)
    m_shard = o_shard < shards
    b_offsets = tl.load(p_offsets + o_shard, mask=m_shard, other=9223372036854775807)
    # By their offsets and, beyond the last shard, by their places: all different.
    m_before = (b_offsets[None, :] < b_offsets[:, None]) | (
        (b_offsets[None, :] == b_offsets[:, None]) & (o_shard[None, :] < o_shard[:, None])
    )
    b_ranks = tl.sum(m_before.to(tl.int32), 1)
    b_order = tl.sum(tl.where(b_ranks[:, None] == o_shard[None, :], o_shard[:, None], 0), 0).to(tl.int64)

    b_parts = tl.load(p_logsumexps + b_order * rows + row, mask=m_shard, other=float("-inf")).to(tl.float64)
    b_entropies = tl.load(p_entropies + b_order * rows + row, mask=m_shard, other=0.0).to(tl.float64)
    has_nan = tl.max((b_parts != b_parts).to(tl.int32), 0) > 0
    largest = tl.max(b_parts, 0)
    infinite = tl.abs(largest) == float("inf")
    # inf - inf would be NaN where the result is known.
    shift = tl.where(infinite, 0.0, largest)
    logsumexp = tl.where(infinite, largest, shift + tl.log(tl.sum(tl.exp(b_parts - shift), 0)))
    # The entropy of a shard without a finite logit is NaN.
    m_absent = b_parts == float("-inf")
    b_known = tl.where(m_absent, 0.0, b_parts)
    b_terms = tl.exp(b_known - logsumexp) * (b_entropies + (logsumexp - b_known))
    entropy = tl.sum(tl.where(m_absent, 0.0, b_terms), 0)
    tl.store(p_logsumexp + row, tl.where(has_nan, float("nan"), logsumexp).to(tl.float32))
    tl.store(p_entropy + row, tl.where(has_nan | infinite, float("nan"), entropy).to(tl.float32))


@triton.jit
def _load_candidates(p_values, p_indices, p_offsets, o_candidate, row, rows, candidates, k):
    """Candidate j of shard s is number s * k + j: its value as it is, its order key and its index in the whole row."""
    m_candidate = o_candidate < candidates
    o_shard = o_candidate // k
    o_place = (o_shard.to(tl.int64) * rows + row) * k + o_candidate % k
    b_raw = tl.load(p_values + o_place, mask=m_candidate, other=0.0)
    b_keys = tl.where(m_candidate, order_keys(widened(b_raw), 0), 0)
    b_offsets = tl.load(p_offsets + o_shard, mask=m_candidate, other=0)
    return b_raw, b_keys, tl.load(p_indices + o_place, mask=m_candidate, other=0) + b_offsets


@tuned(triton.Config({}, num_warps=8), triton.Config({}, num_warps=4), key=("BLOCK_C", "BLOCK_S"))
@triton.jit
def _merge(
    p_entropies,
    p_logsumexps,
    p_values,
    p_indices,
    p_offsets,
    p_entropy,
    p_logsumexp,
    p_merged_values,
    p_merged_indices,
    rows,
    shards,
    candidates,
    k,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
    CHUNK: tl.constexpr,
):
    blocks = tl.cdiv(candidates, BLOCK_C)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    o_chunk = tl.arange(0, CHUNK)
    o_candidate = block * BLOCK_C + tl.arange(0, BLOCK_C)
    b_raw, b_keys, b_indices = _load_candidates(p_values, p_indices, p_offsets, o_candidate, row, rows, candidates, k)
    b_ranks = tl.zeros([BLOCK_C], tl.int32)
    for first in range(0, candidates, CHUNK):
        _, b_other_keys, b_other_indices = _load_candidates(
            p_values, p_indices, p_offsets, first + o_chunk, row, rows, candidates, k
        )
        m_before = (b_other_keys[None, :] > b_keys[:, None]) | (
            (b_other_keys[None, :] == b_keys[:, None]) & (b_other_indices[None, :] < b_indices[:, None])
        )
        b_ranks += tl.sum(m_before.to(tl.int32), 1)
    m_best = (o_candidate < candidates) & (b_ranks < k)
    tl.store(p_merged_values + row * k + b_ranks, b_raw, mask=m_best)
    tl.store(p_merged_indices + row * k + b_ranks, b_indices, mask=m_best)
    if block == 0:
        _store_statistics(p_entropies, p_logsumexps, p_offsets, p_entropy, p_logsumexp, row, rows, shards, BLOCK_S)


def merge_partials(
    entropy: torch.Tensor, logsumexp: torch.Tensor, values: torch.Tensor, indices: torch.Tensor, offsets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`(entropy[R], logsumexp[R], values[R, k], indices[R, k])` of S shards.

    Every candidate counts those before it, which needs neither a selection nor lists in order.
    """
    entropy, logsumexp, offsets = entropy.contiguous(), logsumexp.contiguous(), offsets.contiguous()
    values, indices = values.contiguous(), indices.contiguous()
    shards, rows, k = values.shape
    device = values.device
    merged_entropy, merged_logsumexp = (torch.empty(rows, device=device) for _ in range(2))
    merged_values = torch.empty(rows, k, dtype=values.dtype, device=device)
    merged_indices = torch.empty(rows, k, dtype=torch.int64, device=device)
    if rows > 0:
        candidates = shards * k
        block = min(256, max(32, triton.next_power_of_2(candidates)))
        _merge[(rows * triton.cdiv(candidates, block),)](
            entropy,
            logsumexp,
            values,
            indices,
            offsets,
            merged_entropy,
            merged_logsumexp,
            merged_values,
            merged_indices,
            rows,
            shards,
            candidates,
            k,
            BLOCK_S=triton.next_power_of_2(shards),
            BLOCK_C=block,
            CHUNK=32,
        )
    return merged_entropy, merged_logsumexp, merged_values, merged_indices
