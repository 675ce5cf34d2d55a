"""Exact selection of the k largest: value descending, index ascending; -0.0 equals +0.0, NaN is the largest."""

import torch
import triton
import triton.language as tl

KEY_SHIFTS = {torch.float32: 0, torch.float16: 12, torch.bfloat16: 16}
"""How many of the lowest bits of an fp32 say nothing about the order of values of a dtype, rounded down to even."""


@triton.jit
def order_keys(b_x, SHIFT: tl.constexpr):
    """uint32 keys of 32 - SHIFT bits in the order of the fp32 values b_x; every key is above 0."""
    b_bits = b_x.to(tl.int32, bitcast=True)
    b_bits = tl.where(b_bits == -2147483648, 0, b_bits)
    b_keys = (b_bits ^ ((b_bits >> 31) | -2147483648)).to(tl.uint32, bitcast=True)
    b_keys = tl.where(b_x == b_x, b_keys, 4294967295)
    # After the reversal of negative values: the bits that are dropped are ones there.
    return b_keys >> SHIFT


@triton.jit
def kth_largest(b_keys, k, BITS: tl.constexpr):
    """The k-th largest of keys [N] of BITS bits, k <= N < 65536; the time depends on neither k nor the keys."""
    # Two bits a step: one sum counts the keys that reach each of three thresholds.
    found = tl.full((), 0, tl.uint32)
    for step in tl.static_range(BITS // 2):
        unit = 1 << (BITS - 2 - 2 * step)
        b_reached = (
            (b_keys >= found + unit).to(tl.int64)
            + ((b_keys >= found + 2 * unit).to(tl.int64) << 16)
            + ((b_keys >= found + 3 * unit).to(tl.int64) << 32)
        )
        counts = tl.sum(b_reached, 0)
        found += unit * (
            ((counts & 65535) >= k).to(tl.uint32)
            + (((counts >> 16) & 65535) >= k).to(tl.uint32)
            + ((counts >> 32) >= k).to(tl.uint32)
        )
    return found


@triton.jit
def top_k_places(b_keys, k, BITS: tl.constexpr):
    """The k largest of keys [N], N < 65536: which they are, and a place in 0 .. k-1 for each of them.

    Of equal keys the first are taken, and places ascend with the position.
    """
    cut = kth_largest(b_keys, k, BITS)
    b_above = (b_keys > cut).to(tl.int32)
    b_equal = (b_keys == cut).to(tl.int32)
    wanted = k - tl.sum(b_above, 0)
    # One scan counts both kinds up to each position, that position included.
    b_counts = tl.cumsum(b_above + (b_equal << 16), 0)
    b_above_before = (b_counts & 65535) - b_above
    b_equal_before = (b_counts >> 16) - b_equal
    m_taken = (b_above == 1) | ((b_equal == 1) & (b_equal_before < wanted))
    return m_taken, b_above_before + tl.minimum(b_equal_before, wanted)


@triton.jit
def candidates_of(b_keys, o_indices):
    """int64 that descend, read as unsigned, in the exact order: keys descend, indices ascend."""
    return (b_keys.to(tl.int64) << 32) | (4294967295 - o_indices.to(tl.int64))


@triton.jit
def ranked(p_candidates, k, BLOCK_K: tl.constexpr):
    """The indices [BLOCK_K] of candidates in memory, and the place of each of the first k in the exact order."""
    CHUNK: tl.constexpr = 32
    o_k = tl.arange(0, BLOCK_K)
    b_candidates = tl.load(p_candidates + o_k, mask=o_k < k, other=0)
    b_order = b_candidates.to(tl.uint64, bitcast=True)
    b_ranks = tl.full([BLOCK_K], 0, tl.int32)
    for first in tl.static_range(0, BLOCK_K, CHUNK):
        o_chunk = first + tl.arange(0, CHUNK)
        b_chunk = tl.load(p_candidates + o_chunk, mask=o_chunk < k, other=0).to(tl.uint64, bitcast=True)
        m_before = b_chunk[None, :] > b_order[:, None]  # [BLOCK_K, CHUNK]
        b_ranks += tl.sum(m_before.to(tl.int32), 1)
    return 4294967295 - (b_candidates & 4294967295), b_ranks
