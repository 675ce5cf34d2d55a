"""Gathered dot products of gradients with table rows."""

import torch

from ggro_kernels.candidate_scores.ops import candidate_scores_op
from ggro_kernels.checks import check_floating, check_int64, check_tensor
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
        scores [P, k], `scores[p, j] = sum_i gradient[p, i] * table[ids[p, j], i]`, accumulated and returned in fp32
        (fp64 if either input is fp64). Differentiable once in gradient and table; the table's gradient is a dense
        [V, d] in its dtype, in which candidates of the same row are summed in fp32 in the order of ids.

    Raises:
        TypeError, ValueError: wrong dtypes, shapes, devices or impl.
        IndexError: an id outside the table (checked on a CPU; on an accelerator the check would need a host sync, and
            Triton's score for it is NaN).
        RuntimeError: the implementation asked for is not available.
    """
    check_tensor("gradient", gradient, "[P, d]")
    check_tensor("table", table, "[V, d]", like=gradient)
    check_tensor("ids", ids, "[P, k]", like=gradient)
    check_floating("gradient", gradient)
    check_floating("table", table)
    check_int64("ids", ids)
    if table.shape[1] != gradient.shape[1]:
        raise ValueError(f"table must have the gradient's width d={gradient.shape[1]}, got shape {list(table.shape)}")
    if ids.shape[0] != gradient.shape[0]:
        raise ValueError(f"ids must have one row per gradient row, P={gradient.shape[0]}, got shape {list(ids.shape)}")
    check_impl(impl)
    return candidate_scores_op(gradient, table, ids, impl)
