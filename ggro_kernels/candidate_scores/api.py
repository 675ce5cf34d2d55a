"""Gathered dot products of gradients with table rows."""

import torch

from ggro_kernels.candidate_scores.ops import candidate_scores_op
from ggro_kernels.dispatch import check_impl


def candidate_scores(
    gradient: torch.Tensor, table: torch.Tensor, ids: torch.Tensor, *, impl: str = "auto"
) -> torch.Tensor:
    """Dot product of each position's gradient with the table rows of its candidates: no `[P, V]`, no `table[ids]`.

    Args:
        gradient: [P, d], fp32, bf16 or fp16 (fp64 by the reference only); any strides, P may be 0.
        table: [V, d], one of the same dtypes, which need not be the gradient's; any strides.
        ids: [P, k] int64, each in 0 .. V - 1.
        impl: "auto", "native", "triton" or "reference"; an explicit request runs or raises.

    Returns:
        scores [P, k], `scores[p, j] = sum_i gradient[p, i] * table[ids[p, j], i]`, detached from the inputs;
        accumulated and returned in fp32 (fp64 if either input is fp64).

    Raises:
        TypeError, ValueError: wrong dtypes, shapes, devices or impl.
        IndexError: an id outside the table (checked on a CPU; on an accelerator the check would need a host sync).
        RuntimeError: the implementation asked for is not available.
    """
    for name, tensor in (("gradient", gradient), ("table", table), ("ids", ids)):
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
        if tensor.dim() != 2:
            raise ValueError(f"{name} must have 2 dimensions, got shape {list(tensor.shape)}")
        if tensor.device != gradient.device:
            raise ValueError(f"{name} must be on the gradient's device {gradient.device}, got {tensor.device}")
    for name, tensor in (("gradient", gradient), ("table", table)):
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {tensor.dtype}")
    if ids.dtype != torch.int64:
        raise TypeError(f"ids must be int64, got {ids.dtype}")
    if table.shape[1] != gradient.shape[1]:
        raise ValueError(f"table must have the gradient's width d={gradient.shape[1]}, got shape {list(table.shape)}")
    if ids.shape[0] != gradient.shape[0]:
        raise ValueError(f"ids must have one row per gradient row, P={gradient.shape[0]}, got shape {list(ids.shape)}")
    check_impl(impl)
    return candidate_scores_op(gradient, table, ids, impl)
