"""Linear layers whose rows do not depend on their batch."""

import torch

from ggro_kernels.batch_invariant_linear.ops import batch_invariant_linear_op
from ggro_kernels.checks import check_floating, check_tensor
from ggro_kernels.dispatch import check_impl
from ggro_kernels.library import constant


def batch_invariant_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, impl: str = "auto"
) -> torch.Tensor:
    """`x @ weight.T + bias`, each row bit by bit what it is alone; for up to about six rows one read of the weights.

    Args:
        x: [..., K], fp32, bf16 or fp16 (fp64 by the reference only); any strides, any number of rows, also 0.
        weight: [N, K] of the same dtype; fastest with unit column stride.
        bias: [N] of the same dtype, or None.
        impl: "auto", "native" or "reference"; an explicit request runs or raises. There are CPU kernels only: on other
            devices "auto" is the reference, a product for each row.

    Returns:
        [..., N] in the dtype of x, contiguous; accumulated in fp32 (fp64 for fp64), bias added, rounded once. A row's
        bits depend on that row, weight and bias, the implementation and the processor's instruction set: not on the
        number of rows, their place or the number of threads. Differentiable once, in x only, with the same promises;
        weight and bias count as constants.

    Raises:
        TypeError, ValueError: wrong dtypes, shapes, devices or impl.
        RuntimeError: the implementation asked for is not available.
    """
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"x must be a torch.Tensor, got {type(x).__name__}")
    if x.dim() == 0:
        raise ValueError("x must have shape [..., K], got []")
    check_floating("x", x)
    check_tensor("weight", weight, "[N, K]", like=x)
    _check_dtype("weight", weight, x)
    if weight.shape[1] != x.shape[-1]:
        raise ValueError(f"weight must have the width of x, K={x.shape[-1]}, got shape {list(weight.shape)}")
    if bias is not None:
        check_tensor("bias", bias, "[N]", like=x)
        _check_dtype("bias", bias, x)
        if bias.shape[0] != weight.shape[0]:
            raise ValueError(f"bias must have one entry per row of weight, N={weight.shape[0]}, got {list(bias.shape)}")
    check_impl(impl)
    # -1 would not say how many rows there are where K is 0.
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    output = batch_invariant_linear_op(rows, constant(weight), None if bias is None else constant(bias), impl)
    return output.reshape(*x.shape[:-1], weight.shape[0])


def _check_dtype(name: str, tensor: torch.Tensor, x: torch.Tensor) -> None:
    if tensor.dtype != x.dtype:
        raise TypeError(f"{name} must have the dtype of x, {x.dtype}, got {tensor.dtype}")
