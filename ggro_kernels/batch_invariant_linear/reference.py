"""The specification of `batch_invariant_linear` and its gradient in eager torch: any device, any float dtype."""

import torch

from ggro_kernels.precision import accumulation_dtype


def batch_invariant_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """[R, N] of x [R, K], weight [N, K] and bias [N]."""
    accumulate = accumulation_dtype(x)
    # Neither a product of matrices nor one with a vector: how a BLAS adds depends on shapes, threads and alignment.
    rows = [(weight.to(accumulate) * row).sum(1) for row in x.to(accumulate)]
    output = torch.stack(rows) if rows else x.new_zeros((0, weight.shape[0]), dtype=accumulate)
    return (output if bias is None else output + bias.to(accumulate)).to(x.dtype)


def batch_invariant_linear_backward(gradient: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """What reaches x: [R, K] of gradient [R, N] and weight [N, K]."""
    return batch_invariant_linear(gradient, weight.t(), None)
