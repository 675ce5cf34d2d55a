"""Every op on random shapes, layouts and values: each instruction set against the reference in fp64.

The examples are the same in every run; `--hypothesis-profile=deep` draws new ones, many more of them.
"""

from collections.abc import Callable
from functools import partial
from itertools import accumulate
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ggro_kernels import ScoreSelect
from ggro_kernels.testing import assert_exact_selection, assert_within_budget
from tests.ggro_kernels import strategies
from tests.ggro_kernels import test_entropy_topk_backward as backward_tests
from tests.ggro_kernels import test_lm_head_entropy_topk as lm_head_tests
from tests.ggro_kernels import test_merge_partials as merge_tests
from tests.ggro_kernels import test_prefix_attention as attention_tests
from tests.ggro_kernels import test_prefix_attention_backward as attention_backward_tests
from tests.ggro_kernels import test_project_topk as project_topk_tests
from tests.ggro_kernels.implementations import on_threads
from tests.ggro_kernels.placed import (
    batch_invariant_linear,
    candidate_scores,
    entropy_topk,
    lm_head_entropy_topk,
    merge_partials,
    prefix_attention,
    project_topk,
    score_select,
    weighted_bt_loss,
)
from tests.ggro_kernels.projections import chain_slack
from tests.ggro_kernels.test_registration import assert_bitwise_equal

pytestmark = pytest.mark.usefixtures("poisoned_empty")

INTERPRETED_EXAMPLES = 20
"""How many examples of the GPU's kernels: Triton's interpreter takes a tenth of a second for each row."""


def shared_by(threads: int, call: Callable[[], Any]) -> Any:
    with on_threads(threads):
        return call()


def assert_rows_within_budget(
    actual: torch.Tensor, same_precision: torch.Tensor, oracle: torch.Tensor, scale: torch.Tensor | float, what: str
) -> None:
    """`assert_within_budget` row by row, so that a large row does not excuse a small one."""
    scales = torch.as_tensor(scale, dtype=torch.float64).nan_to_num(nan=1.0, posinf=1.0).expand(len(actual))
    for row in range(len(actual)):
        assert_within_budget(
            actual[row], same_precision[row], oracle[row], scale=scales[row].item(), what=f"{what}, row {row}"
        )


@given(data=st.data(), threads=strategies.thread_counts)
def test_entropy_topk(kernel_impl: str, data: st.DataObject, threads: int) -> None:
    rows, vocab = data.draw(st.integers(0, 4)), data.draw(strategies.sizes(300, 2047, 2048, 2049, 4161, 9001))
    temperature = data.draw(st.sampled_from((1.0, 0.05, 0.7, 100.0)))
    # The logsumexp of larger ones would overflow in fp32 only.
    largest = torch.inf if temperature >= 1 else 1e36
    logits = data.draw(strategies.tensors((rows, vocab), largest=largest))
    k = data.draw(st.integers(1, min(256, vocab)))

    def run() -> Any:
        return entropy_topk(logits, k, temperature=temperature, impl=kernel_impl)

    result = run()
    assert_bitwise_equal(shared_by(threads, run), result)
    assert_exact_selection(result.values, result.indices, logits)
    same_precision, oracle = (
        entropy_topk(logits.to(dtype), k, temperature=temperature, impl="reference")
        for dtype in (torch.float32, torch.float64)
    )
    # An exponential may err by 2e-7, alike for equal logits, which a row may hold nothing else than.
    scale = 4 * oracle.entropy.clamp(min=1)
    for statistic in ("entropy", "logsumexp"):
        compared = (getattr(x, statistic) for x in (result, same_precision, oracle))
        assert_rows_within_budget(*compared, scale=scale, what=statistic)


@settings(max_examples=8)
@given(data=st.data(), threads=strategies.thread_counts)
def test_entropy_topk_shared_between_threads(native_impl: str, data: st.DataObject, threads: int) -> None:
    shape = data.draw(st.integers(1, 5)), data.draw(st.integers(30_000, 90_000))
    logits, k = data.draw(strategies.tensors(shape)), data.draw(st.integers(1, 256))
    alone = entropy_topk(logits, k, impl=native_impl)
    assert_exact_selection(alone.values, alone.indices, logits)
    assert_bitwise_equal(shared_by(threads, lambda: entropy_topk(logits, k, impl=native_impl)), alone)


@given(data=st.data(), threads=strategies.thread_counts)
def test_candidate_scores(kernel_impl: str, data: st.DataObject, threads: int) -> None:
    positions, candidates = data.draw(st.integers(0, 5)), data.draw(st.integers(0, 30))
    vocab, width = data.draw(st.integers(1, 60)), data.draw(st.one_of(st.just(0), strategies.sizes(300, 1024, 2049)))
    exact = data.draw(st.booleans())
    # Larger numbers would overflow in fp32 only.
    tensors = strategies.integer_valued if exact else partial(strategies.tensors, largest=1e15)
    gradient, table = data.draw(tensors((positions, width))), data.draw(tensors((vocab, width)))
    ids = data.draw(strategies.ids((positions, candidates), vocab))

    def run() -> Any:
        return candidate_scores(gradient, table, ids, impl=kernel_impl)

    scores = run()
    assert_bitwise_equal(shared_by(threads, run), scores)
    same_precision, oracle = (
        candidate_scores(gradient.to(dtype), table.to(dtype), ids, impl="reference")
        for dtype in (torch.float32, torch.float64)
    )
    if exact:
        assert torch.equal(scores.double(), oracle)
        return
    magnitudes = candidate_scores(gradient.double().abs(), table.double().abs(), ids, impl="reference")
    scale = magnitudes.nan_to_num(nan=0.0, posinf=0.0).sum(1)
    assert_rows_within_budget(scores, same_precision, oracle, scale=scale, what="scores")


@given(data=st.data(), threads=strategies.thread_counts)
def test_batch_invariant_linear(native_impl: str, data: st.DataObject, threads: int) -> None:
    rows, outputs = data.draw(st.integers(0, 14)), data.draw(strategies.sizes(100, 129))
    width = data.draw(st.one_of(st.just(0), strategies.sizes(300, 1024, 2049)))
    dtype, exact = data.draw(strategies.dtypes), data.draw(st.booleans())
    # Larger numbers would overflow in fp32 only; whole numbers up to 256 have no rounding in any dtype.
    tensors = strategies.integer_valued if exact else partial(strategies.tensors, largest=1e15)
    x, weight = data.draw(tensors((rows, width), dtype)), data.draw(tensors((outputs, width), dtype))
    gradient = data.draw(tensors((rows, outputs), dtype))
    backward = torch.ops.ggro_kernels.batch_invariant_linear_backward
    for forward, left, right in ((True, x, weight.t()), (False, gradient, weight)):

        def run(forward: bool = forward, left: torch.Tensor = left) -> torch.Tensor:
            if forward:
                return batch_invariant_linear(left, weight, impl=native_impl)
            return backward(left, weight, native_impl)

        result = run()
        assert_bitwise_equal(shared_by(threads, run), result)
        for row in range(rows):
            assert_bitwise_equal(run(left=left[row : row + 1]), result[row : row + 1])
        if exact:
            # Every sum is exact in fp32, and rounded once.
            assert torch.equal(result, (left.float() @ right.float()).to(dtype))
            continue
        # A product for each pair: a BLAS may let an infinity of one row spoil another.
        products = left.double()[:, None] * right.double().t()[None]
        same_precision = (left.float()[:, None] * right.float().t()[None]).sum(2).to(dtype)
        oracle = products.sum(2)
        # What is beyond the dtype is an infinity.
        oracle = torch.where(oracle.isfinite() & oracle.to(dtype).isinf(), oracle.to(dtype).double(), oracle)
        magnitudes = products.abs().nan_to_num(nan=0.0, posinf=0.0).sum(2)
        scale = magnitudes.amax(1) if magnitudes.numel() else torch.zeros(rows)
        assert_rows_within_budget(result, same_precision, oracle, scale=scale, what="products")


@st.composite
def projections(
    draw: Any, *, interpreted: bool = False
) -> tuple[torch.Tensor, torch.Tensor, int, dict[str, torch.Tensor], bool]:
    """Rows, a table, k, a bias or none, and whether all products are exact in fp32."""
    rows = draw(st.integers(0, 2) if interpreted else st.one_of(st.integers(0, 5), st.integers(6, 40)))
    vocab = draw(strategies.sizes(300, 513, 1031))
    width = draw(st.one_of(st.just(0), strategies.sizes(100, 257, 1031)))
    exact = draw(st.booleans())
    # Larger numbers would overflow in fp32 only.
    tensors = strategies.integer_valued if exact else partial(strategies.tensors, largest=1e15)
    left, right = draw(tensors((rows, width))), draw(tensors((vocab, width)))
    if left.dtype == right.dtype == torch.bfloat16:
        # The instructions for pairs of bf16 take denormals for zeros.
        strategies.flush_denormals(left)
        strategies.flush_denormals(right)
    bias = {"bias": draw(tensors((vocab,)))} if draw(st.booleans()) else {}
    if interpreted:
        # Triton's interpreter takes denormals of bf16 for other numbers.
        for x in (left, right, *bias.values()):
            if x.dtype == torch.bfloat16:
                strategies.flush_denormals(x)
    return left, right, draw(st.integers(1, min(256, vocab))), bias, exact


def check_project_topk(impl: str, data: st.DataObject, arguments: Any, threads: int) -> None:
    gradient, table, k, options, exact = arguments
    if data.draw(st.booleans()):
        options = {**options, "forbidden": data.draw(strategies.masks((len(table),)))}
    if exact:
        result = project_topk_tests.check_exactly(gradient, table, k, impl, **options)
    else:
        slack = chain_slack(gradient, table)
        result = project_topk_tests.check(gradient, table, k, impl, **options, slack=slack)
    again = shared_by(threads, lambda: project_topk(gradient, table, k, impl=impl, **options))
    assert_bitwise_equal(again, result)


@given(data=st.data(), arguments=projections(), threads=strategies.thread_counts)
def test_project_topk(native_impl: str, data: st.DataObject, arguments: Any, threads: int) -> None:
    check_project_topk(native_impl, data, arguments, threads)


@settings(max_examples=INTERPRETED_EXAMPLES)
@given(data=st.data(), arguments=projections(interpreted=True))
def test_project_topk_on_a_gpu(gpu_impl: str, data: st.DataObject, arguments: Any) -> None:
    check_project_topk(gpu_impl, data, arguments, threads=1)


def check_lm_head_entropy_topk(impl: str, data: st.DataObject, arguments: Any, threads: int) -> None:
    hidden, weight, k, options, exact = arguments
    options = {**options, "softcap": data.draw(st.sampled_from((None, None, 0.5, 30.0)))}
    if exact and options["softcap"] is None:
        result = lm_head_tests.check_exactly(hidden, weight, k, impl, **options)
    else:
        options["temperature"] = data.draw(st.sampled_from((1.0, 0.7, 100.0)))
        slack = chain_slack(hidden, weight)
        result = lm_head_tests.check(hidden, weight, k, impl, **options, slack=slack)
    again = shared_by(threads, lambda: lm_head_entropy_topk(hidden, weight, k, impl=impl, **options))
    assert_bitwise_equal(again, result)


@given(data=st.data(), arguments=projections(), threads=strategies.thread_counts)
def test_lm_head_entropy_topk(native_impl: str, data: st.DataObject, arguments: Any, threads: int) -> None:
    check_lm_head_entropy_topk(native_impl, data, arguments, threads)


@settings(max_examples=INTERPRETED_EXAMPLES)
@given(data=st.data(), arguments=projections(interpreted=True))
def test_lm_head_entropy_topk_on_a_gpu(gpu_impl: str, data: st.DataObject, arguments: Any) -> None:
    check_lm_head_entropy_topk(gpu_impl, data, arguments, threads=1)


def check_entropy_topk_gradients(impl: str, data: st.DataObject, threads: int) -> None:
    rows, vocab = data.draw(st.integers(0, 4)), data.draw(strategies.sizes(300, 2049, 4161))
    logits = data.draw(strategies.values((rows, vocab), data.draw(strategies.dtypes), largest=1e4))
    # The gradient of a row that they spoil is tested by itself.
    logits = logits.masked_fill(logits.isnan() | (logits == torch.inf), -torch.inf)
    logits, k = data.draw(strategies.layouts(logits)), data.draw(st.integers(1, min(256, vocab)))
    temperature = data.draw(st.sampled_from((1.0, 0.05, 0.7, 100.0)))
    # Row by row, so that a large row does not excuse a small one.
    for row in range(rows):
        backward_tests.check(logits[row : row + 1], k, impl, temperature)
    alone = backward_tests.gradient_of(logits, k, impl, temperature)
    shared = shared_by(threads, lambda: backward_tests.gradient_of(logits, k, impl, temperature))
    assert_bitwise_equal(shared, alone)


@given(data=st.data(), threads=strategies.thread_counts)
def test_entropy_topk_gradients(native_impl: str, data: st.DataObject, threads: int) -> None:
    check_entropy_topk_gradients(native_impl, data, threads)


@settings(max_examples=INTERPRETED_EXAMPLES)
@given(data=st.data())
def test_entropy_topk_gradients_on_a_gpu(gpu_impl: str, data: st.DataObject) -> None:
    check_entropy_topk_gradients(gpu_impl, data, threads=1)


def check_merge_partials(impl: str, data: st.DataObject, threads: int) -> None:
    k = data.draw(st.sampled_from((1, 2, 5, 25, 256)))
    lengths = data.draw(st.lists(st.integers(k, k + 200), min_size=1, max_size=6))
    *cuts, vocab = accumulate(lengths)
    temperature = data.draw(st.sampled_from((1.0, 0.05, 100.0)))
    logits = data.draw(strategies.tensors((data.draw(st.integers(0, 3)), vocab), largest=1e36))
    for row in range(len(logits)):
        merge_tests.check(logits[row : row + 1], cuts, k, impl, temperature)
    partials = merge_tests.partials(logits, cuts, k, temperature)
    result = merge_partials(*partials, impl=impl)
    order = data.draw(st.permutations(range(len(lengths))))
    reordered = [x[order] for x in partials]
    again = shared_by(threads, lambda: merge_partials(*reordered, impl=impl))
    assert_bitwise_equal(again, result)


@given(data=st.data(), threads=strategies.thread_counts)
def test_merge_partials(native_impl: str, data: st.DataObject, threads: int) -> None:
    check_merge_partials(native_impl, data, threads)


@settings(max_examples=INTERPRETED_EXAMPLES)
@given(data=st.data())
def test_merge_partials_in_triton(triton_impl: str, data: st.DataObject) -> None:
    check_merge_partials(triton_impl, data, threads=1)


@given(data=st.data(), threads=strategies.thread_counts)
def test_score_select(kernel_impl: str, data: st.DataObject, threads: int) -> None:
    rows, candidates = data.draw(st.integers(0, 5)), data.draw(strategies.sizes(300))
    width = data.draw(st.one_of(st.just(0), strategies.sizes(100, 1031)))
    weight = data.draw(st.sampled_from((1.0, 0.0, -2.0, 0.5)))
    exact = data.draw(st.booleans())
    # Larger numbers would overflow in fp32 only.
    tensors = strategies.integer_valued if exact else partial(strategies.tensors, largest=1e15)
    hidden, head = data.draw(tensors((rows, candidates, width))), data.draw(tensors((width,)))
    logits = data.draw(tensors((rows, candidates)))
    if data.draw(st.booleans()):
        logits = logits.masked_fill(data.draw(strategies.masks(logits.shape)), -torch.inf)

    greedy = score_select(hidden, head, logits, weight, impl=kernel_impl)
    # NaN is torch's largest value too, and its argmax the first of equal ones.
    assert torch.equal(greedy.index, greedy.score.argmax(dim=1))
    same_precision, oracle = (
        score_select(hidden.to(dtype), head.to(dtype), logits.to(dtype), weight, impl="reference")
        for dtype in (torch.float32, torch.float64)
    )
    if exact:
        assert torch.equal(greedy.reward.double(), oracle.reward) and torch.equal(greedy.score.double(), oracle.score)
    else:
        magnitude = (hidden.double().abs() * head.double().abs()).nan_to_num(nan=0.0, posinf=0.0).sum(2)
        compared = (x.reward for x in (greedy, same_precision, oracle))
        assert_rows_within_budget(*compared, scale=magnitude.amax(dim=1), what="reward")
        magnitude = abs(weight) * magnitude + logits.double().abs().nan_to_num(nan=0.0, posinf=0.0)
        compared = (x.score for x in (greedy, same_precision, oracle))
        assert_rows_within_budget(*compared, scale=magnitude.amax(dim=1), what="score")

    temperature = data.draw(st.sampled_from((1.0, 0.05, 0.7, 100.0)))
    uniform = st.one_of(st.floats(0, 1, exclude_max=True, width=32), st.just(1 - 2**-24))
    uniforms = data.draw(strategies.layouts(torch.tensor(data.draw(st.lists(uniform, min_size=rows, max_size=rows)))))

    def sample() -> ScoreSelect:
        options = {"mode": "categorical", "temperature": temperature, "uniforms": uniforms}
        return score_select(hidden, head, logits, weight, **options, impl=kernel_impl)

    sampled = sample()
    assert_bitwise_equal(shared_by(threads, sample), sampled)
    assert_bitwise_equal(sampled[1:], greedy[1:])
    choices = zip(sampled.index.tolist(), greedy.index.tolist(), sampled.score.double(), uniforms.double(), strict=True)
    for taken, best, score, uniform in choices:
        if not score[best].isfinite():
            assert taken == best
            continue
        cumulative = ((score - score[best]) / temperature).exp().cumsum(dim=0)
        bound, rounding = uniform * cumulative[-1], 1e-12 * cumulative[-1]
        assert score[taken] > -torch.inf
        assert cumulative[taken] > bound - rounding
        assert taken == 0 or cumulative[taken - 1] <= bound + rounding


@given(data=st.data(), threads=strategies.thread_counts)
def test_weighted_bt_loss(kernel_impl: str, data: st.DataObject, threads: int) -> None:
    rows, pairs = data.draw(st.integers(0, 5)), data.draw(st.one_of(st.integers(0, 20), st.integers(0, 300)))
    lengths, dtype = [data.draw(strategies.sizes(300)) for _ in range(2)], data.draw(strategies.dtypes)
    rewards = [data.draw(strategies.tensors((rows, length), dtype, largest=1e15)) for length in lengths]
    weights = data.draw(strategies.tensors((rows, pairs), largest=1e15))
    positions = [data.draw(strategies.ids((rows, pairs), length)) for length in lengths]
    if data.draw(st.booleans()):
        # Where nothing is looked at.
        positions = [x.masked_fill(weights == 0, -1) for x in positions]
    reduction = data.draw(st.sampled_from(("mean", "sum")))

    def loss_and_gradients(to: torch.dtype, impl: str) -> tuple[torch.Tensor, ...]:
        leaves = [x.detach().to(to).requires_grad_() for x in rewards]
        loss = weighted_bt_loss(*leaves, *positions, weights, reduction=reduction, impl=impl)
        return loss.detach(), *torch.autograd.grad(3 * loss, leaves)

    result = loss_and_gradients(dtype, kernel_impl)
    assert_bitwise_equal(shared_by(threads, lambda: loss_and_gradients(dtype, kernel_impl)), result)
    for actual, expected in zip(result, loss_and_gradients(torch.float64, "reference"), strict=True):
        limits = torch.finfo(actual.dtype)
        torch.testing.assert_close(
            actual, expected.to(actual.dtype), rtol=limits.eps, atol=limits.smallest_normal * limits.eps, equal_nan=True
        )


@st.composite
def attentions(draw: Any) -> dict[str, Any]:
    """Arguments of prefix_attention: any grouping, widths, layouts, branch starts and ends."""
    batch, key_heads = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    query_heads = key_heads * draw(st.sampled_from((1, 2, 3, 4, 7)))
    width, value_width = draw(strategies.sizes(40, 64, 129)), draw(strategies.sizes(40, 64, 129))
    prefix, tokens = draw(st.one_of(st.integers(0, 5), st.integers(0, 200))), draw(st.integers(0, 9))
    generator = torch.Generator().manual_seed(draw(strategies.seeds))
    dtype, magnitude = draw(strategies.dtypes), draw(st.sampled_from((1.0, 0.1, 4.0)))
    branch_tokens = draw(st.one_of(st.none(), st.integers(1, 5), st.integers(1, 200)))
    arguments: dict[str, Any] = {}
    lengths = torch.randint(prefix + 1, (batch,), generator=generator) if draw(st.booleans()) else None
    for name, heads, length, columns in (
        ("query", query_heads, tokens, width),
        ("prefix_key", key_heads, prefix, width),
        ("prefix_value", key_heads, prefix, value_width),
        ("branch_key", key_heads, branch_tokens or tokens, width),
        ("branch_value", key_heads, branch_tokens or tokens, value_width),
    ):
        x = magnitude * torch.randn(batch, heads, length, columns, generator=generator)
        if name.startswith("prefix") and lengths is not None:
            # In every row, since the batch may be expanded.
            x[:, :, int(lengths.max()) :] = torch.nan
        arguments[name] = draw(strategies.layouts(x.to(dtype)))
    if branch_tokens is not None:
        ends = torch.randint(branch_tokens, (batch, tokens), generator=generator)
        starts = (torch.rand(batch, tokens, generator=generator) * (ends + 1)).long()
        arguments["branch_ends"] = ends.t().contiguous().t() if draw(st.booleans()) else ends
    elif draw(st.booleans()):
        starts = (torch.rand(batch, tokens, generator=generator) * torch.arange(1, tokens + 1)).long()
    else:
        begins = torch.rand(batch, tokens, generator=generator) < draw(st.sampled_from((0.0, 0.3, 1.0)))
        starts = (begins * torch.arange(tokens)).cummax(dim=1).values
    # Without expanding, which would move starts before their tokens.
    arguments["branch_starts"] = starts.t().contiguous().t() if draw(st.booleans()) else starts
    if lengths is not None:
        arguments["prefix_lengths"] = draw(strategies.layouts(lengths))
    if draw(st.booleans()):
        arguments["scale"] = draw(st.sampled_from((0.0, -0.2, 0.3)))
    arguments["softcap"] = draw(st.sampled_from((None, None, 0.5, 30.0)))
    arguments["window"] = draw(st.one_of(st.none(), st.integers(1, 5), st.integers(1, 220)))
    return arguments


@settings(max_examples=25)
@given(arguments=attentions(), threads=strategies.thread_counts)
def test_prefix_attention(kernel_impl: str, arguments: dict[str, Any], threads: int) -> None:
    output = attention_tests.check(arguments, kernel_impl)
    again = shared_by(threads, lambda: prefix_attention(**arguments, impl=kernel_impl))
    assert_bitwise_equal(again, output)


@settings(max_examples=25)
@given(arguments=attentions(), threads=strategies.thread_counts)
def test_prefix_attention_backward(native_impl: str, arguments: dict[str, Any], threads: int) -> None:
    found = attention_backward_tests.check(arguments, native_impl)
    gradient = attention_backward_tests.output_gradient(arguments)
    again = shared_by(threads, lambda: attention_backward_tests.gradients(arguments, gradient, native_impl))
    assert_bitwise_equal(again.values(), found.values())
