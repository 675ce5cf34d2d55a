"""What `prefix_attention` runs on a GPU: attention to one split of the prefix, and the merge of the splits.

A row is one token of one query head. The rows of a key head, token by token, are packed into tiles, and a program takes
a tile of them through one split of the prefix, as flash-decoding does. A split begins where its index says and every
sum over keys at the first token of prefix or branch, so that the bits of a row depend on nothing but what it sees.
"""

import triton
import triton.language as tl

from ggro_kernels.triton_parts.conversion import rounded
from ggro_kernels.triton_parts.softcap import tanh

# A token whose branch has at most this many tokens so far attends to them while its row is merged, others in tiles.
SHORT_BRANCH = tl.constexpr(16)
SLOTS_AT_ONCE = tl.constexpr(16)
EXACT_COLUMNS = tl.constexpr(16)
NO_SEGMENT = tl.constexpr(2**31 - 1)


# Splits of 256 tokens give a short prefix enough programs; of 1024, from token 4096 on, they keep partial results few.
SHORT_SPLIT = tl.constexpr(256)
LONG_SPLIT = tl.constexpr(1024)
SHORT_SPLITS_MORE = tl.constexpr(12)


@triton.jit
def _split_of(token):
    return tl.minimum(token // SHORT_SPLIT, token // LONG_SPLIT + SHORT_SPLITS_MORE)


@triton.jit
def _split_start(split):
    return tl.maximum(split * SHORT_SPLIT, (split - SHORT_SPLITS_MORE) * LONG_SPLIT)


def split_count(prefix_tokens: int) -> int:
    """Into how many splits a prefix is cut."""
    last = prefix_tokens - 1
    return min(last // SHORT_SPLIT.value, last // LONG_SPLIT.value + SHORT_SPLITS_MORE.value) + 1


@triton.jit
def _clamp(given, last):
    # A length or a start that is out of range cannot raise here; it must not read beyond the tensors.
    return tl.minimum(tl.maximum(given, 0), last).to(tl.int32)


@triton.jit
def _attend(
    p_query,  # [BLOCK_M]
    b_query,  # [BLOCK_M, BLOCK_D], the first columns of the queries
    m_row,  # [BLOCK_M]
    b_segment,  # [BLOCK_M], the token that a row's segment begins with, or NO_SEGMENT
    b_first,  # [BLOCK_M], the first key that a row sees, counted from there
    b_end,  # [BLOCK_M]
    p_key,
    key_stride,
    p_value,
    value_stride,
    column,
    factor,
    cap,
    CAPPED: tl.constexpr,
    KEY_WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    OPERAND: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Attention of a tile of rows, each to its own part of its own segment: maxima, sums and weighted values.

    Zero times an infinite value is NaN: without EXACT a row may get it from values that only other rows see. With it,
    which is slow, no row does, and what is finite has the same bits.
    """
    o_d = tl.arange(0, BLOCK_D)
    o_v = column + tl.arange(0, BLOCK_V)
    m_v = o_v < VALUE_WIDTH
    b_max = tl.full([BLOCK_M], -float("inf"), tl.float32)
    b_sum = tl.full([BLOCK_M], 0.0, tl.float32)
    b_out = tl.full([BLOCK_M, BLOCK_V], 0.0, tl.float32)
    segment = tl.min(b_segment, 0)
    while segment < NO_SEGMENT:
        m_in = b_segment == segment
        begin = tl.min(tl.where(m_in, b_first, NO_SEGMENT), 0) // BLOCK_N * BLOCK_N
        end = tl.max(tl.where(m_in, b_end, 0), 0)
        for tile in range(begin, end, BLOCK_N):
            o_n = tile + tl.arange(0, BLOCK_N)
            m_n = o_n < end
            o_token = (segment + o_n).to(tl.int64)
            p_tile = p_key + o_token[:, None] * key_stride
            b_key = tl.load(p_tile + o_d[None, :], mask=m_n[:, None] & (o_d < KEY_WIDTH)[None, :], other=0.0)
            b_product = tl.full([BLOCK_M, BLOCK_N], 0.0, tl.float32)
            b_product = tl.dot(b_query, tl.trans(b_key.to(OPERAND)), b_product, input_precision="ieee")
            for d in range(BLOCK_D, KEY_WIDTH, BLOCK_D):
                m_d = d + o_d < KEY_WIDTH
                b_more = tl.load(p_query[:, None] + (d + o_d)[None, :], mask=m_row[:, None] & m_d[None, :], other=0.0)
                b_key = tl.load(p_tile + (d + o_d)[None, :], mask=m_n[:, None] & m_d[None, :], other=0.0)
                b_product = tl.dot(b_more.to(OPERAND), tl.trans(b_key.to(OPERAND)), b_product, input_precision="ieee")

            b_score = b_product * factor
            if CAPPED:
                b_score = tanh(b_score) * cap
            m_seen = m_in[:, None] & (o_n[None, :] >= b_first[:, None]) & (o_n[None, :] < b_end[:, None])
            b_score = tl.where(m_seen, b_score, -float("inf"))  # [BLOCK_M, BLOCK_N]
            b_new_max = tl.maximum(b_max, tl.max(b_score, 1))
            # Scores that are all -inf have no finite difference from their maximum.
            b_shift = tl.where(b_new_max == -float("inf"), 0.0, b_new_max)
            b_weight = tl.exp2(b_score - b_shift[:, None])
            b_rescale = tl.exp2(b_max - b_shift)
            b_max = b_new_max
            b_sum = b_sum * b_rescale + tl.sum(b_weight, 1)
            b_out = b_out * b_rescale[:, None]

            p_tile = p_value + o_token[:, None] * value_stride
            b_value = tl.load(p_tile + o_v[None, :], mask=m_n[:, None] & m_v[None, :], other=0.0)
            if EXACT:
                # Which columns get what infinity or NaN, counted: weights of 1, 2^7 and 2^14 for at most 2^7 keys.
                b_wide = b_value.to(tl.float32)
                b_code = tl.where(b_wide == float("inf"), 1.0, tl.where(b_wide == -float("inf"), 128.0, 16384.0))
                m_finite = tl.abs(b_wide) < float("inf")
                b_code = tl.where(m_finite, 0.0, b_code).to(b_value.dtype)
                b_sees = tl.where(m_seen, tl.where(b_weight > 0.0, 1.0, 16384.0), 0.0).to(b_value.dtype)
                b_found = tl.full([BLOCK_M, BLOCK_V], 0.0, tl.float32)
                b_found = tl.dot(b_sees.to(OPERAND), b_code.to(OPERAND), b_found, input_precision="ieee")
                b_found = tl.minimum(b_found, 16384.0).to(tl.int32)
                b_value = tl.where(m_finite, b_value, 0.0)
                b_other = tl.where(b_found < 128, float("inf"), -float("inf"))
                m_nan = (b_found >= 128) & (b_found % 128 > 0) | (b_found == 16384)
                b_out = tl.where(b_found > 0, tl.where(m_nan, float("nan"), b_out + b_other), b_out)
            b_weight = rounded(b_weight, b_value.dtype)
            b_out = tl.dot(b_weight.to(OPERAND), b_value.to(OPERAND), b_out, input_precision="ieee")
        segment = tl.min(tl.where(b_segment > segment, b_segment, NO_SEGMENT), 0)
    return b_max, b_sum, b_out


@triton.jit(do_not_specialize=["tokens", "prefix_tokens", "branch_tokens", "window", "slots"])
def attend_kernel(
    p_query,
    query_batch,
    query_head,
    query_token,
    p_branch_key,
    branch_key_batch,
    branch_key_head,
    branch_key_token,
    p_branch_value,
    branch_value_batch,
    branch_value_head,
    branch_value_token,
    p_prefix_key,
    prefix_key_batch,
    prefix_key_head,
    prefix_key_token,
    p_prefix_value,
    prefix_value_batch,
    prefix_value_head,
    prefix_value_token,
    p_starts,
    p_ends,
    p_lengths,
    p_maxima,
    p_sums,
    p_partials,
    tokens,
    prefix_tokens,
    branch_tokens,
    window,
    slots,
    factor,
    cap,
    KEY_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    KEY_WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    CAPPED: tl.constexpr,
    WINDOWED: tl.constexpr,
    BRANCHES: tl.constexpr,
    OPERAND: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Program = BLOCK_M rows of a key head, BLOCK_V columns, one slot: 0 for branches, 1 + a split of the prefix."""
    rows = tokens * GROUP
    row_tiles = (rows + BLOCK_M - 1) // BLOCK_M
    value_tiles: tl.constexpr = (VALUE_WIDTH + BLOCK_V - 1) // BLOCK_V
    first_slot: tl.constexpr = 0 if BRANCHES else 1
    # Programs that read the same keys are neighbours.
    i = tl.program_id(0)
    o_row = i % row_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    i //= row_tiles
    column = i % value_tiles * BLOCK_V
    i //= value_tiles
    slot = first_slot + i % (slots - first_slot)
    i_head = i // (slots - first_slot)
    batch, head = (i_head // KEY_HEADS).to(tl.int64), (i_head % KEY_HEADS).to(tl.int64)

    m_row = o_row < rows
    o_token = o_row // GROUP
    b_last = o_token
    if p_ends is not None:
        b_last = _clamp(tl.load(p_ends + batch * tokens + o_token, mask=m_row, other=0), branch_tokens - 1)
    b_own = b_last - _clamp(tl.load(p_starts + batch * tokens + o_token, mask=m_row, other=0), b_last)
    length = prefix_tokens
    if p_lengths is not None:
        length = _clamp(tl.load(p_lengths + batch), prefix_tokens)
    b_unseen = tl.full([BLOCK_M], 0, tl.int32)
    if WINDOWED:
        b_unseen = tl.maximum(length + b_own - window + 1, 0)
    p_key = p_prefix_key + batch * prefix_key_batch + head * prefix_key_head
    p_value = p_prefix_value + batch * prefix_value_batch + head * prefix_value_head
    key_stride, value_stride = prefix_key_token, prefix_value_token
    b_first = tl.maximum(b_unseen, _split_start(slot - 1))
    b_end = tl.minimum(length, _split_start(slot)) + tl.full([BLOCK_M], 0, tl.int32)
    b_segment = tl.where(m_row & (b_first < b_end), 0, NO_SEGMENT)
    if BRANCHES:  # noqa: SIM102 - known when the kernel is compiled
        if slot == 0:
            p_key = p_branch_key + batch * branch_key_batch + head * branch_key_head
            p_value = p_branch_value + batch * branch_value_batch + head * branch_value_head
            key_stride, value_stride = branch_key_token, branch_value_token
            b_first = tl.maximum(b_unseen - length, 0)
            b_end = b_own + 1
            b_segment = tl.where(m_row & (b_own >= SHORT_BRANCH), b_last - b_own, NO_SEGMENT)

    m_attends = b_segment != NO_SEGMENT
    if tl.min(b_segment, 0) != NO_SEGMENT:
        o_d = tl.arange(0, BLOCK_D)
        o_head = head * GROUP + o_row % GROUP
        p_row = p_query + batch * query_batch + o_head * query_head + o_token.to(tl.int64) * query_token
        m_query = m_row[:, None] & (o_d < KEY_WIDTH)[None, :]
        b_query = tl.load(p_row[:, None] + o_d[None, :], mask=m_query, other=0.0).to(OPERAND)  # [BLOCK_M, BLOCK_D]
        b_max, b_sum, b_out = _attend(
            p_row, b_query, m_row, b_segment, b_first, b_end, p_key, key_stride, p_value, value_stride, column, factor,
            cap, CAPPED, KEY_WIDTH, VALUE_WIDTH, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_V, OPERAND, EXACT=False,
        )  # fmt: skip
        o_partial = (i_head * slots + slot).to(tl.int64) * rows + o_row
        if column == 0:
            tl.store(p_maxima + o_partial, b_max, mask=m_attends)
            tl.store(p_sums + o_partial, b_sum, mask=m_attends)
        p_partial = p_partials + o_partial[:, None] * VALUE_WIDTH
        if tl.min((tl.abs(b_out) < float("inf")).to(tl.int32)) == 1:
            o_v = column + tl.arange(0, BLOCK_V)
            tl.store(p_partial + o_v[None, :], b_out, mask=m_attends[:, None] & (o_v < VALUE_WIDTH)[None, :])
        else:
            # Few columns at a time, for want of registers.
            for some in range(column, column + BLOCK_V, EXACT_COLUMNS):
                b_max, b_sum, b_some = _attend(
                    p_row, b_query, m_row, b_segment, b_first, b_end, p_key, key_stride, p_value, value_stride, some,
                    factor, cap, CAPPED, KEY_WIDTH, VALUE_WIDTH, BLOCK_M, BLOCK_N, BLOCK_D, EXACT_COLUMNS, OPERAND,
                    EXACT=True,
                )  # fmt: skip
                o_v = some + tl.arange(0, EXACT_COLUMNS)
                tl.store(p_partial + o_v[None, :], b_some, mask=m_attends[:, None] & (o_v < VALUE_WIDTH)[None, :])


@triton.jit(do_not_specialize=["tokens", "prefix_tokens", "branch_tokens", "window", "slots"])
def merge_kernel(
    p_query,
    query_batch,
    query_head,
    query_token,
    p_branch_key,
    branch_key_batch,
    branch_key_head,
    branch_key_token,
    p_branch_value,
    branch_value_batch,
    branch_value_head,
    branch_value_token,
    p_starts,
    p_ends,
    p_lengths,
    p_maxima,
    p_sums,
    p_partials,
    p_output,
    tokens,
    prefix_tokens,
    branch_tokens,
    window,
    slots,
    factor,
    cap,
    total_rows,
    KEY_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    KEY_WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    CAPPED: tl.constexpr,
    WINDOWED: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Program = BLOCK_V columns of BLOCK_R rows in the order of the output: a short branch, then the slots of a row."""
    value_tiles: tl.constexpr = (VALUE_WIDTH + BLOCK_V - 1) // BLOCK_V
    o_row = tl.program_id(0) // value_tiles * BLOCK_R + tl.arange(0, BLOCK_R)
    o_v = tl.program_id(0) % value_tiles * BLOCK_V + tl.arange(0, BLOCK_V)
    m_row, m_v = o_row < total_rows, o_v < VALUE_WIDTH
    o_head = o_row % (KEY_HEADS * GROUP)
    o_token = o_row // (KEY_HEADS * GROUP)
    o_batch = (o_token // tokens).to(tl.int64)
    b_given = tl.load(p_starts + o_token, mask=m_row, other=0)
    b_last = o_token % tokens
    m_legal = m_row
    if p_ends is not None:
        b_given_end = tl.load(p_ends + o_token, mask=m_row, other=0)
        b_last = _clamp(b_given_end, branch_tokens - 1)
        m_legal &= b_given_end == b_last
    o_token = o_token % tokens
    b_start = _clamp(b_given, b_last)
    m_legal &= b_given == b_start
    b_own = b_last - b_start
    b_length = prefix_tokens + tl.full([BLOCK_R], 0, tl.int32)
    if p_lengths is not None:
        b_given = tl.load(p_lengths + o_batch, mask=m_row, other=0)
        b_length = _clamp(b_given, prefix_tokens)
        m_legal &= b_given == b_length
    b_unseen = tl.full([BLOCK_R], 0, tl.int32)
    if WINDOWED:
        b_unseen = tl.maximum(b_length + b_own - window + 1, 0)

    o_n = tl.arange(0, SHORT_BRANCH)
    m_n = (m_row & (b_own < SHORT_BRANCH))[:, None] & (o_n[None, :] <= b_own[:, None])
    m_n &= o_n[None, :] >= (b_unseen - b_length)[:, None]  # [BLOCK_R, SHORT_BRANCH]
    o_key = (b_start[:, None] + o_n[None, :]).to(tl.int64)
    o_key_head = (o_head // GROUP).to(tl.int64)
    p_row = p_query + o_batch * query_batch + o_head.to(tl.int64) * query_head + o_token.to(tl.int64) * query_token
    p_key = p_branch_key + (o_batch * branch_key_batch + o_key_head * branch_key_head)[:, None]
    p_key += o_key * branch_key_token
    p_value = p_branch_value + (o_batch * branch_value_batch + o_key_head * branch_value_head)[:, None]
    p_value += o_key * branch_value_token
    b_score = tl.full([BLOCK_R, SHORT_BRANCH], 0.0, tl.float32)
    for d in range(0, KEY_WIDTH, BLOCK_D):
        o_d = d + tl.arange(0, BLOCK_D)
        m_d = o_d < KEY_WIDTH
        b_query = tl.load(p_row[:, None] + o_d[None, :], mask=m_row[:, None] & m_d[None, :], other=0.0)
        b_key = tl.load(p_key[:, :, None] + o_d[None, None, :], mask=m_n[:, :, None] & m_d[None, None, :], other=0.0)
        b_score += tl.sum(b_query.to(tl.float32)[:, None, :] * b_key.to(tl.float32), 2)
    b_score *= factor
    if CAPPED:
        b_score = tanh(b_score) * cap
    b_score = tl.where(m_n, b_score, -float("inf"))
    b_max = tl.max(b_score, 1)
    # Scores that are all -inf have no finite difference from their maximum.
    b_weight = tl.exp2(b_score - tl.where(b_max == -float("inf"), 0.0, b_max)[:, None])
    # Divided by it the row is NaN, and no flag takes a register until then.
    b_sum = tl.where(m_legal, tl.sum(b_weight, 1), float("nan"))
    b_value = tl.load(p_value[:, :, None] + o_v[None, None, :], mask=m_n[:, :, None] & m_v[None, None, :], other=0.0)
    b_out = tl.sum(b_weight[:, :, None] * b_value.to(tl.float32), 1)  # [BLOCK_R, BLOCK_V]

    rows = tokens * GROUP
    o_partial = (o_batch * KEY_HEADS + o_key_head) * slots * rows + o_token * GROUP + o_head % GROUP
    m_long = m_row & (b_own >= SHORT_BRANCH)
    m_prefix = m_row & (b_unseen < b_length)
    b_first = 1 + _split_of(b_unseen)
    b_end = tl.where(m_prefix, 2 + _split_of(b_length - 1), 0)
    begin = tl.min(tl.where(m_long, 0, tl.where(m_prefix, b_first, NO_SEGMENT)), 0) // SLOTS_AT_ONCE * SLOTS_AT_ONCE
    end = tl.max(tl.where(m_long, tl.maximum(b_end, 1), b_end), 0)
    for tile in range(begin, end, SLOTS_AT_ONCE):
        o_slot = tile + tl.arange(0, SLOTS_AT_ONCE)[None, :]
        m_slot = (o_slot >= b_first[:, None]) & (o_slot < b_end[:, None]) | (o_slot == 0) & m_long[:, None]
        o_slot = o_partial[:, None] + o_slot.to(tl.int64) * rows
        b_maxima = tl.load(p_maxima + o_slot, mask=m_slot, other=-float("inf"))  # [BLOCK_R, SLOTS_AT_ONCE]
        b_sums = tl.load(p_sums + o_slot, mask=m_slot, other=0.0)
        p_partial = p_partials + (o_slot * VALUE_WIDTH)[:, :, None] + o_v[None, None, :]
        b_outs = tl.load(p_partial, mask=m_slot[:, :, None] & m_v[None, None, :], other=0.0)
        b_new_max = tl.maximum(b_max, tl.max(b_maxima, 1))
        b_shift = tl.where(b_new_max == -float("inf"), 0.0, b_new_max)
        b_rescale = tl.exp2(b_max - b_shift)
        b_factor = tl.exp2(b_maxima - b_shift[:, None])
        b_max = b_new_max
        b_sum = b_sum * b_rescale + tl.sum(b_factor * b_sums, 1)
        b_out = b_out * b_rescale[:, None] + tl.sum(b_factor[:, :, None] * b_outs, 1)

    b_out = tl.div_rn(b_out, b_sum[:, None])
    p_out = p_output + o_row.to(tl.int64)[:, None] * VALUE_WIDTH + o_v[None, :]
    tl.store(p_out, rounded(b_out, p_output.dtype.element_ty), mask=m_row[:, None] & m_v[None, :])
