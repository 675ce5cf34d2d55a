"""Every op on random shapes, layouts and values: each instruction set against the reference in fp64.

The examples are the same in every run; `--hypothesis-profile=deep` draws new ones, many more of them.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ggro_kernels import candidate_scores, entropy_topk, lm_head_entropy_topk, project_topk
from ggro_kernels.testing import assert_exact_selection, assert_within_budget
from tests.ggro_kernels import strategies
from tests.ggro_kernels import test_lm_head_entropy_topk as lm_head_tests
from tests.ggro_kernels import test_project_topk as project_topk_tests
from tests.ggro_kernels.projections import chain_slack
from tests.ggro_kernels.test_registration import assert_bitwise_equal

pytestmark = pytest.mark.usefixtures("poisoned_empty")


def on_threads(threads: int, call: Callable[[], Any]) -> Any:
    try:
        torch.set_num_threads(threads)
        return call()
    finally:
        torch.set_num_threads(1)


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
def test_entropy_topk(native_impl: str, data: st.DataObject, threads: int) -> None:
    rows, vocab = data.draw(st.integers(0, 4)), data.draw(strategies.sizes(300, 2047, 2048, 2049, 4161, 9001))
    temperature = data.draw(st.sampled_from((1.0, 0.05, 0.7, 100.0)))
    # The logsumexp of larger ones would overflow in fp32 only.
    largest = torch.inf if temperature >= 1 else 1e36
    logits = data.draw(strategies.tensors((rows, vocab), largest=largest))
    k = data.draw(st.integers(1, min(256, vocab)))

    def run() -> Any:
        return entropy_topk(logits, k, temperature=temperature, impl=native_impl)

    result = run()
    assert_bitwise_equal(on_threads(threads, run), result)
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
    assert_bitwise_equal(on_threads(threads, lambda: entropy_topk(logits, k, impl=native_impl)), alone)


@given(data=st.data(), threads=strategies.thread_counts)
def test_candidate_scores(native_impl: str, data: st.DataObject, threads: int) -> None:
    positions, candidates = data.draw(st.integers(0, 5)), data.draw(st.integers(0, 30))
    vocab, width = data.draw(st.integers(1, 60)), data.draw(st.one_of(st.just(0), strategies.sizes(300, 1024, 2049)))
    exact = data.draw(st.booleans())
    # Larger numbers would overflow in fp32 only.
    tensors = strategies.integer_valued if exact else partial(strategies.tensors, largest=1e15)
    gradient, table = data.draw(tensors((positions, width))), data.draw(tensors((vocab, width)))
    ids = data.draw(strategies.ids((positions, candidates), vocab))

    def run() -> Any:
        return candidate_scores(gradient, table, ids, impl=native_impl)

    scores = run()
    assert_bitwise_equal(on_threads(threads, run), scores)
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


@st.composite
def projections(draw: Any) -> tuple[torch.Tensor, torch.Tensor, int, dict[str, torch.Tensor], bool]:
    """Rows, a table, k, a bias or none, and whether all products are exact in fp32."""
    rows, vocab = draw(st.one_of(st.integers(0, 5), st.integers(6, 40))), draw(strategies.sizes(300, 513, 1031))
    width = draw(st.one_of(st.just(0), strategies.sizes(100, 257, 1031)))
    exact = draw(st.booleans())
    # Larger numbers would overflow in fp32 only.
    tensors = strategies.integer_valued if exact else partial(strategies.tensors, largest=1e15)
    left, right = draw(tensors((rows, width))), draw(tensors((vocab, width)))
    bias = {"bias": draw(tensors((vocab,)))} if draw(st.booleans()) else {}
    return left, right, draw(st.integers(1, min(256, vocab))), bias, exact


@given(data=st.data(), arguments=projections(), threads=strategies.thread_counts)
def test_project_topk(native_impl: str, data: st.DataObject, arguments: Any, threads: int) -> None:
    gradient, table, k, options, exact = arguments
    if data.draw(st.booleans()):
        options = {**options, "forbidden": data.draw(strategies.masks((len(table),)))}
    if exact:
        result = project_topk_tests.check_exactly(gradient, table, k, native_impl, **options)
    else:
        slack = chain_slack(table.shape[1])
        result = project_topk_tests.check(gradient, table, k, native_impl, **options, slack=slack)
    again = on_threads(threads, lambda: project_topk(gradient, table, k, impl=native_impl, **options))
    assert_bitwise_equal(again, result)


@given(data=st.data(), arguments=projections(), threads=strategies.thread_counts)
def test_lm_head_entropy_topk(native_impl: str, data: st.DataObject, arguments: Any, threads: int) -> None:
    hidden, weight, k, options, exact = arguments
    options = {**options, "softcap": data.draw(st.sampled_from((None, None, 0.5, 30.0)))}
    if exact and options["softcap"] is None:
        result = lm_head_tests.check_exactly(hidden, weight, k, native_impl, **options)
    else:
        options["temperature"] = data.draw(st.sampled_from((1.0, 0.7, 100.0)))
        slack = chain_slack(weight.shape[1])
        result = lm_head_tests.check(hidden, weight, k, native_impl, **options, slack=slack)
    again = on_threads(threads, lambda: lm_head_entropy_topk(hidden, weight, k, impl=native_impl, **options))
    assert_bitwise_equal(again, result)
