"""Matrices to multiply and select from: what the tests of project_topk and lm_head_entropy_topk share."""

from itertools import product

import pytest
import torch

from ggro_kernels import dispatch
from tests.ggro_kernels.implementations import HAS_GPU, emulates_cuda

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

dtype_pairs = pytest.mark.parametrize(
    ("left_dtype", "right_dtype"),
    [
        pytest.param(left, right, id=f"{str(left).removeprefix('torch.')}-{str(right).removeprefix('torch.')}")
        for left, right in product(DTYPES, DTYPES)
    ],
)

SMALL_SHAPES = (
    (0, 33, 7, 5),
    (1, 1, 1, 1),
    (2, 31, 7, 5),
    (3, 33, 255, 25),
    (5, 257, 257, 64),
    (12, 257, 513, 256),
    (13, 1000, 64, 25),
    (20, 31, 1031, 31),
    (1, 300, 4100, 25),
    (25, 33, 1031, 5),
    (70, 97, 67, 25),
)
"""(rows, vocabulary, width, k) for every pair of dtypes."""

LARGE_SHAPES = ((20, 5003, 257, 64), (33, 257, 1031, 1), (70, 5003, 31, 25), (256, 513, 33, 256), (3, 5003, 513, 256))
"""The same for a few pairs."""


def interpreted(impl: str) -> bool:
    """Whether GPU kernels run on the CPU, which takes up to a tenth of a second for each row of any width."""
    return not HAS_GPU and (impl == "triton" or emulates_cuda(impl))


def few(impl: str, rows: int) -> int:
    """`rows`, or 2 in the interpreter, where more than one block of rows has its own tests."""
    return 2 if interpreted(impl) else rows


def small_shapes(impl: str) -> tuple[tuple[int, int, int, int], ...]:
    """SMALL_SHAPES, or fewer rows in the interpreter."""
    return ((0, 33, 7, 5), (1, 1, 1, 1), (1, 257, 67, 25)) if interpreted(impl) else SMALL_SHAPES


def large_shapes(impl: str) -> tuple[tuple[int, int, int, int], ...]:
    """LARGE_SHAPES, or fewer rows in the interpreter, among them some that take two blocks."""
    return ((1, 5003, 1031, 256), (1, 300, 4100, 25), (66, 97, 31, 1)) if interpreted(impl) else LARGE_SHAPES


def matrices(
    rows: int, vocab: int, width: int, left_dtype: torch.dtype, right_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Normal [rows, width] and [vocab, width]."""
    generator = torch.Generator().manual_seed(rows + 7 * vocab + 11 * width)
    left = torch.randn(rows, width, generator=generator).to(left_dtype)
    return left, torch.randn(vocab, width, generator=generator).to(right_dtype)


def integers(largest: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """-largest .. largest: sums of their products are exact in fp32, and often equal."""
    generator = torch.Generator().manual_seed(largest + sum(shape))
    return torch.randint(-largest, largest + 1, shape, generator=generator).to(dtype)


def linear(left: torch.Tensor, right: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """left @ right.T + bias in `dtype`."""
    product_ = left.to(dtype) @ right.to(dtype).t()
    return product_ if bias is None else product_ + bias.to(dtype)


def error_scale(left: torch.Tensor, right: torch.Tensor, bias: torch.Tensor | None = None) -> float:
    """Twice the largest sum of absolute values of the finite terms of any entry of `linear`.

    Rounding in a chain of additions of random terms has a standard deviation of 0.15 eps times that sum, whatever its
    length, and one in a million entries is five deviations off.
    """
    finite = [None if x is None else x.double().abs().nan_to_num(nan=0.0, posinf=0.0) for x in (left, right, bias)]
    scales = linear(finite[0], finite[1], finite[2], torch.float64)
    return 2 * scales.max().item() if scales.numel() else 1.0


def chain_slack(a: torch.Tensor, b: torch.Tensor) -> float:
    """Factor on `error_scale` for terms of any distribution: in a chain of terms of one sign, errors grow with it.

    The kernels sum chains of 128 terms; of 512 pairs where there are instructions for pairs of bf16.
    """
    if dispatch.native().selected_isa() == "avx512bf16" and a.dtype == b.dtype == torch.bfloat16:
        return max(2.0, 0.41 * min(a.shape[1], 1024) ** 0.5)
    return 2.0


def canonical(x: torch.Tensor) -> torch.Tensor:
    """`x` with one kind of zero and one kind of NaN: computed values may have either sign of zero, any bits of NaN."""
    return torch.where(x.isnan(), torch.nan, x + 0.0)


def amid_nan(x: torch.Tensor) -> torch.Tensor:
    """A view equal to `x`, unaligned, with NaN before and after it and in the gaps between its rows."""
    rows, columns = x.shape
    surroundings = torch.full((rows + 2, columns + 40), torch.nan, dtype=x.dtype)
    view = surroundings[1 : rows + 1, 3 : columns + 3]
    view.copy_(x)
    return view


def strided_views(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Views of one shape [rows / 2, columns / 2] of x [rows, columns], even both, by strides that kernels meet."""
    rows, columns = x.shape[0] // 2, x.shape[1] // 2
    return {
        "unaligned row stride": x[1 : rows + 1, 3 : columns + 3],
        "every other row": x[::2, 1 : columns + 1],
        "column stride": x[:rows, ::2],
        "transposed": x[:rows, :columns].t().contiguous().t(),
        "expanded row": x[1:2, :columns].expand(rows, -1),
        "expanded column": x[:rows, 1:2].expand(-1, columns),
        "reversed order": x.t()[:columns, :rows].flip(0).t(),
    }
