"""entropy_topk, each line of its contract, through every implementation."""

import math

import pytest
import torch
from torch import inf, nan

from ggro_kernels import EntropyTopK
from ggro_kernels.testing import assert_exact_selection, assert_within_budget, bitwise
from tests.ggro_kernels.implementations import on_threads, thread_counts
from tests.ggro_kernels.placed import entropy_topk

pytestmark = pytest.mark.usefixtures("poisoned_empty")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def torch_statistics(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Entropy and logsumexp by torch's own functions."""
    return torch.special.entr(x.softmax(1)).sum(1), x.logsumexp(1)


def check(logits: torch.Tensor, k: int, impl: str, temperature: float = 1.0) -> EntropyTopK:
    result = entropy_topk(logits, k, temperature=temperature, impl=impl)
    assert result.entropy.dtype == result.logsumexp.dtype == torch.float32
    assert result.indices.dtype == torch.int64 and result.values.dtype == logits.dtype
    assert all(tensor.is_contiguous() for tensor in result)
    assert_exact_selection(result.values, result.indices, logits)
    oracle = torch_statistics(logits.double() / temperature)
    same_precision = torch_statistics(logits.float() / temperature)
    for actual, torch_result, expected, what in zip(
        result[:2], same_precision, oracle, ("entropy", "logsumexp"), strict=True
    ):
        assert_within_budget(actual, torch_result, expected, what=what)
    return result


def random_logits(rows: int, vocab: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + 1000 * rows + vocab)
    return (3 * torch.randn(rows, vocab, generator=generator)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 2, 3, 7, 31, 257, 1000, 2047, 2048, 2049, 4161])
def test_random_rows(vocab: int, dtype: torch.dtype, impl: str) -> None:
    for rows, k in ((0, 1), (1, 1), (2, 5), (3, 25), (5, 64), (3, 100), (2, 256)):
        check(random_logits(rows, vocab, dtype), min(k, vocab), impl)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [32000, 128256, 128257, 151936])
def test_full_vocabularies(vocab: int, dtype: torch.dtype, impl: str) -> None:
    check(random_logits(1, vocab, dtype), 25, impl)


def test_many_rows(impl: str) -> None:
    check(random_logits(37, 1000, torch.float32), 100, impl)


@pytest.mark.parametrize("k", [1, 2, 5, 25, 64, 100, 256])
def test_every_k(k: int, impl: str) -> None:
    check(random_logits(2, 8191, torch.float32), k, impl)
    check(random_logits(1, k, torch.float32), k, impl)


def adversarial_rows(vocab: int) -> dict[str, torch.Tensor]:
    ramp = torch.linspace(-20, 20, vocab)
    generator = torch.Generator().manual_seed(7)
    noise = torch.randn(vocab, generator=generator)
    zeros = torch.where(noise > 0, 0.0, -0.0)
    blocks = noise.clone()
    blocks[: vocab // 2] = -inf
    few = torch.full((vocab,), -inf)
    few[vocab // 3] = 1.5
    few[vocab - 1] = -2.0
    nans = noise.clone()
    nans[:: max(1, vocab // 11)] = nan
    return {
        "ties": noise.round(),
        "constant": torch.full((vocab,), -3.25),
        "ascending": ramp,
        "descending": ramp.flip(0),
        "negative": -noise.abs() - 1,
        "mixed zeros": zeros,
        "zeros and denormals": torch.where(noise > 1, torch.tensor(6.0e-8), zeros),
        "masked half": blocks,
        "masked second half": blocks.flip(0),
        "fewer than k finite": few,
        "all masked": torch.full((vocab,), -inf),
        "one NaN": torch.where(torch.arange(vocab) == vocab // 2, nan, noise),
        "NaN first": torch.where(torch.arange(vocab) == 0, nan, noise),
        "NaN last": torch.where(torch.arange(vocab) == vocab - 1, nan, noise),
        "many NaN": nans,
        "all NaN": torch.full((vocab,), nan),
        "NaN and masked": torch.where(torch.arange(vocab) % 3 == 0, nan, -inf),
        "+inf": torch.where(torch.arange(vocab) % max(2, vocab // 2) == 1, inf, noise),
        "+inf and masked": torch.where(torch.arange(vocab) == vocab - 1, inf, -inf),
        "+inf and NaN": torch.where(torch.arange(vocab) == vocab // 3, inf, nans),
        "peaked": torch.where(torch.arange(vocab) == vocab // 2, 60.0, noise),
        "large": noise * 300 + 1000,
        "very negative": noise - 30000,
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", adversarial_rows(4).keys())
def test_adversarial_rows(name: str, dtype: torch.dtype, impl: str) -> None:
    for vocab in (31, 4099):
        row = adversarial_rows(vocab)[name].to(dtype)
        for k in (1, 25, min(256, vocab)):
            check(row.unsqueeze(0), k, impl)


def test_special_rows_have_the_stated_results(impl: str) -> None:
    logits = torch.tensor(
        [
            [-inf, -inf, -inf, -inf],
            [0.0, nan, 1.0, nan],
            [1.0, inf, -inf, 0.0],
            [-inf, 2.0, -inf, 5.0],
            [0.0, -0.0, 0.0, -0.0],
        ]
    )
    result = entropy_topk(logits, 3, impl=impl)
    assert result.logsumexp[0] == -inf and result.entropy[0].isnan()
    assert result.logsumexp[1].isnan() and result.entropy[1].isnan()
    assert result.logsumexp[2] == inf and result.entropy[2].isnan()
    assert result.indices.tolist() == [[0, 1, 2], [1, 3, 2], [1, 0, 3], [3, 1, 0], [0, 1, 2]]
    assert result.values[3].tolist() == [5.0, 2.0, -inf]
    assert torch.equal(bitwise(result.values[4]), bitwise(torch.tensor([0.0, -0.0, 0.0])))


def test_exact_entropies(impl: str) -> None:
    uniform = entropy_topk(torch.full((1, 4096), 2.5), 1, impl=impl)
    assert uniform.entropy.item() == pytest.approx(math.log(4096), rel=1e-7)
    certain = torch.full((1, 4096), -inf)
    certain[0, 77] = 3.0
    result = entropy_topk(certain, 2, impl=impl)
    assert (result.entropy.item(), result.logsumexp.item()) == (0.0, 3.0)
    assert result.indices.tolist() == [[77, 0]]


@pytest.mark.parametrize("temperature", [0.05, 0.7, 1.0, 2.0, 100.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_temperature(temperature: float, dtype: torch.dtype, impl: str) -> None:
    logits = random_logits(3, 5001, dtype)
    logits[1, ::3] = -inf
    check(logits, 25, impl, temperature)


@pytest.mark.parametrize("temperature", [1e-30, 1e30])
def test_extreme_temperatures(temperature: float, kernel_impl: str) -> None:
    logits = torch.tensor([[1.0, -inf, 3.0, 2.0]])
    result = entropy_topk(logits, 1, temperature=temperature, impl=kernel_impl)
    assert result.entropy.item() == pytest.approx(0.0 if temperature < 1 else math.log(3), abs=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_and_offsets(dtype: torch.dtype, impl: str) -> None:
    base = random_logits(9, 4200, dtype)
    views = {
        "row stride": base[:, :4097],
        "unaligned": base[:, 3:4100],
        "every other row": base[1::2, 1:],
        "column stride": base[:, ::2],
        "transposed": base[:, :300].t().contiguous().t(),
        "expanded row": base[:1].expand(4, -1),
        "expanded column": base[:, :1].expand(-1, 50),
        "storage offset": base.flatten()[1 : 1 + 2 * 4097].view(2, 4097),
    }
    for logits in views.values():
        check(logits, 25, impl)


@pytest.mark.parametrize("dtype", DTYPES)
def test_result_is_bitwise_the_same_for_any_batch_and_thread_count(dtype: torch.dtype, kernel_impl: str) -> None:
    logits = random_logits(5, 70001, dtype)
    logits[2, 100:60000] = -inf
    logits[3] = logits[3].round()

    def bits(result: EntropyTopK) -> list[torch.Tensor]:
        return [result.indices, *(bitwise(tensor) for tensor in (result.entropy, result.logsumexp, result.values))]

    whole = bits(entropy_topk(logits, 25, impl=kernel_impl))
    for threads in thread_counts(kernel_impl, 1, 2, 3, 4, 7):
        with on_threads(threads):
            for first, last in ((0, 5), (0, 1), (1, 3), (2, 5), (4, 5)):
                part = bits(entropy_topk(logits[first:last], 25, impl=kernel_impl))
                for a, b in zip(part, whole, strict=True):
                    assert torch.equal(a, b[first:last])


@pytest.mark.parametrize("name", ["many NaN", "all NaN", "+inf and NaN", "all masked", "+inf", "constant", "ascending"])
def test_special_rows_shared_between_threads(name: str, kernel_impl: str) -> None:
    row = adversarial_rows(131072)[name].unsqueeze(0)
    alone = entropy_topk(row, 25, impl=kernel_impl)
    with on_threads(4):
        shared = entropy_topk(row, 25, impl=kernel_impl)
    for a, b in zip(alone, shared, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def test_fp64_goes_through_the_reference() -> None:
    logits = random_logits(3, 500, torch.float64)
    result = entropy_topk(logits, 7)
    assert result.entropy.dtype == result.logsumexp.dtype == result.values.dtype == torch.float64
    expected = torch_statistics(logits)
    torch.testing.assert_close(result.entropy, expected[0], rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(result.logsumexp, expected[1], rtol=1e-13, atol=1e-13)
    assert_exact_selection(result.values, result.indices, logits)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([[1.0]], 1), TypeError, r"logits must be a torch\.Tensor, got list"),
        ((torch.randn(4), 1), ValueError, r"logits must have shape \[R, V\], got \[4\]"),
        ((torch.randn(1, 2, 4), 1), ValueError, r"logits must have shape \[R, V\], got \[1, 2, 4\]"),
        ((torch.ones(1, 4, dtype=torch.int64), 1), TypeError, r"logits must be float32.*got torch\.int64"),
        ((torch.randn(1, 4), 0), ValueError, r"k must be in 1 \.\. min\(256, V=4\), got 0"),
        ((torch.randn(1, 4), -1), ValueError, "k must be in"),
        ((torch.randn(1, 4), 5), ValueError, "k must be in .*got 5"),
        ((torch.randn(1, 400), 257), ValueError, "k must be in .*got 257"),
        ((torch.randn(2, 0), 1), ValueError, "k must be in .*V=0"),
        ((torch.randn(1, 4), 2.0), TypeError, "k must be an int, got float"),
        ((torch.randn(1, 4), True), TypeError, "k must be an int, got bool"),
    ],
)
def test_bad_arguments(arguments: tuple, error: type[Exception], message: str, impl: str) -> None:
    with pytest.raises(error, match=message):
        entropy_topk(*arguments, impl=impl)


@pytest.mark.parametrize("temperature", [0.0, -1.0, nan, inf, 1e-31])
def test_bad_temperature(temperature: float, impl: str) -> None:
    with pytest.raises(ValueError, match="temperature must be in"):
        entropy_topk(torch.randn(1, 4), 1, temperature=temperature, impl=impl)
