"""`prefix_attention` by csrc/cpu/prefix_attention.cpp and csrc/cuda/prefix_attention.cu."""

import torch

from ggro_kernels.native import DTYPE_CODES, address, run, with_unit_column_stride

_NO_WINDOW = 2**62


def _view(x: torch.Tensor) -> tuple[int, ...]:
    """`ggro::HeadsView` of x [batch, heads, tokens, width]."""
    return x.data_ptr(), *x.stride()[:3]


def prefix_attention(
    query: torch.Tensor,
    prefix_key: torch.Tensor,
    prefix_value: torch.Tensor,
    branch_key: torch.Tensor,
    branch_value: torch.Tensor,
    branch_starts: torch.Tensor,
    branch_ends: torch.Tensor | None,
    prefix_lengths: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> torch.Tensor:
    """output [B, Hq, T, Dv]; arguments as in the public function."""
    batch, query_heads, tokens, key_width = query.shape
    _, key_heads, prefix_tokens, value_width = prefix_value.shape
    query, prefix_key, prefix_value, branch_key, branch_value = map(
        with_unit_column_stride, (query, prefix_key, prefix_value, branch_key, branch_value)
    )
    branch_starts = branch_starts.contiguous()
    if branch_ends is not None:
        branch_ends = branch_ends.contiguous()
    if prefix_lengths is not None:
        prefix_lengths = prefix_lengths.contiguous()
    output = torch.empty(batch, tokens, query_heads, value_width, dtype=query.dtype, device=query.device)
    run(
        "prefix_attention",
        query.device,
        DTYPE_CODES[query.dtype],
        _view(query),
        _view(prefix_key),
        _view(prefix_value),
        _view(branch_key),
        _view(branch_value),
        branch_starts.data_ptr(),
        address(branch_ends),
        address(prefix_lengths),
        batch,
        query_heads,
        key_heads,
        tokens,
        prefix_tokens,
        branch_key.shape[2],
        key_width,
        value_width,
        scale,
        0.0 if softcap is None else softcap,
        _NO_WINDOW if window is None else window,
        output.data_ptr(),
    )
    return output.transpose(1, 2)
