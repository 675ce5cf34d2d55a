"""merge_partials against the entropy_topk of whole rows, through every implementation."""

from itertools import pairwise

import pytest
import torch
from torch import inf, nan

from ggro_kernels import EntropyTopK
from ggro_kernels.testing import assert_exact_selection, assert_within_budget, bitwise
from tests.ggro_kernels.placed import entropy_topk, merge_partials
from tests.ggro_kernels.projections import few
from tests.ggro_kernels.test_entropy_topk import adversarial_rows, random_logits, torch_statistics

pytestmark = pytest.mark.usefixtures("poisoned_empty")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def partials(logits: torch.Tensor, cuts: list[int], k: int, temperature: float = 1.0) -> list[torch.Tensor]:
    """Arguments of merge_partials for logits cut at `cuts`."""
    bounds = list(pairwise([0, *cuts, logits.shape[1]]))
    parts = [
        entropy_topk(logits[:, first:last], k, temperature=temperature, impl="reference") for first, last in bounds
    ]
    return [*(torch.stack(field) for field in zip(*parts, strict=True)), torch.tensor([first for first, _ in bounds])]


def check(logits: torch.Tensor, cuts: list[int], k: int, impl: str, temperature: float = 1.0) -> EntropyTopK:
    arguments = partials(logits, cuts, k, temperature)
    result = merge_partials(*arguments, impl=impl)
    assert result.entropy.dtype == result.logsumexp.dtype == torch.float32
    assert all(tensor.is_contiguous() for tensor in result)
    assert_exact_selection(result.values, result.indices, logits)
    oracle = torch_statistics(logits.double() / temperature)
    same_precision = torch_statistics(logits.float() / temperature)
    # The shards' logsumexps were rounded to fp32.
    magnitude = oracle[1][oracle[1].isfinite()].abs().max().item() if oracle[1].isfinite().any() else 1.0
    for actual, torch_result, expected, what in zip(
        result[:2], same_precision, oracle, ("entropy", "logsumexp"), strict=True
    ):
        assert_within_budget(actual, torch_result, expected, scale=max(1.0, magnitude), what=what)
    return result


@pytest.mark.parametrize("dtype", DTYPES)
def test_random_rows_cut_at_odd_places(dtype: torch.dtype, impl: str) -> None:
    for rows, vocab, cuts, k in (
        (1, 7, [], 3),
        (2, 7, [1, 2, 4], 1),
        (3, 1000, [333, 341, 998], 2),
        (5, 4161, [1, 2048], 1),
        (4, 4161, [257, 2049, 3000], 64),
        (few(impl, 100), 999, [300, 700], 25),
        (1, 2048, [256, 512, 768, 1024, 1280, 1536, 1792], 256),
    ):
        check(random_logits(rows, vocab, dtype), cuts, k, impl)


@pytest.mark.parametrize("temperature", [0.05, 0.7, 100.0])
def test_temperature(temperature: float, impl: str) -> None:
    check(random_logits(3, 1001, torch.float32), [100, 777], 25, impl, temperature)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", adversarial_rows(4).keys())
def test_adversarial_rows(name: str, dtype: torch.dtype, impl: str) -> None:
    row = adversarial_rows(1031)[name].to(dtype).unsqueeze(0)
    for cuts, k in (([517], 1), ([100, 343, 344 + 25, 900], 25)):
        check(row, cuts, k, impl)


def test_the_order_of_the_shards_does_not_matter(impl: str) -> None:
    logits = random_logits(4, 1000, torch.bfloat16).round()
    arguments = partials(logits, [100, 333, 900], 25)
    expected = merge_partials(*arguments, impl=impl)
    for order in ([3, 2, 1, 0], [1, 3, 0, 2]):
        actual = merge_partials(*(x[order] for x in arguments), impl=impl)
        assert torch.equal(actual.indices, expected.indices)
        for a, b in zip(actual[:3], expected[:3], strict=True):
            assert torch.equal(bitwise(a), bitwise(b))


def test_one_shard_stays_as_it_is(impl: str) -> None:
    parts = entropy_topk(random_logits(3, 100, torch.float16), 5)
    merged = merge_partials(*(x.unsqueeze(0) for x in parts), torch.zeros(1, dtype=torch.int64), impl=impl)
    for a, b in zip(merged, parts, strict=True):
        assert torch.equal(a, b)


def test_merging_merged_rows(impl: str) -> None:
    logits = random_logits(3, 1000, torch.float32)
    pairs = [merge_partials(*partials(logits[:, part], [99], 10), impl=impl) for part in (slice(400), slice(400, 1000))]
    result = merge_partials(*map(torch.stack, zip(*pairs, strict=True)), torch.tensor([0, 400]), impl=impl)
    expected = entropy_topk(logits, 10)
    assert torch.equal(result.indices, expected.indices)
    torch.testing.assert_close(result.entropy, expected.entropy, rtol=1e-6, atol=1e-6)


def test_special_shards_have_the_stated_results(impl: str) -> None:
    logsumexp = torch.tensor([[-inf, nan, inf, -inf, -inf], [2.0, 0.0, 1.0, -inf, nan]])
    entropy = torch.tensor([[nan, nan, nan, nan, nan], [0.5, 0.1, 0.2, nan, nan]])
    values = torch.zeros(2, 5, 1)
    result = merge_partials(
        entropy, logsumexp, values, torch.zeros(2, 5, 1, dtype=torch.int64), torch.tensor([0, 9]), impl=impl
    )
    assert (result.entropy[0].item(), result.logsumexp[0].item()) == (0.5, 2.0)
    assert result.entropy[1:].isnan().all()
    assert result.logsumexp[1].isnan() and result.logsumexp[4].isnan()
    assert result.logsumexp[2:4].tolist() == [inf, -inf]


def test_large_offsets(impl: str) -> None:
    arguments = partials(random_logits(1, 100, torch.float32), [50], 5)
    shifted = merge_partials(*arguments[:4], arguments[4] + 2**40, impl=impl)
    assert torch.equal(shifted.indices, merge_partials(*arguments, impl=impl).indices + 2**40)


def test_strides(impl: str) -> None:
    arguments = partials(random_logits(4, 1000, torch.float32), [100, 333], 7)
    expected = merge_partials(*arguments, impl=impl)
    strided = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in arguments[:4]]
    for a, b in zip(merge_partials(*strided, arguments[4], impl=impl), expected, strict=True):
        assert torch.equal(a, b)


def test_fp64_goes_through_the_reference() -> None:
    logits = random_logits(3, 500, torch.float64)
    result, expected = merge_partials(*partials(logits, [100, 333], 7)), entropy_topk(logits, 7)
    for a, b in zip(result, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


H, LSE, VALUES = torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 3, 4)
IDS, OFFSETS = torch.zeros(2, 3, 4, dtype=torch.int64), torch.tensor([0, 9])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((H, LSE, [0.0], IDS, OFFSETS), TypeError, r"values must be a torch\.Tensor, got list"),
        ((H, LSE, VALUES[0], IDS, OFFSETS), ValueError, r"values must have shape \[S, R, k\], got \[3, 4\]"),
        ((H[0], LSE, VALUES, IDS, OFFSETS), ValueError, r"entropy must have shape \[S, R\], got \[3\]"),
        ((H, LSE, VALUES, IDS, OFFSETS[0]), ValueError, r"offsets must have shape \[S\], got \[\]"),
        (
            (H, LSE, VALUES, IDS.to("meta"), OFFSETS),
            ValueError,
            "indices must be on cpu as the other tensors, got meta",
        ),
        ((H, LSE, VALUES.long(), IDS, OFFSETS), TypeError, r"values must be float32.*got torch\.int64"),
        (
            (H.bfloat16(), LSE, VALUES, IDS, OFFSETS),
            TypeError,
            r"entropy must be float32 or float64, got torch\.bfloat16",
        ),
        (
            (H, LSE.double(), VALUES, IDS, OFFSETS),
            TypeError,
            r"logsumexp must have the entropy's dtype torch\.float32.*float64",
        ),
        ((H, LSE, VALUES, IDS.int(), OFFSETS), TypeError, r"indices must be int64, got torch\.int32"),
        ((H, LSE, VALUES, IDS, OFFSETS.int()), TypeError, r"offsets must be int64, got torch\.int32"),
        (
            (H[:0], LSE[:0], VALUES[:0], IDS[:0], OFFSETS[:0]),
            ValueError,
            r"values must have one shard or more.*\[0, 3, 4\]",
        ),
        ((H, LSE, VALUES[..., :0], IDS[..., :0], OFFSETS), ValueError, r"k of 1 or more, got shape \[2, 3, 0\]"),
        (
            (H[:1], LSE, VALUES, IDS, OFFSETS),
            ValueError,
            r"entropy must have shape \[2, 3\] to go with values, got \[1, 3\]",
        ),
        (
            (H, LSE[:, :2], VALUES, IDS, OFFSETS),
            ValueError,
            r"logsumexp must have shape \[2, 3\] to go with values, got \[2, 2\]",
        ),
        ((H, LSE, VALUES, IDS[..., :3], OFFSETS), ValueError, r"indices must have shape \[2, 3, 4\] to go with values"),
        ((H, LSE, VALUES, IDS, OFFSETS[:1]), ValueError, r"offsets must have shape \[2\] to go with values, got \[1\]"),
    ],
)
def test_bad_arguments(arguments: tuple, error: type[Exception], message: str, impl: str) -> None:
    with pytest.raises(error, match=message):
        merge_partials(*arguments, impl=impl)
