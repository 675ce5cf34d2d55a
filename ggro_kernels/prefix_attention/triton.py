"""`prefix_attention` by Triton: splits of the prefix, each read once for all branches, then merged row by row."""

import math
from typing import Any

import torch
import triton
import triton.language as tl

from ggro_kernels.checks import check_indices
from ggro_kernels.native import with_unit_column_stride
from ggro_kernels.prefix_attention.triton_kernels import SHORT_BRANCH, attend_kernel, merge_kernel, split_count
from ggro_kernels.triton_parts.conversion import INTERPRETED
from ggro_kernels.triton_parts.tuning import tuned

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def _attend_configuration(rows: int, keys: int, warps: int, stages: int) -> triton.Config:
    return triton.Config({"BLOCK_M": rows, "BLOCK_N": keys}, num_warps=warps, num_stages=stages)


def _tuned(kernel: Any, *configurations: triton.Config) -> Any:
    return tuned(*configurations, key=("KEY_WIDTH", "VALUE_WIDTH", "GROUP"))(kernel)


# Those that spill no register. Widths that are no powers of two mask every load; wide heads have many accumulators.
_ATTEND_HALF = _tuned(
    attend_kernel,
    _attend_configuration(64, 32, warps=4, stages=3),
    _attend_configuration(64, 64, warps=8, stages=3),
    _attend_configuration(128, 64, warps=8, stages=3),
)
_ATTEND_PADDED_HALF = _tuned(attend_kernel, _attend_configuration(64, 32, warps=8, stages=4))
_ATTEND_WIDE_HALF = _tuned(attend_kernel, _attend_configuration(64, 16, warps=8, stages=2))
_ATTEND_PIECES_HALF = _tuned(attend_kernel, _attend_configuration(32, 32, warps=4, stages=2))
_ATTEND_FP32 = _tuned(attend_kernel, _attend_configuration(16, 32, warps=8, stages=2))
_ATTEND_PADDED_FP32 = _tuned(attend_kernel, _attend_configuration(16, 32, warps=4, stages=2))
_MERGE = _tuned(merge_kernel, triton.Config({"BLOCK_R": 8}, num_warps=8), triton.Config({"BLOCK_R": 4}, num_warps=4))
_MERGE_WIDE = _tuned(merge_kernel, triton.Config({"BLOCK_R": 4}, num_warps=8))


def _blocks(key_width: int, value_width: int, dtype: torch.dtype) -> tuple[int, int, Any]:
    """Columns of keys and of values that a program takes at once, and the kernel for them."""
    block_d, block_v = (triton.next_power_of_2(max(width, 16)) for width in (key_width, value_width))
    widest = max(block_d, block_v)
    fp32 = dtype == torch.float32
    if widest > (128 if fp32 else 256):
        # The scores are computed piece by piece, and again for every block of values.
        pieces = min(block_d, 32 if fp32 else 64), min(block_v, 128)
        return *pieces, _ATTEND_FP32 if fp32 else _ATTEND_PIECES_HALF
    padded = (block_d, block_v) != (key_width, value_width)
    if fp32:
        return block_d, block_v, _ATTEND_PADDED_FP32 if padded else _ATTEND_FP32
    if widest > 128:
        return block_d, block_v, _ATTEND_WIDE_HALF
    return block_d, block_v, _ATTEND_PADDED_HALF if padded else _ATTEND_HALF


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
    """output [B, Hq, T, Dv]; arguments as in the public function.

    On a GPU a token whose branch start, branch end or prefix length is out of range gets NaN. One launch where there is
    no prefix and no branch can be longer than 16 tokens, else two.
    """
    batch, query_heads, tokens, key_width = query.shape
    _, key_heads, prefix_tokens, value_width = prefix_value.shape
    branch_tokens = branch_key.shape[2]
    if query.device.type == "cpu":
        ends = torch.arange(tokens).expand_as(branch_starts) if branch_ends is None else branch_ends
        check_indices("branch_ends", ends, branch_tokens - 1, "the branch tokens there are")
        check_indices("branch_starts", branch_starts, ends, "the tokens up to this one")
        if prefix_lengths is not None:
            check_indices("prefix_lengths", prefix_lengths, prefix_tokens, "the prefix tokens there are")
    output = torch.empty(batch, tokens, query_heads, value_width, dtype=query.dtype, device=query.device)
    if output.numel() == 0:
        return output.transpose(1, 2)
    query, prefix_key, prefix_value, branch_key, branch_value = map(
        with_unit_column_stride, (query, prefix_key, prefix_value, branch_key, branch_value)
    )
    branch_starts = branch_starts.contiguous()
    if branch_ends is not None:
        branch_ends = branch_ends.contiguous()
    if prefix_lengths is not None:
        prefix_lengths = prefix_lengths.contiguous()

    group = query_heads // key_heads
    splits = split_count(prefix_tokens)
    branches = branch_tokens > SHORT_BRANCH.value
    partials = torch.empty(
        batch * key_heads, 1 + splits, tokens * group, value_width, dtype=torch.float32, device=query.device
    )
    maxima, sums = torch.empty(2, *partials.shape[:3], dtype=torch.float32, device=query.device)
    block_d, block_v, attend = _blocks(key_width, value_width, query.dtype)
    value_tiles = triton.cdiv(value_width, block_v)
    queries = (query, *query.stride()[:3])
    branch = (branch_key, *branch_key.stride()[:3], branch_value, *branch_value.stride()[:3])
    prefix = (prefix_key, *prefix_key.stride()[:3], prefix_value, *prefix_value.stride()[:3])
    workspace = (branch_starts, branch_ends, prefix_lengths, maxima, sums, partials)
    sizes = (tokens, prefix_tokens, branch_tokens, min(window or 0, prefix_tokens + branch_tokens), 1 + splits)
    factors = (scale * math.log2(math.e), 0.0) if softcap is None else (scale / softcap, softcap * math.log2(math.e))
    constants = {
        "KEY_HEADS": key_heads,
        "GROUP": group,
        "KEY_WIDTH": key_width,
        "VALUE_WIDTH": value_width,
        "BLOCK_D": block_d,
        "BLOCK_V": block_v,
        "CAPPED": softcap is not None,
        "WINDOWED": window is not None,
    }
    if splits or branches:
        tiles = (splits + branches) * batch * key_heads * value_tiles
        attend[lambda meta: (triton.cdiv(tokens * group, meta["BLOCK_M"]) * tiles,)](
            *queries,
            *branch,
            *prefix,
            *workspace,
            *sizes,
            *factors,
            **constants,
            BRANCHES=branches,
            OPERAND=tl.float32 if INTERPRETED.value else DTYPES[query.dtype],
        )
    rows = batch * tokens * query_heads
    merge = _MERGE if max(key_width, value_width) <= 128 else _MERGE_WIDE
    merge[lambda meta: (triton.cdiv(rows, meta["BLOCK_R"]) * value_tiles,)](
        *queries, *branch, *workspace, output, *sizes, *factors, rows, **constants
    )
    return output.transpose(1, 2)
