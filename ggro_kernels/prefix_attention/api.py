"""Attention of branches that share a prefix."""

import torch

from ggro_kernels.checks import check_floating, check_int64, check_shape, check_softcap, check_tensor
from ggro_kernels.dispatch import check_impl
from ggro_kernels.library import constant
from ggro_kernels.prefix_attention.ops import prefix_attention_op


def prefix_attention(
    query: torch.Tensor,
    prefix_key: torch.Tensor,
    prefix_value: torch.Tensor,
    branch_key: torch.Tensor,
    branch_value: torch.Tensor,
    branch_starts: torch.Tensor,
    *,
    branch_ends: torch.Tensor | None = None,
    prefix_lengths: torch.Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """Causal attention of ragged branches packed one after another, each the continuation of one shared prefix.

    Token `i` of a row attends to the prefix and to the branch tokens `branch_starts[b, i] .. branch_ends[b, i]`, of
    which it is the last, as it would in a sequence that holds the prefix and its branch alone. The keys and values are
    read where they lie, the prefix once for all branches and all query heads of a group: no copies per branch, no
    repeated heads, no mask.

    Args:
        query: [B, Hq, T, D], fp32, bf16 or fp16 (fp64 by the reference only), for T new tokens; T may be 0.
        prefix_key, prefix_value: [B, Hkv, N, D] and [B, Hkv, N, Dv], of the query's dtype; N may be 0. Query head `h`
            reads head `h // (Hq / Hkv)`.
        branch_key, branch_value: [B, Hkv, M, D] and [B, Hkv, M, Dv], M = T: those of the new tokens; with `branch_ends`
            any M >= 1. All five tensors may have any strides; slices of one cache are not copied as long as the last
            dimension is contiguous.
        branch_starts: [B, T] int64, the index of the first token of the branch that token `i` ends, in
            0 .. branch_ends[b, i]. All zero: one branch, plain causal attention. `arange(T)`: siblings that do not see
            each other.
        branch_ends: [B, T] int64, which of the M keys and values is that of token `i`, in 0 .. M - 1; default `i`.
            For branches that are decoded side by side, each in its own part of one buffer. They may lie anywhere and
            overlap; what no token sees is not read into any result.
        prefix_lengths: [B] int64, how many of the N prefix tokens a row has; what lies beyond them is not read. Default
            N.
        scale: factor of query times key, D ** -0.5 by default.
        softcap: 1e-30 .. 1e30; scores become `softcap * tanh(scores / softcap)` before the softmax (Gemma 2,
            arXiv:2408.00118).
        window: sliding window of 1 or more tokens; token `i`, whose position is
            `p = prefix_length + branch_ends[b, i] - branch_starts[b, i]`, attends to positions above `p - window` only.
        impl: "auto", "native", "triton" or "reference"; an explicit request runs or raises.

    Returns:
        output [B, Hq, T, Dv] in the query's dtype, laid out in memory as [B, T, Hq, Dv]. Scores, softmax and sums are
        fp32 (fp64 for fp64 inputs). Prefix and branch are merged under one running softmax (arXiv:1805.02867). A token
        whose every score is -inf gets NaN. Differentiable once, in query, branch_key and branch_value; the prefix
        counts as a constant. The way back computes the scores again; it has kernels on a CPU only and is eager torch
        elsewhere.

    Raises:
        TypeError, ValueError: wrong dtypes, shapes, devices, options or impl.
        IndexError: a branch start, branch end or prefix length out of range (checked on a CPU; elsewhere it would need
            a sync).
        RuntimeError: the implementation asked for is not available.
    """
    check_tensor("query", query, "[B, Hq, T, D]")
    check_floating("query", query)
    batch, query_heads, tokens, key_width = query.shape
    check_tensor("prefix_key", prefix_key, "[B, Hkv, N, D]", like=query)
    check_tensor("prefix_value", prefix_value, "[B, Hkv, N, Dv]", like=query)
    branch_shape = "T" if branch_ends is None else "M"
    check_tensor("branch_key", branch_key, f"[B, Hkv, {branch_shape}, D]", like=query)
    check_tensor("branch_value", branch_value, f"[B, Hkv, {branch_shape}, Dv]", like=query)
    key_heads, prefix_tokens = prefix_key.shape[1:3]
    value_width = prefix_value.shape[3]
    branch_tokens = tokens if branch_ends is None else branch_key.shape[2]
    for name, tensor, shape in (
        ("prefix_key", prefix_key, (batch, key_heads, prefix_tokens, key_width)),
        ("prefix_value", prefix_value, (batch, key_heads, prefix_tokens, value_width)),
        ("branch_key", branch_key, (batch, key_heads, branch_tokens, key_width)),
        ("branch_value", branch_value, (batch, key_heads, branch_tokens, value_width)),
    ):
        if tensor.dtype != query.dtype:
            raise TypeError(f"{name} must be of the query's dtype {query.dtype}, got {tensor.dtype}")
        check_shape(name, tensor, shape, "the others")
    if key_heads == 0 or query_heads % key_heads != 0:
        raise ValueError(f"query must have a multiple of the Hkv={key_heads} key heads, got Hq={query_heads}")
    check_tensor("branch_starts", branch_starts, "[B, T]", like=query)
    check_int64("branch_starts", branch_starts)
    check_shape("branch_starts", branch_starts, (batch, tokens), "query")
    if branch_ends is not None:
        check_tensor("branch_ends", branch_ends, "[B, T]", like=query)
        check_int64("branch_ends", branch_ends)
        check_shape("branch_ends", branch_ends, (batch, tokens), "query")
        if branch_tokens == 0:
            raise ValueError("branch_key must have at least one token for branch_ends to point at, got M=0")
    if prefix_lengths is not None:
        check_tensor("prefix_lengths", prefix_lengths, "[B]", like=query)
        check_int64("prefix_lengths", prefix_lengths)
        check_shape("prefix_lengths", prefix_lengths, (batch,), "query")
    check_softcap(softcap)
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, or None for no window, got {window}")
    check_impl(impl)
    return prefix_attention_op(
        query,
        constant(prefix_key),
        constant(prefix_value),
        branch_key,
        branch_value,
        branch_starts,
        branch_ends,
        prefix_lengths,
        key_width**-0.5 if scale is None else scale,
        softcap,
        window,
        impl,
    )
