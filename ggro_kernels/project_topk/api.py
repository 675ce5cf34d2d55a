"""Projection of gradients on a table and the k best rows of each."""

from typing import NamedTuple

import torch

from ggro_kernels.checks import check_floating, check_k, check_per_token, check_tensor
from ggro_kernels.dispatch import check_impl
from ggro_kernels.project_topk.ops import project_topk_op


class ProjectTopK(NamedTuple):
    """Result of `project_topk` for P positions."""

    scores: torch.Tensor
    """[P, k] fp32 (fp64 where an input is fp64), largest first."""
    indices: torch.Tensor
    """[P, k] int64, rows of the table."""


def project_topk(
    gradient: torch.Tensor,
    table: torch.Tensor,
    k: int,
    *,
    bias: torch.Tensor | None = None,
    forbidden: torch.Tensor | None = None,
    impl: str = "auto",
) -> ProjectTopK:
    """The k largest of `gradient @ table.T + bias` at each position: one read of the table, no `[P, V]` scores.

    This is the candidate step of HotFlip and GCG: with the gradient of a loss at P token positions, negated, and the
    embedding table, the indices are the k replacements of each token that promise the largest decrease of the loss.
    With `bias = -0.5 * table.square().sum(1)` they are the k rows nearest to each row of `gradient` in Euclidean
    distance. For the k smallest, negate `gradient` and `bias`.

    Args:
        gradient: [P, d], fp32, bf16 or fp16 (fp64 by the reference only); any strides, P and d may be 0.
        table: [V, d], one of the same dtypes, which need not be the gradient's; any strides.
        k: 1 .. min(256, V).
        bias: [V], added to the scores of every position; any float dtype, used in the precision of the scores.
        forbidden: [V] bool, tokens whose score is -inf, whatever their row and bias hold. They are returned only
            where fewer than k scores are larger.
        impl: "auto", "native", "triton" or "reference"; an explicit request runs or raises.

    Returns:
        `ProjectTopK(scores[P, k], indices[P, k])`, detached from the inputs: no gradient flows through it.
        Scores are accumulated and returned in fp32, also for bf16 and fp16 inputs (fp64 if gradient or table is fp64).
        The order is score descending, then index ascending; -0.0 equals +0.0; NaN is the largest score. A position's
        result does not depend on the other positions or on the number of threads.

    Raises:
        TypeError, ValueError: wrong dtypes, shapes, devices, k or impl.
        RuntimeError: the implementation asked for is not available.

    Source: Ebrahimi et al., HotFlip: white-box adversarial examples for text classification (2018); Zou et al.,
    Universal and transferable adversarial attacks on aligned language models (2023), algorithm 1, `Top-k(-gradient)`.
    """
    check_tensor("gradient", gradient, "[P, d]")
    check_tensor("table", table, "[V, d]", like=gradient)
    check_floating("gradient", gradient)
    check_floating("table", table)
    vocab, width = table.shape
    if width != gradient.shape[1]:
        raise ValueError(f"table must have the gradient's width d={gradient.shape[1]}, got shape {list(table.shape)}")
    check_k(k, vocab)
    if bias is not None:
        check_per_token("bias", bias, vocab, like=gradient)
        check_floating("bias", bias)
    if forbidden is not None:
        check_per_token("forbidden", forbidden, vocab, like=gradient)
        if forbidden.dtype != torch.bool:
            raise TypeError(f"forbidden must be bool, got {forbidden.dtype}")
    check_impl(impl)
    return ProjectTopK(*project_topk_op(gradient, table, k, bias, forbidden, impl))
