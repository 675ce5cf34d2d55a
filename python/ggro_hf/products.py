"""Matrix products of recorded ops by `batch_invariant_linear`: weights read at full bandwidth, rows as in any batch."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ggro_kernels.batch_invariant_linear.native import linear_backward_into, linear_into
from ggro_kernels.library import automatic

_CPU = torch.device("cpu")


def product_into(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Callable[[], object] | None:
    """What writes the product that `op` computes of `args` into `output`; None where it is none, or not for us."""
    if op is torch.ops.aten.mm.default:
        return _product(args[0], args[1], None, output)
    if op is torch.ops.aten.addmm.default and not kwargs and args[0].dim() == 1 and args[0].is_contiguous():
        return _product(args[1], args[2], args[0], output)
    return None


def _product(x: Tensor, matrix: Tensor, bias: Tensor | None, output: Tensor) -> Callable[[], object] | None:
    """`x @ matrix + bias`, where `matrix` is a weight or the transpose of one."""
    if automatic("batch_invariant_linear", _CPU, x.dtype) != "native":
        return None
    if not (x.is_contiguous() and output.is_contiguous()):
        return None
    if matrix.stride(0) == 1:
        return partial(linear_into, x, matrix.T, bias, output)
    if matrix.stride(1) != 1:
        return None
    product = partial(linear_backward_into, x, matrix, output)
    if bias is None:
        return product

    def biased() -> None:
        product()
        output.add_(bias)

    return biased
