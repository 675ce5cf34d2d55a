"""lm_head_entropy_topk, each line of its contract, through every implementation."""

import math

import pytest
import torch
from torch import inf, nan

from ggro_kernels import EntropyTopK
from ggro_kernels.testing import (
    assert_exact_selection,
    assert_selection_within_budget,
    assert_within_budget,
    bitwise,
)
from tests.ggro_kernels.implementations import on_threads, thread_counts
from tests.ggro_kernels.op_calls import assert_bitwise_equal
from tests.ggro_kernels.placed import entropy_topk, lm_head_entropy_topk
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
from tests.ggro_kernels.test_entropy_topk import torch_statistics

pytestmark = pytest.mark.usefixtures("poisoned_empty")


def all_logits(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    dtype: torch.dtype,
    bias: torch.Tensor | None,
    softcap: float | None,
) -> torch.Tensor:
    logits = linear(hidden, weight, bias, dtype)
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def entropy_sensitivity(x: torch.Tensor) -> float:
    """The most that the entropy of a row of softmax(x) changes per change of its logits: sum p |log p + H|."""
    p, log_p = x.softmax(1), x.log_softmax(1)
    terms = p * (log_p + torch.special.entr(p).sum(1, keepdim=True)).abs()
    return terms.nan_to_num(nan=0.0).sum(1).max().item() if len(x) else 0.0


def check(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    k: int,
    impl: str,
    *,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
    temperature: float = 1.0,
    slack: float = 1.0,
) -> EntropyTopK:
    result = lm_head_entropy_topk(hidden, weight, k, bias=bias, softcap=softcap, temperature=temperature, impl=impl)
    rows = hidden.shape[0]
    assert result.entropy.dtype == result.logsumexp.dtype == result.values.dtype == torch.float32
    assert result.entropy.shape == result.logsumexp.shape == (rows,)
    assert result.indices.dtype == torch.int64 and result.values.shape == result.indices.shape == (rows, k)
    assert all(tensor.is_contiguous() for tensor in result)

    same_precision, oracle = (
        all_logits(hidden, weight, dtype, bias, softcap) for dtype in (torch.float32, torch.float64)
    )
    # Besides the sum, the cap rounds a quotient, a hyperbolic tangent and a product.
    scale = slack * error_scale(hidden, weight, bias) * (1 if softcap is None else 2)
    assert_selection_within_budget(result.values, result.indices, same_precision, oracle, scale=scale, what="logits")

    same_precision, oracle = same_precision / temperature, oracle / temperature
    (torch_entropy, torch_logsumexp), (entropy, logsumexp) = torch_statistics(same_precision), torch_statistics(oracle)
    scale = max(1.0, scale / temperature)
    assert_within_budget(result.logsumexp, torch_logsumexp, logsumexp, scale=scale, what="logsumexp")
    scale = max(1.0, scale * entropy_sensitivity(oracle))
    assert_within_budget(result.entropy, torch_entropy, entropy, scale=scale, what="entropy")
    return result


def check_exactly(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    k: int,
    impl: str,
    *,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
) -> EntropyTopK:
    """For inputs whose logits are exact in fp32."""
    result = check(hidden, weight, k, impl, bias=bias, softcap=softcap)
    oracle = all_logits(hidden, weight, torch.float64, bias, softcap)
    assert_exact_selection(canonical(result.values), result.indices, canonical(oracle.float()))
    return result


@dtype_pairs
def test_random_inputs(left_dtype: torch.dtype, right_dtype: torch.dtype, impl: str) -> None:
    for rows, vocab, width, k in small_shapes(impl):
        check(*matrices(rows, vocab, width, left_dtype, right_dtype), k, impl)


@pytest.mark.parametrize(
    ("left_dtype", "right_dtype"), [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16)]
)
def test_large_inputs(left_dtype: torch.dtype, right_dtype: torch.dtype, impl: str) -> None:
    for rows, vocab, width, k in large_shapes(impl):
        hidden, weight = matrices(rows, vocab, width, left_dtype, right_dtype)
        bias = torch.linspace(-3, 3, vocab)
        check(hidden / width**0.5, weight, k, impl, bias=bias, softcap=5.0, temperature=0.7)


def test_full_vocabulary(impl: str) -> None:
    hidden, weight = matrices(few(impl, 3), 128257, 2 if interpreted(impl) else 64, torch.float32, torch.bfloat16)
    check(hidden / 4, weight, 64, impl)


@dtype_pairs
def test_integers_are_exact(left_dtype: torch.dtype, right_dtype: torch.dtype, impl: str) -> None:
    for rows, vocab, width, k in small_shapes(impl):
        hidden, weight = integers(2, rows, width, dtype=left_dtype), integers(1, vocab, width, dtype=right_dtype)
        check_exactly(hidden, weight, k, impl)
        check_exactly(hidden, weight, k, impl, bias=integers(20, vocab))


@pytest.mark.parametrize("k", [1, 5, 25, 64, 255, 256])
@pytest.mark.parametrize("vocab", [256, 1031])
def test_every_k_among_ties(vocab: int, k: int, impl: str) -> None:
    hidden, weight = integers(1, few(impl, 13), 9, dtype=torch.bfloat16), integers(1, vocab, 9, dtype=torch.bfloat16)
    check_exactly(hidden, weight, k, impl)
    uniform = check_exactly(hidden.zero_(), weight, k, impl)
    torch.testing.assert_close(uniform.entropy, torch.full((few(impl, 13),), math.log(vocab)), rtol=1e-6, atol=0)


def test_ascending_and_descending_logits(impl: str) -> None:
    weight = torch.arange(5003.0).unsqueeze(1)
    check_exactly(torch.tensor([[1.0], [-1.0], [0.0]]), weight, 256, impl)
    check_exactly(torch.ones(2, 1), weight - 6000, 256, impl)


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_rows_have_equal_logits(dtype: torch.dtype, kernel_impl: str) -> None:
    hidden, distinct = matrices(few(kernel_impl, 14), 53, 257, dtype, dtype)
    for softcap in (None, 20.0):
        result = lm_head_entropy_topk(hidden, distinct.repeat(19, 1), 19 * 5, softcap=softcap, impl=kernel_impl)
        groups = bitwise(result.values).view(-1, 5, 19)
        assert torch.equal(groups, groups[:, :, :1].expand_as(groups))
        if softcap is None:
            copies = torch.arange(19) * 53
            assert torch.equal(result.indices.view(-1, 5, 19) - copies, (result.indices % 53).view(-1, 5, 19))


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_and_offsets(dtype: torch.dtype, impl: str) -> None:
    hidden, weight = matrices(60, 140, 134, dtype, dtype)
    hidden = hidden / 8
    plain_hidden, plain_weight = hidden[:30, :67].contiguous(), weight[:70, :67].contiguous()
    for rows in (2,) if interpreted(impl) else (13, 30):
        for view in strided_views(weight).values():
            check(plain_hidden[:rows], view, 25, impl)
        for view in strided_views(hidden).values():
            check(view[:rows], plain_weight, 25, impl)
        check(amid_nan(plain_hidden[:rows]), amid_nan(plain_weight), 25, impl)
    check(hidden[:13, 5:6], weight[:70, 7:8], 25, impl)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_bias_of_any_dtype_and_stride(dtype: torch.dtype, impl: str) -> None:
    hidden, weight = matrices(5, 257, 33, torch.bfloat16, torch.bfloat16)
    bias = (10 * torch.linspace(-1, 1, 514)).to(dtype)
    for view in (bias[::2], bias[101:358], bias[:1].expand(257)):
        check(hidden, weight, 25, impl, bias=view)


def test_logits_are_not_rounded_to_bf16(impl: str) -> None:
    hidden, weight = torch.ones(1, 2, dtype=torch.bfloat16), torch.ones(9, 2, dtype=torch.bfloat16)
    weight[:, 1] = torch.arange(9) * 2.0**-20
    result = check_exactly(hidden, weight, 9, impl)
    assert result.indices.tolist() == [[8, 7, 6, 5, 4, 3, 2, 1, 0]]
    check_exactly(hidden, weight, 9, impl, bias=torch.arange(9).flip(0) * 2.0**-19)


@pytest.mark.parametrize("softcap", [0.1, 1.0, 30.0, 1e4, 1e30])
@pytest.mark.parametrize("dtype", DTYPES)
def test_softcap(softcap: float, dtype: torch.dtype, impl: str) -> None:
    hidden, weight = matrices(few(impl, 13), 1031, 65, dtype, dtype)
    for factor in (0.01, 1.0):
        check(hidden * factor, weight, 25, impl, softcap=softcap)
        check(hidden * factor, weight, 25, impl, softcap=softcap, bias=torch.linspace(-40, 40, 1031))


def test_softcap_of_every_argument(impl: str) -> None:
    arguments = torch.linspace(-12, 12, 4001)
    for part in arguments.split(1001 if interpreted(impl) else 256):
        part = part[-256:]
        for scale in (1e-12, 1e-4, 0.05, 1.0):
            result = lm_head_entropy_topk(torch.ones(1, 1), part[:, None] * scale, len(part), softcap=1.0, impl=impl)
            capped = torch.empty(len(part)).scatter(0, result.indices[0], result.values[0])
            torch.testing.assert_close(capped.double(), (part * scale).double().tanh(), rtol=4e-7, atol=0)
        part = part[: few(impl, 256)]
        result = lm_head_entropy_topk(part[:, None], torch.ones(1, 1), 1, softcap=1.0, impl=impl)
        torch.testing.assert_close(result.values[:, 0].double(), part.double().tanh(), rtol=4e-7, atol=0)


def test_softcap_makes_ties_of_extreme_logits(impl: str) -> None:
    hidden, weight = integers(2, few(impl, 13), 9), 64 * integers(2, 1031, 9)
    for bias in (None, 64 * integers(5, 1031)):
        result = check_exactly(hidden, weight, 64, impl, bias=bias, softcap=1.0)
        assert set(result.values.abs().unique().tolist()) <= {0.0, 1.0}
    hidden[:, 0] = 3e38
    result = check_exactly(hidden, weight, 64, impl, softcap=30.0)
    assert (result.values == 30.0).all()


@pytest.mark.parametrize("temperature", [0.05, 0.7, 2.0, 100.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_temperature(temperature: float, dtype: torch.dtype, impl: str) -> None:
    hidden, weight = matrices(few(impl, 13), 1031, 65, dtype, dtype)
    bias = torch.where(torch.arange(1031) % 3 == 0, -inf, 0.5)
    result = check(hidden / 8, weight, 25, impl, bias=bias, temperature=temperature)
    unscaled = lm_head_entropy_topk(hidden / 8, weight, 25, bias=bias, impl=impl)
    assert torch.equal(result.indices, unscaled.indices) and torch.equal(result.values, unscaled.values)


@pytest.mark.parametrize("temperature", [1e-30, 1e30])
def test_extreme_temperatures(temperature: float, kernel_impl: str) -> None:
    weight = torch.tensor([[1.0], [3.0], [2.0]])
    result = lm_head_entropy_topk(torch.ones(1, 1), weight, 1, temperature=temperature, impl=kernel_impl)
    assert result.entropy.item() == pytest.approx(0.0 if temperature < 1 else math.log(3), abs=1e-6)


def test_large_and_peaked_logits(impl: str) -> None:
    hidden, weight = matrices(few(impl, 13), 1031, 65, torch.float32, torch.float32)
    check(hidden * 100, weight, 25, impl)
    check(hidden, weight, 25, impl, bias=torch.full((1031,), -30000.0))
    check(hidden, weight, 25, impl, bias=torch.full((1031,), 30000.0))
    peak = torch.zeros(1031)
    peak[777] = 200.0
    result = check(hidden, weight, 25, impl, bias=peak)
    assert (result.indices[:, 0] == 777).all()


def test_entropy_of_shuffled_weight(impl: str) -> None:
    hidden, weight = matrices(5, 5003, 65, torch.float32, torch.float32)
    order = torch.randperm(5003, generator=torch.Generator().manual_seed(1))
    plain, shuffled = (lm_head_entropy_topk(hidden / 8, w, 25, impl=impl) for w in (weight, weight[order]))
    torch.testing.assert_close(shuffled.entropy, plain.entropy, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(shuffled.logsumexp, plain.logsumexp, rtol=1e-6, atol=1e-6)


def test_agrees_with_entropy_topk_of_the_logits(impl: str) -> None:
    hidden, weight = integers(2, few(impl, 13), 9), integers(2, 5003, 9)
    result = lm_head_entropy_topk(hidden, weight, 25, temperature=3.0, impl=impl)
    expected = entropy_topk(hidden @ weight.t(), 25, temperature=3.0, impl=impl)
    assert torch.equal(result.indices, expected.indices) and torch.equal(result.values, expected.values)
    torch.testing.assert_close(result.entropy, expected.entropy, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(result.logsumexp, expected.logsumexp, rtol=1e-6, atol=1e-6)


@dtype_pairs
def test_infinities_and_nan(left_dtype: torch.dtype, right_dtype: torch.dtype, impl: str) -> None:
    for rows, vocab in ((2, 97),) if interpreted(impl) else ((14, 1031), (33, 97)):
        hidden, weight = integers(2, rows, 35, dtype=left_dtype), integers(2, vocab, 35, dtype=right_dtype)
        bias = integers(9, vocab)
        for value in (nan, inf, -inf):
            spoilt_hidden, spoilt_weight, spoilt_bias = hidden.clone(), weight.clone(), bias.clone()
            spoilt_hidden[rows // 2, 34] = spoilt_hidden[-1, 0] = value
            spoilt_weight[::13, 34] = spoilt_weight[7, 0] = value
            spoilt_bias[1::11] = value
            check_exactly(spoilt_hidden, weight, 25, impl, bias=bias)
            check_exactly(hidden, spoilt_weight, 25, impl, bias=bias)
            check_exactly(hidden, weight, 25, impl, bias=spoilt_bias)
            check_exactly(spoilt_hidden, spoilt_weight, 64, impl, bias=spoilt_bias)
            check(hidden, spoilt_weight, 25, impl, bias=spoilt_bias, softcap=8.0)


@pytest.mark.parametrize("vocab", [31, 5003])
def test_special_rows_have_the_stated_results(vocab: int, impl: str) -> None:
    hidden, weight = integers(2, few(impl, 13), 9), integers(2, vocab, 9)
    masked = check_exactly(hidden, weight, 5, impl, bias=torch.full((vocab,), -inf))
    assert (masked.logsumexp == -inf).all() and masked.entropy.isnan().all()
    assert torch.equal(masked.indices, torch.arange(5).expand(few(impl, 13), 5)) and (masked.values == -inf).all()

    bias = torch.full((vocab,), -inf)
    bias[vocab - 2] = 7.0
    one = check_exactly(hidden, weight, 5, impl, bias=bias)
    assert (one.entropy == 0.0).all() and torch.equal(one.logsumexp, one.values[:, 0])
    assert torch.equal(one.indices, torch.tensor([vocab - 2, 0, 1, 2, 3]).expand(few(impl, 13), 5))

    bias[vocab // 2] = inf
    infinite = check_exactly(hidden, weight, 5, impl, bias=bias)
    assert (infinite.logsumexp == inf).all() and infinite.entropy.isnan().all()
    assert (infinite.indices[:, 0] == vocab // 2).all()

    bias[vocab - 1] = nan
    not_a_number = check_exactly(hidden, weight, 5, impl, bias=bias)
    assert not_a_number.logsumexp.isnan().all() and not_a_number.entropy.isnan().all()
    assert torch.equal(not_a_number.indices[:, :2], torch.tensor([vocab - 1, vocab // 2]).expand(few(impl, 13), 2))


def test_softcap_turns_infinities_into_the_cap(impl: str) -> None:
    bias = torch.tensor([-inf, inf, 0.0])
    result = check_exactly(torch.zeros(1, 4), torch.zeros(3, 4), 3, impl, bias=bias, softcap=2.0)
    assert result.values.tolist() == [[2.0, 0.0, -2.0]]


def test_width_zero_leaves_the_bias(impl: str) -> None:
    hidden, weight = torch.randn(few(impl, 13), 0), torch.randn(70, 0)
    check_exactly(hidden, weight, 25, impl)
    check_exactly(hidden, weight, 25, impl, bias=integers(9, 70))


@pytest.mark.parametrize(("left_dtype", "right_dtype"), [*zip(DTYPES, DTYPES, strict=True), DTYPES[:2]])
def test_result_is_bitwise_the_same_for_any_batch_and_thread_count(
    left_dtype: torch.dtype, right_dtype: torch.dtype, kernel_impl: str
) -> None:
    parts = ((0, 33), (0, 1), (7, 12), (11, 25), (20, 33), (32, 33))
    if interpreted(kernel_impl):
        # As many as take two blocks in fp32.
        parts = ((0, 19), (0, 1), (15, 18), (18, 19))
    hidden, weight = matrices(parts[0][1], 2603, 257, left_dtype, right_dtype)
    hidden = hidden / 8
    options = {"bias": torch.linspace(-1, 1, 2603), "softcap": 5.0, "temperature": 0.7, "impl": kernel_impl}
    whole = lm_head_entropy_topk(hidden, weight, 25, **options)
    for threads in thread_counts(kernel_impl, 1, 2, 3, 8):
        with on_threads(threads):
            for first, last in parts:
                part = lm_head_entropy_topk(hidden[first:last], weight, 25, **options)
                assert_bitwise_equal(part, [x[first:last] for x in whole])


def test_slabs_change_no_bit(triton_impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight = matrices(2, 2 * 4096 + 5, 9, torch.float32, torch.float32)
    options = {"bias": torch.linspace(-1, 1, len(weight)), "softcap": 5.0, "temperature": 0.7}
    whole = check(hidden, weight, 25, triton_impl, **options)
    # As with many thousands of rows; the last slab has fewer columns than are selected.
    monkeypatch.setattr("ggro_kernels.triton_parts.projection.SCORES", 1)
    assert_bitwise_equal(check(hidden, weight, 25, triton_impl, **options), whole)


def test_special_rows_shared_between_threads(native_impl: str) -> None:
    hidden, weight = integers(2, 1, 9), integers(2, 9001, 9)
    bias = torch.zeros(9001)
    with on_threads(4):
        for value in (-inf, nan, inf):
            bias[4000:] = value
            check_exactly(hidden, weight, 25, native_impl, bias=bias)
        check_exactly(hidden, weight, 25, native_impl, bias=bias.fill_(-inf))


@pytest.mark.parametrize("dtypes", [(torch.float64, torch.float64), (torch.float32, torch.float64)])
def test_fp64_goes_through_the_reference(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    hidden, weight = matrices(3, 257, 64, *dtypes)
    result = lm_head_entropy_topk(hidden, weight, 25, softcap=5.0)
    logits = all_logits(hidden, weight, torch.float64, None, 5.0)
    entropy, logsumexp = torch_statistics(logits)
    torch.testing.assert_close(result.entropy, entropy, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(result.logsumexp, logsumexp, rtol=1e-12, atol=1e-12)
    assert_exact_selection(result.values, result.indices, logits)


def test_outputs_are_detached(impl: str) -> None:
    hidden, weight = matrices(3, 50, 64, torch.float32, torch.float32)
    bias = torch.zeros(50, dtype=torch.float64, requires_grad=True)
    result = lm_head_entropy_topk(hidden.requires_grad_(), weight.requires_grad_(), 5, bias=bias, impl=impl)
    assert not any(tensor.requires_grad for tensor in result)


HIDDEN, WEIGHT = torch.randn(2, 4), torch.randn(9, 4)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (([1.0], WEIGHT, 1), {}, TypeError, r"hidden must be a torch\.Tensor, got list"),
        ((HIDDEN[0], WEIGHT, 1), {}, ValueError, r"hidden must have shape \[R, d\], got \[4\]"),
        ((HIDDEN, WEIGHT[0], 1), {}, ValueError, r"weight must have shape \[V, d\], got \[4\]"),
        ((HIDDEN, WEIGHT.to("meta"), 1), {}, ValueError, "weight must be on cpu as the other tensors, got meta"),
        ((HIDDEN.long(), WEIGHT, 1), {}, TypeError, r"hidden must be float32.*got torch\.int64"),
        ((HIDDEN, WEIGHT.int(), 1), {}, TypeError, r"weight must be float32.*got torch\.int32"),
        ((HIDDEN, WEIGHT[:, :3], 1), {}, ValueError, r"weight must have the width of hidden, d=4, got shape \[9, 3\]"),
        ((HIDDEN, WEIGHT, 0), {}, ValueError, r"k must be in 1 \.\. min\(256, V=9\), got 0"),
        ((HIDDEN, WEIGHT, 10), {}, ValueError, "k must be in .*got 10"),
        ((HIDDEN, torch.randn(300, 4), 257), {}, ValueError, "k must be in .*got 257"),
        ((HIDDEN, WEIGHT[:0], 1), {}, ValueError, "k must be in .*V=0"),
        ((HIDDEN, WEIGHT, 2.0), {}, TypeError, "k must be an int, got float"),
        ((HIDDEN, WEIGHT, 1), {"bias": 0.5}, TypeError, r"bias must be a torch\.Tensor, got float"),
        ((HIDDEN, WEIGHT, 1), {"bias": WEIGHT[:8, 0]}, ValueError, r"bias must have one entry per token, V=9, got .*8"),
        ((HIDDEN, WEIGHT, 1), {"bias": torch.arange(9)}, TypeError, r"bias must be float32.*got torch\.int64"),
    ],
)
def test_bad_arguments(arguments: tuple, options: dict, error: type[Exception], message: str, impl: str) -> None:
    with pytest.raises(error, match=message):
        lm_head_entropy_topk(*arguments, **options, impl=impl)


@pytest.mark.parametrize("value", [0.0, -1.0, nan, inf, 1e-31])
@pytest.mark.parametrize("name", ["softcap", "temperature"])
def test_bad_softcap_and_temperature(name: str, value: float, impl: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} must be in 1e-30 \.\. 1e\+30, got"):
        lm_head_entropy_topk(HIDDEN, WEIGHT, 1, **{name: value}, impl=impl)
