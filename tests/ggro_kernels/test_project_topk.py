"""project_topk, each line of its contract, through every implementation."""

import pytest
import torch
from torch import inf, nan

from ggro_kernels import ProjectTopK
from ggro_kernels.testing import assert_exact_selection, assert_selection_within_budget, bitwise
from tests.ggro_kernels.implementations import on_threads, thread_counts
from tests.ggro_kernels.op_calls import assert_bitwise_equal
from tests.ggro_kernels.placed import project_topk
from tests.ggro_kernels.projections import (
    DTYPES,
    amid_nan,
    canonical,
    dtype_pairs,
    error_scale,
    few,
    integers,
    interpreted,
    large_shapes,
    linear,
    matrices,
    small_shapes,
    strided_views,
)

pytestmark = pytest.mark.usefixtures("poisoned_empty")


def all_scores(
    gradient: torch.Tensor,
    table: torch.Tensor,
    dtype: torch.dtype,
    bias: torch.Tensor | None,
    forbidden: torch.Tensor | None,
) -> torch.Tensor:
    scores = linear(gradient, table, bias, dtype)
    return scores if forbidden is None else scores.masked_fill(forbidden, -inf)


def check(
    gradient: torch.Tensor,
    table: torch.Tensor,
    k: int,
    impl: str,
    *,
    bias: torch.Tensor | None = None,
    forbidden: torch.Tensor | None = None,
    slack: float = 1.0,
) -> ProjectTopK:
    result = project_topk(gradient, table, k, bias=bias, forbidden=forbidden, impl=impl)
    assert result.scores.dtype == torch.float32 and result.indices.dtype == torch.int64
    assert result.scores.shape == result.indices.shape == (gradient.shape[0], k)
    assert all(tensor.is_contiguous() for tensor in result)
    same_precision, oracle = (
        all_scores(gradient, table, dtype, bias, forbidden) for dtype in (torch.float32, torch.float64)
    )
    assert_selection_within_budget(*result, same_precision, oracle, scale=slack * error_scale(gradient, table, bias))
    return result


def check_exactly(
    gradient: torch.Tensor,
    table: torch.Tensor,
    k: int,
    impl: str,
    *,
    bias: torch.Tensor | None = None,
    forbidden: torch.Tensor | None = None,
) -> ProjectTopK:
    """For inputs whose scores are exact in fp32."""
    result = project_topk(gradient, table, k, bias=bias, forbidden=forbidden, impl=impl)
    oracle = all_scores(gradient, table, torch.float64, bias, forbidden)
    assert_exact_selection(canonical(result.scores), result.indices, canonical(oracle.float()))
    return result


@dtype_pairs
def test_random_inputs(left_dtype: torch.dtype, right_dtype: torch.dtype, impl: str) -> None:
    for positions, vocab, width, k in small_shapes(impl):
        check(*matrices(positions, vocab, width, left_dtype, right_dtype), k, impl)


@pytest.mark.parametrize(
    ("left_dtype", "right_dtype"), [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16)]
)
def test_large_inputs(left_dtype: torch.dtype, right_dtype: torch.dtype, impl: str) -> None:
    for positions, vocab, width, k in large_shapes(impl):
        gradient, table = matrices(positions, vocab, width, left_dtype, right_dtype)
        bias = torch.linspace(-3, 3, vocab)
        check(gradient, table, k, impl, bias=bias, forbidden=(torch.arange(vocab) % 3 == 1) & (bias > 0))


def test_full_vocabulary(impl: str) -> None:
    gradient, table = matrices(few(impl, 3), 128257, 2 if interpreted(impl) else 64, torch.float32, torch.bfloat16)
    check(gradient, table, 64, impl, forbidden=torch.arange(128257) >= 128000)


@dtype_pairs
def test_integers_are_exact(left_dtype: torch.dtype, right_dtype: torch.dtype, impl: str) -> None:
    for positions, vocab, width, k in small_shapes(impl):
        gradient, table = (
            integers(2, positions, width, dtype=left_dtype),
            integers(1, vocab, width, dtype=right_dtype),
        )
        bias, forbidden = integers(20, vocab), integers(3, vocab) == 0
        check_exactly(gradient, table, k, impl)
        check_exactly(gradient, table, k, impl, bias=bias, forbidden=forbidden)


@pytest.mark.parametrize("k", [1, 5, 25, 64, 255, 256])
@pytest.mark.parametrize("vocab", [256, 1031])
def test_every_k_among_ties(vocab: int, k: int, impl: str) -> None:
    gradient, table = integers(1, few(impl, 13), 9, dtype=torch.bfloat16), integers(1, vocab, 9, dtype=torch.bfloat16)
    check_exactly(gradient, table, k, impl)
    check_exactly(gradient.zero_(), table, k, impl)


def test_ascending_and_descending_scores(impl: str) -> None:
    table = torch.arange(5003.0).unsqueeze(1)
    check_exactly(torch.tensor([[1.0], [-1.0], [0.0]]), table, 256, impl)
    check_exactly(torch.ones(2, 1), table - 6000, 256, impl)


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_rows_have_equal_scores(dtype: torch.dtype, kernel_impl: str) -> None:
    gradient, distinct = matrices(few(kernel_impl, 14), 53, 257, dtype, dtype)
    result = project_topk(gradient, distinct.repeat(19, 1), 19 * 5, impl=kernel_impl)
    groups = bitwise(result.scores).view(-1, 5, 19)
    assert torch.equal(groups, groups[:, :, :1].expand_as(groups))
    copies = torch.arange(19) * 53
    assert torch.equal(result.indices.view(-1, 5, 19) - copies, (result.indices % 53).view(-1, 5, 19))


def test_more_of_the_same_row(kernel_impl: str) -> None:
    gradient, table = matrices(few(kernel_impl, 7), 1031, 65, torch.float32, torch.float32)
    longest = project_topk(gradient, table, 256, impl=kernel_impl)
    for k in (1, 5, 25, 64):
        result = project_topk(gradient, table, k, impl=kernel_impl)
        assert torch.equal(result.indices, longest.indices[:, :k])
        assert torch.equal(bitwise(result.scores), bitwise(longest.scores[:, :k]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_and_offsets(dtype: torch.dtype, impl: str) -> None:
    gradient, table = matrices(60, 140, 134, dtype, dtype)
    plain_gradient, plain_table = gradient[:30, :67].contiguous(), table[:70, :67].contiguous()
    for positions in (2,) if interpreted(impl) else (13, 30):
        for view in strided_views(table).values():
            check(plain_gradient[:positions], view, 25, impl)
        for view in strided_views(gradient).values():
            check(view[:positions], plain_table, 25, impl)
        check(amid_nan(plain_gradient[:positions]), amid_nan(plain_table), 25, impl)
    check(gradient[:13, 5:6], table[:70, 7:8], 25, impl)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_bias_of_any_dtype_and_stride(dtype: torch.dtype, impl: str) -> None:
    gradient, table = matrices(5, 257, 33, torch.bfloat16, torch.bfloat16)
    bias = (10 * torch.linspace(-1, 1, 514)).to(dtype)
    for view in (bias[::2], bias[101:358], bias[:1].expand(257)):
        check(gradient, table, 25, impl, bias=view)


def test_small_bias_is_added_in_fp32(impl: str) -> None:
    gradient, table = torch.ones(1, 1, dtype=torch.bfloat16), torch.ones(9, 1, dtype=torch.bfloat16)
    result = check_exactly(gradient, table, 9, impl, bias=torch.arange(9.0) * 2.0**-20)
    assert result.indices.tolist() == [[8, 7, 6, 5, 4, 3, 2, 1, 0]]


@pytest.mark.parametrize(("vocab", "k"), [(31, 7), (257, 25), (5003, 256)])
def test_forbidden(vocab: int, k: int, impl: str) -> None:
    gradient, table = integers(2, few(impl, 13), 9), integers(2, vocab, 9)
    allowed = torch.zeros(vocab, dtype=torch.bool)
    check_exactly(gradient, table, k, impl, forbidden=allowed)
    nothing = check_exactly(gradient, table, k, impl, forbidden=~allowed)
    assert torch.equal(nothing.indices, torch.arange(k).expand(few(impl, 13), k)) and (nothing.scores == -inf).all()
    allowed[torch.arange(k - 1) * 3 + vocab - 3 * k] = True
    too_few = check_exactly(gradient, table, k, impl, forbidden=~allowed)
    assert (
        (too_few.scores[:, -1] == -inf).all()
        and (too_few.indices[:, -1] == 0).all()
        and too_few.scores[:, :-1].isfinite().all()
    )
    allowed[-1] = True
    just_enough = check_exactly(gradient, table, k, impl, forbidden=~allowed)
    assert just_enough.scores.isfinite().all()
    check_exactly(gradient, table, k, impl, forbidden=(~allowed).repeat_interleave(2)[::2])


@pytest.mark.parametrize("value", [nan, inf, -inf])
def test_forbidden_hides_whatever_the_row_and_the_bias_hold(value: float, impl: str) -> None:
    gradient, table = integers(2, few(impl, 13), 9), integers(2, 257, 9)
    forbidden = torch.arange(257) % 5 == 0
    bias = integers(5, 257)
    expected = project_topk(gradient, table, 25, bias=bias, forbidden=forbidden, impl=impl)
    for changed_table, changed_bias in (
        (table.masked_fill(forbidden.unsqueeze(1), value), bias),
        (table, bias.masked_fill(forbidden, value)),
    ):
        result = project_topk(gradient, changed_table, 25, bias=changed_bias, forbidden=forbidden, impl=impl)
        assert torch.equal(result.indices, expected.indices) and torch.equal(result.scores, expected.scores)


@dtype_pairs
def test_infinities_and_nan(left_dtype: torch.dtype, right_dtype: torch.dtype, impl: str) -> None:
    for positions, vocab in ((2, 97),) if interpreted(impl) else ((14, 1031), (33, 97)):
        gradient, table = integers(2, positions, 35, dtype=left_dtype), integers(2, vocab, 35, dtype=right_dtype)
        bias = integers(9, vocab)
        for value in (nan, inf, -inf):
            spoilt_gradient, spoilt_table, spoilt_bias = gradient.clone(), table.clone(), bias.clone()
            spoilt_gradient[positions // 2, 34] = spoilt_gradient[-1, 0] = value
            spoilt_table[::13, 34] = spoilt_table[7, 0] = value
            spoilt_bias[1::11] = value
            check_exactly(spoilt_gradient, table, 25, impl, bias=bias)
            check_exactly(gradient, spoilt_table, 25, impl, bias=bias)
            check_exactly(gradient, table, 25, impl, bias=spoilt_bias)
            check_exactly(spoilt_gradient, spoilt_table, 64, impl, bias=spoilt_bias, forbidden=bias > 0)


def test_bias_of_minus_infinity_ties_with_forbidden(impl: str) -> None:
    bias = torch.tensor([-inf, 1.0, 0.0, -inf, 0.0])
    forbidden = torch.tensor([False, False, True, False, True])
    result = project_topk(torch.zeros(1, 3), torch.ones(5, 3), 5, bias=bias, forbidden=forbidden, impl=impl)
    assert result.indices.tolist() == [[1, 0, 2, 3, 4]]
    assert result.scores.tolist() == [[1.0, -inf, -inf, -inf, -inf]]


def test_width_zero_leaves_the_bias(impl: str) -> None:
    gradient, table = torch.randn(few(impl, 13), 0), torch.randn(70, 0)
    check_exactly(gradient, table, 25, impl)
    check_exactly(gradient, table, 25, impl, bias=integers(9, 70))


def test_nearest_rows(impl: str) -> None:
    points, table = matrices(few(impl, 20), 1031, 64, torch.float32, torch.float32)
    points[:2] = table[100:102] + 1e-3
    result = project_topk(points, table, 5, bias=-0.5 * table.square().sum(1), impl=impl)
    nearest = torch.cdist(points.double(), table.double()).sort(dim=1)
    # Distances differ by far more than rounding here.
    assert torch.equal(result.indices, nearest.indices[:, :5])


def test_smallest_by_negation(impl: str) -> None:
    gradient, table, bias = integers(2, few(impl, 13), 9), integers(2, 257, 9), integers(5, 257)
    result = project_topk(-gradient, table, 25, bias=-bias, impl=impl)
    smallest = linear(gradient, table, bias, torch.float64).sort(dim=1, stable=True)
    assert torch.equal(result.indices, smallest.indices[:, :25])
    assert torch.equal(-result.scores.double(), smallest.values[:, :25])


@pytest.mark.parametrize(("left_dtype", "right_dtype"), [*zip(DTYPES, DTYPES, strict=True), DTYPES[:2]])
def test_result_is_bitwise_the_same_for_any_batch_and_thread_count(
    left_dtype: torch.dtype, right_dtype: torch.dtype, kernel_impl: str
) -> None:
    parts = ((0, 33), (0, 1), (7, 12), (11, 25), (20, 33), (32, 33))
    if interpreted(kernel_impl):
        # As many as take two blocks in fp32.
        parts = ((0, 19), (0, 1), (15, 18), (18, 19))
    gradient, table = matrices(parts[0][1], 1031, 257, left_dtype, right_dtype)
    bias, forbidden = torch.linspace(-1, 1, 1031), torch.arange(1031) % 7 == 0
    whole = project_topk(gradient, table, 25, bias=bias, forbidden=forbidden, impl=kernel_impl)
    for threads in thread_counts(kernel_impl, 1, 2, 3, 8):
        with on_threads(threads):
            for first, last in parts:
                part = project_topk(gradient[first:last], table, 25, bias=bias, forbidden=forbidden, impl=kernel_impl)
                assert torch.equal(part.indices, whole.indices[first:last])
                assert torch.equal(bitwise(part.scores), bitwise(whole.scores[first:last]))


@pytest.mark.parametrize("k", [25, 256])
def test_slabs_change_no_bit(k: int, triton_impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gradient, table = matrices(2, 2 * 4096 + 5, 9, torch.float32, torch.float32)
    table = table.round()
    gradient[0] = gradient[0].round()
    whole = check(gradient, table, k, triton_impl)
    # As with many thousands of positions; the last slab has fewer columns than are selected.
    monkeypatch.setattr("ggro_kernels.triton_parts.projection.SCORES", 1)
    assert_bitwise_equal(check(gradient, table, k, triton_impl), whole)


def test_special_rows_shared_between_threads(native_impl: str) -> None:
    gradient, table = integers(2, 1, 9), integers(2, 9001, 9)
    with on_threads(4):
        for value in (nan, inf, -inf):
            table[::3000] = value
            check_exactly(gradient, table, 25, native_impl)
            check_exactly(gradient, table, 25, native_impl, forbidden=torch.arange(9001) < 8990)


@pytest.mark.parametrize("dtypes", [(torch.float64, torch.float64), (torch.float32, torch.float64)])
def test_fp64_goes_through_the_reference(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    gradient, table = matrices(3, 257, 64, *dtypes)
    bias = torch.linspace(-1, 1, 257, dtype=torch.float64)
    result = project_topk(gradient, table, 25, bias=bias)
    assert result.scores.dtype == torch.float64
    oracle = linear(gradient, table, bias, torch.float64)
    assert_selection_within_budget(*result, oracle, oracle, scale=error_scale(gradient, table))


def test_fp64_bias_alone_stays_native(impl: str) -> None:
    gradient, table = matrices(3, 50, 64, torch.float32, torch.float32)
    assert check(gradient, table, 5, impl, bias=torch.ones(50, dtype=torch.float64)).scores.dtype == torch.float32


def test_outputs_are_detached(impl: str) -> None:
    gradient, table = matrices(3, 50, 64, torch.float32, torch.float32)
    bias = torch.zeros(50, dtype=torch.float64, requires_grad=True)
    result = project_topk(gradient.requires_grad_(), table.requires_grad_(), 5, bias=bias, impl=impl)
    assert not any(tensor.requires_grad for tensor in result)


GRADIENT, TABLE = torch.randn(2, 4), torch.randn(9, 4)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (([1.0], TABLE, 1), {}, TypeError, r"gradient must be a torch\.Tensor, got list"),
        ((GRADIENT[0], TABLE, 1), {}, ValueError, r"gradient must have shape \[P, d\], got \[4\]"),
        ((GRADIENT, TABLE[0], 1), {}, ValueError, r"table must have shape \[V, d\], got \[4\]"),
        ((GRADIENT, TABLE.to("meta"), 1), {}, ValueError, "table must be on cpu as the other tensors, got meta"),
        ((GRADIENT.long(), TABLE, 1), {}, TypeError, r"gradient must be float32.*got torch\.int64"),
        ((GRADIENT, TABLE.int(), 1), {}, TypeError, r"table must be float32.*got torch\.int32"),
        ((GRADIENT, TABLE[:, :3], 1), {}, ValueError, r"table must have the gradient's width d=4, got shape \[9, 3\]"),
        ((GRADIENT, TABLE, 0), {}, ValueError, r"k must be in 1 \.\. min\(256, V=9\), got 0"),
        ((GRADIENT, TABLE, 10), {}, ValueError, "k must be in .*got 10"),
        ((GRADIENT, torch.randn(300, 4), 257), {}, ValueError, "k must be in .*got 257"),
        ((GRADIENT, TABLE[:0], 1), {}, ValueError, "k must be in .*V=0"),
        ((GRADIENT, TABLE, 2.0), {}, TypeError, "k must be an int, got float"),
        ((GRADIENT, TABLE, True), {}, TypeError, "k must be an int, got bool"),
        ((GRADIENT, TABLE, 1), {"bias": 0.5}, TypeError, r"bias must be a torch\.Tensor, got float"),
        ((GRADIENT, TABLE, 1), {"bias": TABLE}, ValueError, r"bias must have shape \[V\], got \[9, 4\]"),
        ((GRADIENT, TABLE, 1), {"bias": TABLE[:8, 0]}, ValueError, r"bias must have one entry per token, V=9, got .*8"),
        ((GRADIENT, TABLE, 1), {"bias": torch.arange(9)}, TypeError, r"bias must be float32.*got torch\.int64"),
        ((GRADIENT, TABLE, 1), {"bias": torch.ones(9, device="meta")}, ValueError, "bias must be on cpu .*got meta"),
        ((GRADIENT, TABLE, 1), {"forbidden": torch.arange(9)}, TypeError, r"forbidden must be bool, got torch\.int64"),
        ((GRADIENT, TABLE, 1), {"forbidden": [3]}, TypeError, r"forbidden must be a torch\.Tensor, got list"),
        ((GRADIENT, TABLE, 1), {"forbidden": TABLE[:2, 0] > 0}, ValueError, r"forbidden must have one entry per token"),
    ],
)
def test_bad_arguments(arguments: tuple, options: dict, error: type[Exception], message: str, impl: str) -> None:
    with pytest.raises(error, match=message):
        project_topk(*arguments, **options, impl=impl)
