"""`batch_invariant_linear` and its gradient by csrc/cpu/batch_invariant_linear{,_backward}.cpp."""

import torch

from ggro_kernels.dispatch import native
from ggro_kernels.native import DTYPE_CODES, address, with_unit_column_stride


def linear_into(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, output: torch.Tensor) -> None:
    """Write `x @ weight.T + bias` into `output`, without the dispatcher.

    Args:
        x: [R, K], contiguous, fp32, bf16 or fp16, on the CPU; all tensors are of its dtype.
        weight: [N, K], unit column stride, any row stride.
        bias: [N], contiguous, or None.
        output: [R, N], contiguous; overlaps none of the others.

    Raises:
        AssertionError: shapes that do not fit. Nothing else is checked.
    """
    rows, width = x.shape
    outputs = weight.shape[0]
    assert weight.shape[1] == width and output.shape == (rows, outputs)
    native().batch_invariant_linear(
        x.data_ptr(),
        weight.data_ptr(),
        weight.stride(0),
        address(bias),
        DTYPE_CODES[x.dtype],
        rows,
        outputs,
        width,
        output.data_ptr(),
        torch.get_num_threads(),
    )


def linear_backward_into(gradient: torch.Tensor, weight: torch.Tensor, output: torch.Tensor) -> None:
    """Write `gradient @ weight` into `output`, without the dispatcher.

    Args:
        gradient: [R, N], contiguous, fp32, bf16 or fp16, on the CPU; all tensors are of its dtype.
        weight: [N, K], unit column stride, any row stride.
        output: [R, K], contiguous; overlaps none of the others.

    Raises:
        AssertionError: shapes that do not fit. Nothing else is checked.
    """
    rows, outputs = gradient.shape
    width = weight.shape[1]
    assert weight.shape[0] == outputs and output.shape == (rows, width)
    native().batch_invariant_linear_backward(
        gradient.data_ptr(),
        weight.data_ptr(),
        weight.stride(0),
        DTYPE_CODES[gradient.dtype],
        rows,
        outputs,
        width,
        output.data_ptr(),
        torch.get_num_threads(),
    )


def batch_invariant_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """[R, N] of x [R, K], weight [N, K] and bias [N] on the CPU."""
    output = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype)
    bias = None if bias is None else bias.contiguous()
    linear_into(x.contiguous(), with_unit_column_stride(weight), bias, output)
    return output


def batch_invariant_linear_backward(gradient: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """What reaches x: [R, K] of gradient [R, N] and weight [N, K] on the CPU."""
    output = torch.empty(gradient.shape[0], weight.shape[1], dtype=gradient.dtype)
    linear_backward_into(gradient.contiguous(), with_unit_column_stride(weight), output)
    return output
