"""batch_invariant_linear and its gradient through every implementation it has."""

from collections.abc import Iterator

import pytest
import torch

from ggro_kernels.batch_invariant_linear.native import linear_backward_into, linear_into
from ggro_kernels.testing import assert_within_budget, bitwise
from tests.ggro_kernels.implementations import NATIVE, on_threads
from tests.ggro_kernels.op_calls import OpCalls
from tests.ggro_kernels.placed import batch_invariant_linear

pytestmark = pytest.mark.usefixtures("poisoned_empty")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES)
# There is no Triton kernel.
EVERY_IMPL = pytest.mark.parametrize("impl", ("reference", *NATIVE), indirect=True)

SHAPES = ((1, 1, 1), (1, 16, 16), (2, 7, 5), (3, 33, 17), (4, 100, 6), (5, 513, 47), (9, 1030, 33), (41, 520, 97))
"""Rows, width, outputs."""


def inputs(rows: int, width: int, outputs: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows + width + outputs)
    shapes = (rows, width), (outputs, width), (outputs,)
    x, weight, bias = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return x, weight, bias


def gradient_of_x(x: torch.Tensor, weight: torch.Tensor, gradient: torch.Tensor, impl: str) -> torch.Tensor:
    leaf = x.detach().requires_grad_()
    return torch.autograd.grad(batch_invariant_linear(leaf, weight, impl=impl), leaf, gradient)[0]


def check(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, impl: str) -> torch.Tensor:
    """Output and gradient, compared with torch's own."""
    output = batch_invariant_linear(x, weight, bias, impl=impl)
    gradient = torch.randn(output.shape, generator=torch.Generator().manual_seed(7)).to(x.dtype)
    x_gradient = gradient_of_x(x, weight, gradient, impl)
    for actual, left, right, added in (
        (output, x, weight.t(), bias),
        (x_gradient, gradient, weight, None),
    ):
        assert actual.dtype == x.dtype and actual.is_contiguous()

        def product(dtype: torch.dtype, left=left, right=right, added=added) -> torch.Tensor:
            result = left.to(dtype) @ right.to(dtype)
            return result if added is None else result + added.to(dtype)

        oracle = product(torch.float64)
        # Computed in fp32 and rounded once.
        same_precision = product(torch.float32).to(x.dtype)
        magnitude = (left.double().abs() @ right.double().abs()).max().item() if oracle.numel() else 1.0
        scale = magnitude if x.dtype == torch.float32 else 1.0
        assert_within_budget(actual, same_precision, oracle, scale=scale)
    return output


@EVERY_IMPL
@EVERY_DTYPE
def test_random_inputs(dtype: torch.dtype, impl: str) -> None:
    for shape in SHAPES:
        x, weight, bias = inputs(*shape, dtype)
        check(x, weight, bias, impl)
        check(x, weight, None, impl)


@EVERY_IMPL
@pytest.mark.parametrize(("rows", "width", "outputs"), [(0, 8, 5), (3, 8, 0), (0, 8, 0), (0, 0, 3)])
def test_nothing_to_compute(rows: int, width: int, outputs: int, impl: str) -> None:
    assert check(*inputs(rows, width, outputs, torch.float32), impl).shape == (rows, outputs)


@EVERY_IMPL
@EVERY_DTYPE
def test_sums_of_nothing(dtype: torch.dtype, impl: str) -> None:
    x, weight, bias = inputs(3, 0, 5, dtype)
    assert torch.equal(batch_invariant_linear(x, weight, bias, impl=impl), bias.expand(3, 5))
    assert torch.equal(batch_invariant_linear(x, weight, impl=impl), torch.zeros(3, 5, dtype=dtype))
    x, weight, _ = inputs(3, 20, 0, dtype)
    gradient = gradient_of_x(x, weight, torch.empty(3, 0, dtype=dtype), impl)
    assert torch.equal(gradient, torch.zeros(3, 20, dtype=dtype))


@EVERY_IMPL
def test_integers_are_exact(impl: str) -> None:
    generator = torch.Generator().manual_seed(3)
    for rows, width, outputs in SHAPES:
        x, weight = (
            torch.randint(-8, 9, shape, generator=generator).float() for shape in ((rows, width), (outputs, width))
        )
        output = batch_invariant_linear(x, weight, impl=impl)
        assert torch.equal(output.double(), x.double() @ weight.double().t())
        gradient = gradient_of_x(x, weight, output.sign(), impl)
        assert torch.equal(gradient.double(), output.sign().double() @ weight.double())


@EVERY_IMPL
@EVERY_DTYPE
def test_strides_and_dimensions(dtype: torch.dtype, impl: str) -> None:
    x, weight, bias = inputs(12, 130, 120, dtype)
    check(x[::2, 1:100], weight[5:, 1:100], bias[5:], impl)
    check(x[:, ::2], weight[::3, ::2], bias[::3], impl)
    check(x[:, :40].t().contiguous().t(), weight[:, :40].t().contiguous().t(), bias, impl)
    check(x[:1].expand(5, -1), weight[:1].expand(50, -1), bias[:1].expand(50), impl)
    whole = batch_invariant_linear(x, weight, bias, impl=impl)
    for shape in ((3, 4), (2, 3, 2), (12, 1)):
        shaped = batch_invariant_linear(x.reshape(*shape, 130), weight, bias, impl=impl)
        assert shaped.shape == (*shape, 120) and torch.equal(shaped.reshape(12, 120), whole)
    assert torch.equal(batch_invariant_linear(x[3], weight, bias, impl=impl), whole[3])


@EVERY_IMPL
@EVERY_DTYPE
def test_infinities_and_nan_stay_in_their_rows_and_columns(dtype: torch.dtype, impl: str) -> None:
    x, weight, _ = inputs(6, 37, 21, dtype)
    x[1, 36], x[2, 3], weight[20, 5] = torch.nan, torch.inf, -torch.inf
    expected = x.double() @ weight.double().t()
    output = batch_invariant_linear(x, weight, impl=impl)
    assert torch.equal(output.isnan(), expected.isnan())
    assert torch.equal(output[output.isinf()].double(), expected[expected.isinf()])
    gradient = torch.ones(6, 21, dtype=dtype)
    gradient[4, 20] = 0.0
    x_gradient = gradient_of_x(x, weight, gradient, impl)
    assert x_gradient[4, 5].isnan() and (x_gradient[[0, 1, 2, 3, 5], 5] == -torch.inf).all()
    assert x_gradient[:, :5].isfinite().all() and x_gradient[:, 6:].isfinite().all()


def slices(rows: int) -> Iterator[slice]:
    """Rows alone, at the beginning, in the middle and at the end of batches of every size."""
    for count in range(1, rows + 1):
        for first in {0, (rows - count) // 2, rows - count}:
            yield slice(first, first + count)


@EVERY_DTYPE
@pytest.mark.parametrize(("width", "outputs"), [(512, 300), (1376, 64), (131, 101), (19, 700)])
def test_a_row_has_the_same_bits_in_any_batch(dtype: torch.dtype, width: int, outputs: int, native_impl: str) -> None:
    x, weight, bias = inputs(40, width, outputs, dtype)
    gradient = inputs(40, outputs, 1, dtype)[0]
    op = torch.ops.ggro_kernels.batch_invariant_linear_backward
    output = bitwise(batch_invariant_linear(x, weight, bias, impl=native_impl))
    x_gradient = bitwise(op(gradient, weight, native_impl))
    for part in slices(40):
        assert torch.equal(bitwise(batch_invariant_linear(x[part], weight, bias, impl=native_impl)), output[part])
        assert torch.equal(bitwise(op(gradient[part], weight, native_impl)), x_gradient[part])
    shuffled = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    assert torch.equal(bitwise(batch_invariant_linear(x[shuffled], weight, bias, impl=native_impl)), output[shuffled])
    for threads in (2, 3):
        with on_threads(threads):
            for part in (slice(0, 1), slice(3, 8), slice(0, 40)):
                shared = batch_invariant_linear(x[part], weight, bias, impl=native_impl)
                assert torch.equal(bitwise(shared), output[part])
                assert torch.equal(bitwise(op(gradient[part], weight, native_impl)), x_gradient[part])


@pytest.mark.parametrize("rows", [1, 40])
def test_an_output_has_the_same_bits_in_any_matrix(rows: int, native_impl: str) -> None:
    x, weight, bias = inputs(rows, 515, 100, torch.float32)
    whole = bitwise(batch_invariant_linear(x, weight, bias, impl=native_impl))
    for first, last in ((0, 1), (3, 20), (50, 100), (99, 100)):
        part = batch_invariant_linear(x, weight[first:last], bias[first:last], impl=native_impl)
        assert torch.equal(bitwise(part), whole[:, first:last])


def test_rows_beyond_what_a_cache_holds(native_impl: str) -> None:
    x, weight, bias = inputs(150, 2100, 40, torch.float32)
    output = check(x, weight, bias, native_impl)
    assert torch.equal(batch_invariant_linear(x[77], weight, bias, impl=native_impl), output[77])


def test_columns_beyond_what_a_cache_holds(native_impl: str) -> None:
    x, weight, _ = inputs(40, 9000, 70, torch.float32)
    check(x, weight, None, native_impl)
    check(x[:1], weight, None, native_impl)


@EVERY_DTYPE
def test_a_row_of_the_reference_is_the_same_in_any_batch(dtype: torch.dtype) -> None:
    x, weight, bias = inputs(9, 515, 100, dtype)
    whole = batch_invariant_linear(x, weight, bias, impl="reference")
    for row in range(9):
        assert torch.equal(batch_invariant_linear(x[row], weight, bias, impl="reference"), whole[row])


@EVERY_DTYPE
@pytest.mark.parametrize("impl", NATIVE, indirect=True)
def test_writing_into_given_memory(dtype: torch.dtype, impl: str) -> None:
    x, weight, bias = inputs(5, 70, 33, dtype)
    weight = torch.cat([weight, weight], dim=1)[:, :70]
    output, x_gradient = torch.full((7, 33), 5.0, dtype=dtype), torch.full((7, 70), 5.0, dtype=dtype)
    linear_into(x, weight, bias, output[1:6])
    linear_backward_into(output[1:6], weight, x_gradient[1:6])
    assert torch.equal(output[1:6], batch_invariant_linear(x, weight, bias, impl=impl))
    assert torch.equal(x_gradient[1:6], gradient_of_x(x, weight, output[1:6], impl))
    assert (output[[0, 6]] == 5).all() and (x_gradient[[0, 6]] == 5).all()
    linear_into(x, weight, None, output[:5])
    assert torch.equal(output[:5], batch_invariant_linear(x, weight, impl=impl))


def test_gradcheck_in_fp64() -> None:
    x, weight, bias = inputs(3, 5, 4, torch.float64)
    assert torch.autograd.gradcheck(lambda x: batch_invariant_linear(x, weight, bias), x.requires_grad_())


@EVERY_IMPL
def test_only_x_is_differentiated(impl: str) -> None:
    x, weight, bias = (tensor.requires_grad_() for tensor in inputs(3, 20, 30, torch.float32))
    with OpCalls() as recorder:
        output = batch_invariant_linear(x, weight, bias, impl=impl)
        output.sum().backward()
    called = [func._schema.name.split("::")[1] for func, _ in recorder.calls]
    assert called == ["batch_invariant_linear", "batch_invariant_linear_backward"]
    assert x.grad is not None and weight.grad is None and bias.grad is None
    assert not batch_invariant_linear(x.detach(), weight, bias, impl=impl).requires_grad


def test_there_is_no_triton_kernel() -> None:
    x, weight, _ = inputs(3, 20, 30, torch.float32)
    with pytest.raises(RuntimeError, match="impl='triton' has no kernel of this op: use 'auto'"):
        batch_invariant_linear(x, weight, impl="triton")


X, WEIGHT, BIAS = torch.randn(2, 4), torch.randn(9, 4), torch.randn(9)


@EVERY_IMPL
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1.0], WEIGHT, BIAS), TypeError, r"x must be a torch\.Tensor, got list"),
        ((X[0, 0], WEIGHT, BIAS), ValueError, r"x must have shape \[\.\.\., K\], got \[\]"),
        ((X, WEIGHT[0], BIAS), ValueError, r"weight must have shape \[N, K\], got \[4\]"),
        ((X, WEIGHT, BIAS[:, None]), ValueError, r"bias must have shape \[N\], got \[9, 1\]"),
        ((X, WEIGHT, BIAS.to("meta")), ValueError, "bias must be on cpu as the other tensors, got meta"),
        ((X.long(), WEIGHT, BIAS), TypeError, r"x must be float32.*got torch\.int64"),
        ((X, WEIGHT.half(), BIAS), TypeError, r"weight must have the dtype of x, torch\.float32, got torch\.float16"),
        ((X, WEIGHT, BIAS.double()), TypeError, r"bias must have the dtype of x, torch\.float32, got torch\.float64"),
        ((X, WEIGHT[:, :3], BIAS), ValueError, r"weight must have the width of x, K=4, got shape \[9, 3\]"),
        ((X, WEIGHT, BIAS[:8]), ValueError, r"bias must have one entry per row of weight, N=9, got \[8\]"),
    ],
)
def test_bad_arguments(arguments: tuple, error: type[Exception], message: str, impl: str) -> None:
    with pytest.raises(error, match=message):
        batch_invariant_linear(*arguments, impl=impl)
