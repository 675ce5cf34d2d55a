"""candidate_scores through every implementation."""

import importlib

import pytest
import torch

from ggro_kernels.testing import assert_within_budget, bitwise
from tests.ggro_kernels.implementations import on_threads, select, thread_counts
from tests.ggro_kernels.op_calls import OpCalls
from tests.ggro_kernels.placed import candidate_scores

pytestmark = pytest.mark.usefixtures("poisoned_empty")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def inputs(
    positions: int, vocab: int, width: int, candidates: int, gradient_dtype: torch.dtype, table_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(positions + vocab + width + candidates)
    gradient = torch.randn(positions, width, generator=generator).to(gradient_dtype)
    table = torch.randn(vocab, width, generator=generator).to(table_dtype)
    ids = torch.randint(vocab, (positions, candidates), generator=generator)
    return gradient, table, ids


def project(gradient: torch.Tensor, table: torch.Tensor, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The full projection, then its entries at the ids."""
    return (gradient.to(dtype) @ table.to(dtype).t()).gather(1, ids)


def check(gradient: torch.Tensor, table: torch.Tensor, ids: torch.Tensor, impl: str) -> torch.Tensor:
    scores = candidate_scores(gradient, table, ids, impl=impl)
    assert scores.dtype == torch.float32 and scores.is_contiguous()
    same_precision, oracle = (project(gradient, table, ids, dtype) for dtype in (torch.float32, torch.float64))
    magnitude = project(gradient.abs(), table.abs(), ids, torch.float64).max().item()
    assert_within_budget(scores, same_precision, oracle, scale=magnitude, what="scores")
    return scores


@pytest.mark.parametrize("gradient_dtype", DTYPES)
@pytest.mark.parametrize("table_dtype", DTYPES)
def test_random_inputs(gradient_dtype: torch.dtype, table_dtype: torch.dtype, impl: str) -> None:
    for positions, width, candidates in ((1, 1, 1), (2, 7, 5), (3, 64, 25), (20, 100, 25), (5, 257, 3), (2, 1024, 256)):
        check(*inputs(positions, 301, width, candidates, gradient_dtype, table_dtype), impl)


@pytest.mark.parametrize(("positions", "width", "candidates"), [(0, 8, 5), (3, 8, 0), (0, 8, 0)])
def test_nothing_to_score(positions: int, width: int, candidates: int, impl: str) -> None:
    gradient, table, ids = inputs(positions, 11, width, candidates, torch.float32, torch.float32)
    assert candidate_scores(gradient, table, ids, impl=impl).shape == (positions, candidates)


def test_width_zero_gives_zero(impl: str) -> None:
    scores = candidate_scores(torch.randn(2, 0), torch.randn(5, 0), torch.zeros(2, 3, dtype=torch.int64), impl=impl)
    assert torch.equal(scores, torch.zeros(2, 3))


@pytest.mark.parametrize("dtype", DTYPES)
def test_integers_are_exact(dtype: torch.dtype, impl: str) -> None:
    generator = torch.Generator().manual_seed(3)
    gradient = torch.randint(-8, 9, (6, 333), generator=generator).to(dtype)
    table = torch.randint(-8, 9, (97, 333), generator=generator).to(dtype)
    ids = torch.randint(97, (6, 25), generator=generator)
    scores = candidate_scores(gradient, table, ids, impl=impl)
    assert torch.equal(scores.double(), project(gradient, table, ids, torch.float64))


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_and_offsets(dtype: torch.dtype, impl: str) -> None:
    gradient, table, ids = inputs(8, 120, 130, 9, dtype, dtype)
    check(gradient[::2, 1:100], table[5:, 1:100], ids[::2].clamp(max=100), impl)
    check(gradient[:, ::2], table[:, ::2], ids, impl)
    check(gradient[:, :40].t().contiguous().t(), table[::3, 3:43], ids.clamp(max=39)[:, ::2], impl)
    check(gradient[:1].expand(8, -1), table[:1].expand(120, -1), ids.t().contiguous().t(), impl)


def test_infinities_and_nan_pass_through(impl: str) -> None:
    gradient = torch.tensor([[1.0, 2.0, 0.0]])
    table = torch.tensor([[torch.inf, 1.0, 1.0], [torch.nan, 0.0, 0.0], [1.0, 1.0, torch.inf], [-torch.inf, 0.0, 0.0]])
    scores = candidate_scores(gradient, table, torch.tensor([[0, 1, 2, 3]]), impl=impl)[0]
    assert scores[0] == torch.inf and scores[1].isnan() and scores[2].isnan() and scores[3] == -torch.inf


@pytest.mark.parametrize("dtype", DTYPES)
def test_result_is_bitwise_the_same_for_any_batch_and_thread_count(dtype: torch.dtype, kernel_impl: str) -> None:
    gradient, table, ids = inputs(20, 500, 1031, 25, torch.float32, dtype)
    whole = bitwise(candidate_scores(gradient, table, ids, impl=kernel_impl))
    for threads in thread_counts(kernel_impl, 1, 2, 3, 8):
        with on_threads(threads):
            for first, last in ((0, 20), (0, 1), (7, 12), (19, 20)):
                part = candidate_scores(gradient[first:last], table, ids[first:last], impl=kernel_impl)
                assert torch.equal(bitwise(part), whole[first:last])
                one = candidate_scores(gradient[first:last], table, ids[first:last, 3:4], impl=kernel_impl)
                assert torch.equal(bitwise(one), whole[first:last, 3:4])


@pytest.mark.parametrize("dtypes", [(torch.float64, torch.float64), (torch.float32, torch.float64)])
def test_fp64_goes_through_the_reference(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    gradient, table, ids = inputs(3, 50, 64, 5, *dtypes)
    scores = candidate_scores(gradient, table, ids)
    assert scores.dtype == torch.float64
    torch.testing.assert_close(scores, project(gradient, table, ids, torch.float64), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("gradient_dtype", DTYPES)
@pytest.mark.parametrize("table_dtype", DTYPES)
def test_gradients(gradient_dtype: torch.dtype, table_dtype: torch.dtype, impl: str) -> None:
    gradient, table, ids = inputs(6, 11, 33, 9, gradient_dtype, table_dtype)
    weights = torch.randn(6, 9, generator=torch.Generator().manual_seed(5))

    def gradients(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in (gradient, table)]
        return torch.autograd.grad((project(*leaves, ids, dtype) * weights.to(dtype)).sum(), leaves)

    leaves = gradient.requires_grad_(), table.requires_grad_()
    actual = torch.autograd.grad((candidate_scores(*leaves, ids, impl=impl) * weights).sum(), leaves)
    for name, result, *expected in zip(
        ("gradient", "table"), actual, gradients(torch.float32), gradients(torch.float64), strict=True
    ):
        assert result.dtype == (gradient_dtype if name == "gradient" else table_dtype) and result.is_contiguous()
        assert_within_budget(result, *expected, scale=10.0, what=name)


def test_gradcheck_in_fp64() -> None:
    gradient, table, ids = inputs(3, 7, 5, 4, torch.float64, torch.float64)
    leaves = gradient.requires_grad_(), table.requires_grad_()
    assert torch.autograd.gradcheck(lambda gradient, table: candidate_scores(gradient, table, ids), leaves)


def test_only_the_gradients_needed_are_computed(impl: str) -> None:
    for needed in range(2):
        *leaves, ids = inputs(3, 50, 64, 5, torch.float32, torch.float32)
        leaves[needed].requires_grad_()
        with OpCalls() as recorder:
            candidate_scores(*leaves, ids, impl=impl).sum().backward()
        computed = ("candidate_scores_gradient_gradient", "candidate_scores_table_gradient")[needed]
        assert [func._schema.name.split("::")[1] for func, _ in recorder.calls] == ["candidate_scores", computed]


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_are_bitwise_the_same_for_any_thread_count(dtype: torch.dtype) -> None:
    gradient, table, ids = inputs(64, 10, 512, 25, torch.float32, dtype)
    leaves = gradient.requires_grad_(), table.requires_grad_()
    weights = torch.randn(64, 25, generator=torch.Generator().manual_seed(5))
    alone = torch.autograd.grad((candidate_scores(*leaves, ids) * weights).sum(), leaves)
    for threads in (2, 3, 8):
        with on_threads(threads):
            again = torch.autograd.grad((candidate_scores(*leaves, ids) * weights).sum(), leaves)
            assert all(torch.equal(bitwise(a), bitwise(b)) for a, b in zip(again, alone, strict=True))


@pytest.mark.parametrize("bad_id", [-1, 50, 2**40])
def test_id_outside_the_table(bad_id: int, checking_impl: str) -> None:
    gradient, table, ids = inputs(3, 50, 64, 5, torch.float32, torch.float32)
    ids[1, 4] = bad_id
    with pytest.raises(IndexError, match=rf"ids\[1, 4\] must be in 0 \.\. 49, the rows of the table, got {bad_id}"):
        candidate_scores(gradient, table, ids, impl=checking_impl)


@pytest.mark.parametrize("bad_id", [-1, 50, 2**40])
def test_score_of_an_unchecked_id_outside_the_table_is_nan(bad_id: int, monkeypatch: pytest.MonkeyPatch) -> None:
    impl = select("triton", monkeypatch)
    gradient, table, ids = inputs(3, 50, 64, 5, torch.float32, torch.float32)
    expected = candidate_scores(gradient, table, ids, impl=impl)
    kernel = importlib.import_module("ggro_kernels.candidate_scores.triton")
    monkeypatch.setattr(kernel, "check_indices", lambda *_: None)
    ids[1, 4], expected[1, 4] = bad_id, torch.nan
    scores = candidate_scores(gradient, table, ids, impl=impl)
    torch.testing.assert_close(scores, expected, rtol=0, atol=0, equal_nan=True)


GRADIENT, TABLE, IDS = torch.randn(2, 4), torch.randn(9, 4), torch.zeros(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1.0], TABLE, IDS), TypeError, r"gradient must be a torch\.Tensor, got list"),
        ((GRADIENT[0], TABLE, IDS), ValueError, r"gradient must have shape \[P, d\], got \[4\]"),
        ((GRADIENT, TABLE[0], IDS), ValueError, r"table must have shape \[V, d\], got \[4\]"),
        ((GRADIENT, TABLE, IDS[0]), ValueError, r"ids must have shape \[P, k\], got \[3\]"),
        ((GRADIENT, TABLE, IDS.to("meta")), ValueError, "ids must be on cpu as the other tensors, got meta"),
        ((GRADIENT.long(), TABLE, IDS), TypeError, r"gradient must be float32.*got torch\.int64"),
        ((GRADIENT, TABLE.int(), IDS), TypeError, r"table must be float32.*got torch\.int32"),
        ((GRADIENT, TABLE, IDS.int()), TypeError, r"ids must be int64, got torch\.int32"),
        ((GRADIENT, TABLE[:, :3], IDS), ValueError, r"table must have the gradient's width d=4, got shape \[9, 3\]"),
        ((GRADIENT, TABLE, IDS[:1]), ValueError, r"ids must have one row per gradient row, P=2, got shape \[1, 3\]"),
    ],
)
def test_bad_arguments(arguments: tuple, error: type[Exception], message: str, impl: str) -> None:
    with pytest.raises(error, match=message):
        candidate_scores(*arguments, impl=impl)
