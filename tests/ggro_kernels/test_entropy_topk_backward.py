"""The gradients of entropy_topk through every implementation."""

import pytest
import torch
from torch import inf, nan

from ggro_kernels.testing import assert_within_budget, bitwise
from tests.ggro_kernels.implementations import on_threads, thread_counts
from tests.ggro_kernels.op_calls import OpCalls
from tests.ggro_kernels.placed import entropy_topk
from tests.ggro_kernels.test_entropy_topk import DTYPES, random_logits

pytestmark = pytest.mark.usefixtures("poisoned_empty")


def loss_weights(rows: int, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of entropy, logsumexp and values, exact in bf16."""
    generator = torch.Generator().manual_seed(rows + k)
    shapes = ((rows,), (rows,), (rows, k))
    entropy, logsumexp, values = (torch.randn(shape, generator=generator).bfloat16().float() for shape in shapes)
    return entropy, logsumexp, values


def torch_gradient(logits: torch.Tensor, indices: torch.Tensor, temperature: float, dtype: torch.dtype) -> torch.Tensor:
    """By torch's own functions, entries of -inf left out."""
    gradients = torch.zeros(logits.shape, dtype=dtype)
    for_entropy, for_logsumexp, for_values = (x.to(dtype) for x in loss_weights(*indices.shape))
    for row in range(len(logits)):
        kept = logits[row] > -inf
        x = logits[row, kept].detach().to(dtype).requires_grad_()
        if len(x):
            logp = (x / temperature).log_softmax(0)
            entropy, logsumexp = -(logp.exp() * logp).sum(), (x / temperature).logsumexp(0)
            (gradients[row, kept],) = torch.autograd.grad(
                for_entropy[row] * entropy + for_logsumexp[row] * logsumexp, x
            )
    return gradients.scatter_add_(1, indices, for_values)


def gradient_of(logits: torch.Tensor, k: int, impl: str, temperature: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradient of the logits, and the indices selected."""
    leaf = logits.detach().requires_grad_()
    result = entropy_topk(leaf, k, temperature=temperature, impl=impl)
    assert not result.indices.requires_grad
    weights = (weight.to(x.dtype) for weight, x in zip(loss_weights(len(logits), k), result[:3], strict=True))
    (gradient,) = torch.autograd.grad(result[:3], leaf, list(weights))
    return gradient, result.indices


def check(logits: torch.Tensor, k: int, impl: str, temperature: float = 1.0) -> None:
    gradient, indices = gradient_of(logits, k, impl, temperature)
    assert gradient.dtype == logits.dtype and gradient.is_contiguous()
    same_precision, oracle = (
        torch_gradient(logits, indices, temperature, dtype) for dtype in (torch.float32, torch.float64)
    )
    # The logsumexp that probabilities are taken from is rounded to fp32.
    finite = logits[logits.isfinite()].double()
    magnitude = (finite.abs().max().item() if len(finite) else 0.0) / temperature
    slope = 4 / temperature
    fp32 = torch.finfo(torch.float32).eps
    scale = max(1.0, slope * max(1.0, magnitude) * fp32 / torch.finfo(logits.dtype).eps)
    assert_within_budget(gradient, same_precision, oracle, scale=scale, what="gradient")
    assert (gradient[logits == -inf] == oracle.to(logits.dtype)[logits == -inf]).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 2, 7, 31, 257, 2048, 4095, 4096, 4097, 9001])
def test_random_rows(vocab: int, dtype: torch.dtype, impl: str) -> None:
    for rows, k in ((0, 1), (1, 1), (3, 25), (2, 256)):
        check(random_logits(rows, vocab, dtype), min(k, vocab), impl)


@pytest.mark.parametrize("temperature", [0.05, 0.7, 2.0, 100.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_temperature(temperature: float, dtype: torch.dtype, impl: str) -> None:
    logits = random_logits(3, 5001, dtype)
    logits[1, ::3] = -inf
    check(logits, 25, impl, temperature)


@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_and_peaked_rows(dtype: torch.dtype, impl: str) -> None:
    logits = random_logits(6, 1000, dtype)
    logits[0, 100:] = -inf
    logits[1, :] = -inf
    logits[2, 3:] = -inf
    logits[3, 500] = 60.0
    logits[4] = 0.0
    logits[5] = logits[5] * 300 + 1000
    check(logits, 25, impl)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides(dtype: torch.dtype, impl: str) -> None:
    base = random_logits(9, 600, dtype)
    for logits in (base[:, 3:500], base[1::2, 1:], base[:, ::2], base[:, :40].t(), base[:1].expand(4, -1)):
        check(logits, 5, impl)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_entry_is_within_rounding(dtype: torch.dtype, impl: str) -> None:
    """Small probabilities too: a budget by the largest gradient would not see them."""
    logits = random_logits(2, 3001, dtype)
    leaf = logits.clone().requires_grad_()
    result = entropy_topk(leaf, 1, impl=impl)
    exact = logits.double().requires_grad_()
    logp = exact.log_softmax(1)
    for actual, oracle in (
        (result.logsumexp, exact.logsumexp(1)),
        (result.entropy, -(logp.exp() * logp).sum(1)),
    ):
        (gradient,) = torch.autograd.grad(actual.sum(), leaf, retain_graph=True)
        (expected,) = torch.autograd.grad(oracle.sum(), exact, retain_graph=True)
        # fp32 rounding of the log probability, then rounding to the dtype, of which fp16 has denormals.
        rounding, smallest = torch.finfo(dtype).eps / 2, torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        torch.testing.assert_close(gradient.double(), expected, rtol=2e-5 + rounding, atol=1e-9 + 0.6 * smallest)


def test_each_output_alone(impl: str) -> None:
    logits = torch.tensor([[0.0, 1.0, -inf, 1.0]], requires_grad=True)
    result = entropy_topk(logits, 2, temperature=2.0, impl=impl)
    p = (logits.detach() / 2).softmax(1)
    entropy = torch.special.entr(p).sum()
    expected = {
        "entropy": torch.where(p > 0, -p * (p.log() + entropy) / 2, 0.0),
        "logsumexp": p / 2,
        "values": torch.tensor([[0.0, 1.0, 0.0, 1.0]]),
    }
    for name, gradient in expected.items():
        (actual,) = torch.autograd.grad(getattr(result, name).sum(), logits, retain_graph=True)
        torch.testing.assert_close(actual, gradient)


def test_values_alone_do_not_read_statistics(impl: str) -> None:
    logits = torch.tensor([[nan, 1.0, 2.0], [-inf, -inf, -inf], [inf, 0.0, 0.0]], requires_grad=True)
    (gradient,) = torch.autograd.grad(entropy_topk(logits, 1, impl=impl).values.sum(), logits)
    assert gradient.tolist() == [[1.0, 0.0, 0.0]] * 3


def test_a_masked_out_entropy_of_nan_does_no_harm(impl: str) -> None:
    logits = torch.tensor([[-inf, -inf], [0.0, 1.0], [nan, 0.0]], requires_grad=True)
    entropy = entropy_topk(logits, 1, impl=impl).entropy
    torch.where(entropy.isnan(), 0.0, entropy).sum().backward()
    assert logits.grad[[0, 2]].tolist() == [[0.0, 0.0], [0.0, 0.0]]
    assert logits.grad[1].isfinite().all() and (logits.grad[1] != 0).all()


def test_special_rows(impl: str) -> None:
    logits = torch.tensor([[-inf, -inf, -inf], [inf, 0.0, -inf], [nan, 0.0, -inf]], requires_grad=True)
    (gradient,) = torch.autograd.grad(entropy_topk(logits, 1, impl=impl).logsumexp.sum(), logits)
    assert gradient.nan_to_num(nan=7.0).tolist() == [[0.0, 0.0, 0.0], [7.0, 0.0, 0.0], [7.0, 7.0, 0.0]]


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_gradcheck_in_fp64(temperature: float) -> None:
    logits = random_logits(3, 9, torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: entropy_topk(x, 4, temperature=temperature)[:3], logits)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_batch_or_threads(dtype: torch.dtype, kernel_impl: str) -> None:
    logits = random_logits(5, 20001, dtype)
    logits[2, 100:9000] = -inf
    weights = torch.randn(5, generator=torch.Generator().manual_seed(1))

    def bits(first: int, last: int) -> torch.Tensor:
        leaf = logits[first:last].clone().requires_grad_()
        result = entropy_topk(leaf, 25, impl=kernel_impl)
        loss = (weights[first:last] * result.entropy).sum() + result.logsumexp.sum() + result.values.float().sum()
        return bitwise(torch.autograd.grad(loss, leaf)[0])

    whole = bits(0, 5)
    for threads in thread_counts(kernel_impl, 1, 2, 3, 7):
        with on_threads(threads):
            for first, last in ((0, 5), (0, 1), (1, 4)):
                assert torch.equal(bits(first, last), whole[first:last])


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_nothing_is_computed_where_no_gradient_is_needed(mode: type, impl: str) -> None:
    logits = random_logits(2, 30, torch.float32)
    with mode(), OpCalls() as recorder:
        result = entropy_topk(logits, 3, impl=impl)
    assert len(recorder.calls) == 1
    assert all(x.grad_fn is None and not x.requires_grad for x in result)
