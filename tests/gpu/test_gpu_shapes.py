"""Every op at the sizes of real models: no row depends on its batch, and all agree with fp64.

Where there is no GPU the same runs in miniature on the CPU's kernels.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import ggro_kernels
from ggro_kernels import dispatch
from tests.ggro_kernels import (
    implementations,
    test_candidate_scores,
    test_entropy_topk,
    test_lm_head_entropy_topk,
    test_merge_partials,
    test_prefix_attention,
    test_project_topk,
    test_score_select,
    test_weighted_bt_loss,
)
from tests.ggro_kernels.op_calls import assert_bitwise_equal, outputs_of
from tests.gpu.samples import impls_of, requires_gpu

K = 25
DTYPES = (torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Sizes:
    """What a test runs on: one that needs a GPU and one for everybody."""

    device: str
    impl: str
    rows: int
    vocabularies: tuple[int, ...]
    width: int
    oracle_width: int
    prefix: int
    heads: tuple[int, int, int]
    """Of queries, of keys, their width."""


MINIATURE = Sizes("cpu", "auto", 8, (1000, 1031), 64, 48, 70, (4, 2, 16))
REAL = {
    impl: Sizes("cuda", impl, 64, (128256, 151936, 128257), 4096, 1024, 2048, (32, 8, 128))
    for impl in ("triton", "native")
}


def real_sizes(op: str) -> list[Sizes]:
    """One for every implementation that an op has on a GPU."""
    return [REAL[impl] for impl in impls_of(op)]


def sizes_of(op: str) -> pytest.MarkDecorator:
    """The real sizes with every implementation of an op, and the miniature."""
    real = [pytest.param(sizes, id=f"real-{sizes.impl}", marks=requires_gpu) for sizes in real_sizes(op)]
    return pytest.mark.parametrize("sizes", [*real, pytest.param(MINIATURE, id="miniature")], indirect=True)


@pytest.fixture
def sizes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sizes]:
    if request.param is MINIATURE and dispatch.native_error is not None:
        pytest.skip(f"native: {dispatch.native_error}")
    if request.param is REAL["native"]:
        implementations.select("cuda", monkeypatch)
    torch.manual_seed(0)
    yield request.param
    if request.param.device == "cuda":
        # Processes share the GPU.
        torch.cuda.empty_cache()


@dataclass(frozen=True)
class RowwiseCall:
    """A function whose outputs have one row for each of its inputs' rows."""

    function: Callable[..., Any]
    rows: dict[str, torch.Tensor]
    shared: dict[str, Any]
    dim: int = 0
    """Where the inputs have their rows."""

    def __call__(self, start: int, end: int, impl: str) -> Any:
        part = {name: x.narrow(self.dim, start, end - start) for name, x in self.rows.items()}
        return self.function(**part, **self.shared, impl=impl)


def entropy_topk(sizes: Sizes, vocabulary: int, dtype: torch.dtype) -> RowwiseCall:
    logits = (3 * torch.randn(sizes.rows, vocabulary, device=sizes.device)).to(dtype)
    return RowwiseCall(ggro_kernels.entropy_topk, {"logits": logits}, {"k": K})


def lm_head_entropy_topk(sizes: Sizes, vocabulary: int, dtype: torch.dtype) -> RowwiseCall:
    hidden, weight = matrices(sizes, vocabulary, dtype)
    return RowwiseCall(ggro_kernels.lm_head_entropy_topk, {"hidden": hidden}, {"weight": weight, "k": K})


def project_topk(sizes: Sizes, vocabulary: int, dtype: torch.dtype) -> RowwiseCall:
    gradient, table = matrices(sizes, vocabulary, dtype)
    return RowwiseCall(ggro_kernels.project_topk, {"gradient": gradient}, {"table": table, "k": K})


def candidate_scores(sizes: Sizes, vocabulary: int, dtype: torch.dtype) -> RowwiseCall:
    gradient, table = matrices(sizes, vocabulary, dtype)
    ids = torch.randint(vocabulary, (sizes.rows, K), device=sizes.device)
    return RowwiseCall(ggro_kernels.candidate_scores, {"gradient": gradient, "ids": ids}, {"table": table})


def score_select(sizes: Sizes, vocabulary: int, dtype: torch.dtype) -> RowwiseCall:
    hidden = torch.randn(sizes.rows, 30, sizes.width, device=sizes.device, dtype=dtype)
    rows = {"hidden": hidden, "logits": torch.randn(sizes.rows, 30, device=sizes.device, dtype=dtype)}
    rows["uniforms"] = torch.rand(sizes.rows, device=sizes.device)
    head = torch.randn(sizes.width, device=sizes.device, dtype=dtype)
    return RowwiseCall(ggro_kernels.score_select, rows, {"head": head, "weight": 0.1, "mode": "categorical"})


def merge_partials(sizes: Sizes, vocabulary: int, dtype: torch.dtype) -> RowwiseCall:
    shards, size = 8, vocabulary // 8
    logits = (3 * torch.randn(shards, sizes.rows, size, device=sizes.device)).to(dtype)
    parts = [ggro_kernels.entropy_topk(shard, K) for shard in logits]
    rows = {
        name: torch.stack([getattr(part, name) for part in parts])
        for name in ("entropy", "logsumexp", "values", "indices")
    }
    offsets = size * torch.arange(shards, device=sizes.device)
    return RowwiseCall(ggro_kernels.merge_partials, rows, {"offsets": offsets}, dim=1)


def prefix_attention(sizes: Sizes, vocabulary: int, dtype: torch.dtype) -> RowwiseCall:
    query_heads, key_heads, width = sizes.heads
    batch, tokens = 8, 30

    def normal(heads: int, count: int) -> torch.Tensor:
        return torch.randn(batch, heads, count, width, device=sizes.device, dtype=dtype)

    rows = {
        "query": normal(query_heads, tokens),
        "prefix_key": normal(key_heads, sizes.prefix),
        "prefix_value": normal(key_heads, sizes.prefix),
        "branch_key": normal(key_heads, tokens),
        "branch_value": normal(key_heads, tokens),
        "branch_starts": torch.arange(tokens, device=sizes.device).expand(batch, tokens),
    }
    return RowwiseCall(ggro_kernels.prefix_attention, rows, {})


def matrices(sizes: Sizes, vocabulary: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    left = torch.randn(sizes.rows, sizes.width, device=sizes.device, dtype=dtype)
    return left, torch.randn(vocabulary, sizes.width, device=sizes.device, dtype=dtype)


WITH_A_VOCABULARY = (entropy_topk, lm_head_entropy_topk, project_topk, candidate_scores, merge_partials)
WITHOUT = (score_select, prefix_attention)


def builders(*functions: Callable[..., RowwiseCall]) -> pytest.MarkDecorator:
    """Each with every implementation of its op on a GPU, and in miniature."""
    real = [
        pytest.param(build, sizes, id=f"{build.__name__}-real-{sizes.impl}", marks=requires_gpu)
        for build in functions
        for sizes in real_sizes(build.__name__)
    ]
    small = [pytest.param(build, MINIATURE, id=f"{build.__name__}-miniature") for build in functions]
    return pytest.mark.parametrize("build, sizes", real + small, indirect=["sizes"])


def assert_rows_do_not_depend_on_their_batch(call: RowwiseCall, impl: str) -> None:
    count = next(iter(call.rows.values())).shape[call.dim]
    whole = outputs_of(call(0, count, impl))
    for start, end in ((0, 1), (count - 1, count), (count // 2, count // 2 + 1), (1, 4), (0, count // 2)):
        rows = tuple(x[start:end].clone() for x in whole)
        assert_bitwise_equal(tuple(x.clone() for x in outputs_of(call(start, end, impl))), rows)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("place", range(3))
@builders(*WITH_A_VOCABULARY)
def test_rows_do_not_depend_on_their_batch(
    build: Callable[..., RowwiseCall], place: int, dtype: torch.dtype, sizes: Sizes
) -> None:
    vocabulary = sizes.vocabularies[place % len(sizes.vocabularies)]
    assert_rows_do_not_depend_on_their_batch(build(sizes, vocabulary, dtype), sizes.impl)


@pytest.mark.parametrize("dtype", DTYPES)
@builders(*WITHOUT)
def test_rows_without_a_vocabulary_do_not_depend_on_their_batch(
    build: Callable[..., RowwiseCall], dtype: torch.dtype, sizes: Sizes
) -> None:
    assert_rows_do_not_depend_on_their_batch(build(sizes, 0, dtype), sizes.impl)


@pytest.mark.parametrize("dtype", DTYPES)
@sizes_of("entropy_topk")
def test_entropy_topk_agrees_with_fp64(dtype: torch.dtype, sizes: Sizes) -> None:
    for vocabulary in sizes.vocabularies:
        for k in (K, 64):
            logits = test_entropy_topk.random_logits(8, vocabulary, dtype)
            test_entropy_topk.check(logits, k, sizes.impl)


@pytest.mark.parametrize("dtype", DTYPES)
@sizes_of("lm_head_entropy_topk")
def test_lm_head_entropy_topk_agrees_with_fp64(dtype: torch.dtype, sizes: Sizes) -> None:
    for rows in (1, 16):
        hidden = 3 * sizes.oracle_width**-0.5 * torch.randn(rows, sizes.oracle_width)
        weight = torch.randn(sizes.vocabularies[0], sizes.oracle_width).to(dtype)
        test_lm_head_entropy_topk.check(hidden.to(dtype), weight, K, sizes.impl)


@pytest.mark.parametrize("dtype", DTYPES)
@sizes_of("project_topk")
def test_project_topk_agrees_with_fp64(dtype: torch.dtype, sizes: Sizes) -> None:
    table = torch.randn(sizes.vocabularies[0], sizes.oracle_width).to(dtype)
    for positions in (1, 20, 70):
        test_project_topk.check(torch.randn(positions, sizes.oracle_width).to(dtype), table, K, sizes.impl)


@pytest.mark.parametrize("dtype", DTYPES)
@sizes_of("candidate_scores")
def test_candidate_scores_agrees_with_fp64(dtype: torch.dtype, sizes: Sizes) -> None:
    table = torch.randn(sizes.vocabularies[0], sizes.oracle_width).to(dtype)
    for positions in (1, 20, 256):
        gradient = torch.randn(positions, sizes.oracle_width).to(dtype)
        test_candidate_scores.check(gradient, table, torch.randint(len(table), (positions, K)), sizes.impl)


@pytest.mark.parametrize("dtype", DTYPES)
@sizes_of("score_select")
def test_score_select_agrees_with_fp64(dtype: torch.dtype, sizes: Sizes) -> None:
    for rows in (1, 16):
        dtypes = (dtype, dtype, dtype)
        test_score_select.check(*test_score_select.inputs(rows, 30, sizes.width, dtypes), 1.5, sizes.impl)


@pytest.mark.parametrize("dtype", DTYPES)
@sizes_of("merge_partials")
def test_merge_partials_agrees_with_fp64(dtype: torch.dtype, sizes: Sizes) -> None:
    vocabulary = sizes.vocabularies[0]
    cuts = [vocabulary // 8 * shard for shard in range(1, 8)]
    test_merge_partials.check(test_entropy_topk.random_logits(8, vocabulary, dtype), cuts, K, sizes.impl)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("branches", [(1,) * 30, (32,) * 2])
@sizes_of("prefix_attention")
def test_prefix_attention_agrees_with_fp64(branches: tuple[int, ...], dtype: torch.dtype, sizes: Sizes) -> None:
    arguments = test_prefix_attention.inputs(1, *sizes.heads, sizes.prefix, branches, dtype)
    test_prefix_attention.check(arguments, sizes.impl)


@pytest.mark.parametrize("dtype", DTYPES)
@sizes_of("weighted_bt_loss")
def test_weighted_bt_loss_agrees_with_fp64(dtype: torch.dtype, sizes: Sizes) -> None:
    rows, tokens = sizes.rows, sizes.width // 4
    pairs = test_weighted_bt_loss.inputs(rows, (tokens, tokens), tokens, dtype)
    test_weighted_bt_loss.check(pairs, sizes.impl)
