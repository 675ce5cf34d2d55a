"""Recordings against the functions that they are of, run again with other values at the same addresses."""

import gc

import pytest
import torch

from ggro_hf import recording
from ggro_hf.recording import CaptureError, Recording
from ggro_kernels import entropy_topk

CPU = torch.device("cpu")


def assert_follows(function, *inputs, tolerance=0.0):
    """A replay gives what the function gives, at the addresses of the first run, whatever the inputs hold."""
    recorded = Recording(function, CPU)
    addresses = [output.data_ptr() for output in as_tuple(recorded.outputs)]
    for _ in range(3):
        for value in inputs:
            value.copy_(torch.randn(value.shape) if value.is_floating_point() else torch.randint(0, 4, value.shape))
        state = [value.clone() for value in inputs]
        expected = [output.clone() for output in as_tuple(function())]
        changed = [value.clone() for value in inputs]
        for value, before in zip(inputs, state, strict=True):
            value.copy_(before)
        recorded.replay()
        outputs = as_tuple(recorded.outputs)
        assert [output.data_ptr() for output in outputs] == addresses
        for output, target in zip([*outputs, *inputs], [*expected, *changed], strict=True):
            torch.testing.assert_close(output, target, rtol=tolerance, atol=tolerance, equal_nan=True)
    return recorded


def as_tuple(results):
    return results if isinstance(results, tuple) else (results,)


def strided(*shape):
    return torch.randn(*shape[:-1], 2 * shape[-1])[..., ::2]


ROW, OTHER, POSITIVE, INDICES = torch.randn(3, 5), torch.randn(3, 5), torch.rand(3, 5), torch.tensor([2, 0])
SQUARE = torch.randn(5, 5)
CALLS = {
    "abs": lambda x: torch.abs(x),
    "add": lambda x: torch.add(x, OTHER, alpha=2.0) + 3,
    "addmm": lambda x: torch.addmm(OTHER, x, SQUARE, beta=2, alpha=0.5),
    "baddbmm": lambda x: torch.baddbmm(OTHER[None], x[None], SQUARE[None]),
    "bitwise": lambda x: (x > 0) & (x < 1) | ~(x > 2) ^ (x == 0),
    "bmm": lambda x: torch.bmm(x[None], SQUARE[None]),
    "cat": lambda x: torch.cat([x, OTHER, x[:, :2]], -1),
    "comparisons": lambda x: torch.stack([x == 0, x != 0, x >= 0.5, x > OTHER, x <= OTHER, x < 1, x.eq(OTHER)]),
    "clamp": lambda x: x.clamp(-1, 1).clamp(min=OTHER),
    "cumsum": lambda x: x.cumsum(-1) + x.cumsum(0, dtype=torch.float64),
    "div": lambda x: x / 3 + torch.div(x, OTHER, rounding_mode="floor"),
    "dtype": lambda x: x.to(torch.bfloat16).double() * 2,
    "embedding": lambda x: torch.nn.functional.embedding((x > 0).long(), SQUARE),
    "factories": lambda x: x + torch.ones_like(x) + torch.arange(5) + torch.full((3, 1), 2.0) + x.new_zeros(5),
    "functions": lambda x: x.exp().log() + x.sin() * x.cos() + x.tanh() + x.sigmoid() + x.abs().sqrt().rsqrt(),
    "gather": lambda x: x.gather(1, INDICES.expand(3, 2)) + x.index_select(1, INDICES) + x[:, INDICES] + x[:, [1, 0]],
    "gelu": lambda x: torch.nn.functional.gelu(x) + torch.nn.functional.gelu(x, approximate="tanh"),
    "layer_norm": lambda x: torch.nn.functional.layer_norm(x, (5,), OTHER[0], OTHER[1]),
    "logical": lambda x: torch.logical_and(x > 0, torch.logical_not(x > 1)),
    "maximum": lambda x: torch.maximum(x, OTHER) - torch.minimum(x, OTHER) + x.amax(-1, keepdim=True),
    "mean": lambda x: x.mean(-1, keepdim=True) + x.mean() + x.mean(0, dtype=torch.float64),
    "norm": lambda x: torch.nn.functional.rms_norm(x, (5,), OTHER[0], 1e-6),
    "pow": lambda x: x.pow(2) + x.abs() ** 0.5 + x.reciprocal() + 2 ** x.abs(),
    "silu": lambda x: torch.nn.functional.silu(x) + torch.nn.functional.relu(x) + torch.nn.functional.softplus(x),
    "softmax": lambda x: x.softmax(-1) + x.log_softmax(0) + x.bfloat16().softmax(-1, dtype=torch.float32),
    "sort": lambda x: x.sort(descending=True, stable=True),
    "sub": lambda x: torch.sub(x, OTHER, alpha=3) - 1 + (2 - x),
    "sum": lambda x: x.sum() + x.sum(-1, keepdim=True) + x.sum((0, 1), dtype=torch.float64),
    "topk": lambda x: x.topk(2, -1),
    "triangle": lambda x: x.tril() + torch.ones(3, 5).triu() + x.masked_fill(x > 0, -torch.inf).exp(),
    "variance": lambda x: x.var(-1) + x.std(-1, unbiased=False),
    "views": lambda x: (x.T[1:].reshape(-1).view(4, 3), x.flip(0), x.roll(1, 0), x.expand(2, 3, 5)[1, :, ::2]),
    "where": lambda x: torch.where(x > 0, x, OTHER) + torch.where(x > 0, x, 0.0),
    "attention": lambda x: torch.nn.functional.scaled_dot_product_attention(
        x.view(1, 3, 5, 1), x.view(1, 3, 5, 1), x.view(1, 3, 5, 1), attn_mask=torch.ones(5, 5).tril().bool()
    ),
    "our op": lambda x: tuple(entropy_topk(x, 2)) + tuple(entropy_topk(x.T, 3, impl="reference")),
}


# Products are our own, and sum in another order than the BLAS.
PRODUCTS = {
    "linear": lambda x: torch.nn.functional.linear(x, SQUARE, OTHER[0]) + torch.nn.functional.linear(x[0], SQUARE),
    "matmul": lambda x: x @ SQUARE + x @ SQUARE.T + (x[None] @ SQUARE) + (x[0] @ SQUARE),
    "addmm": lambda x: torch.addmm(OTHER[0], x, SQUARE) + torch.addmm(OTHER[0], x, SQUARE.T),
    "of activations": lambda x: x @ x.T @ x,
}


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("name", CALLS)
def test_every_kind_of_op(name, mode):
    for x in (torch.randn(3, 5), strided(3, 5)):

        def function(x=x):
            with mode():
                return tuple(CALLS[name](x)) if name in ("sort", "topk", "views", "our op") else CALLS[name](x)

        assert_follows(function, x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", PRODUCTS)
def test_products(name, dtype, monkeypatch):
    for tensor in ("OTHER", "SQUARE"):
        monkeypatch.setitem(globals(), tensor, globals()[tensor].to(dtype))
    for x in (torch.randn(3, 5, dtype=dtype), strided(3, 5).to(dtype)):
        tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-2}[dtype]
        assert_follows(lambda x=x: PRODUCTS[name](x), x, tolerance=tolerance)


def test_every_fast_way_to_call_takes_what_its_overload_takes():
    """A name in the table has an overload with one output, of the same inputs."""
    for name in recording._FAST:
        packet, _, overload = name.removeprefix("aten::").partition(".")
        op = getattr(getattr(torch.ops.aten, packet), overload or "default")
        assert recording._out_overload(op) is not None, name


def test_gradients_are_computed_again():
    weight, x = torch.randn(4, 5), torch.randn(3, 5)

    def function():
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            loss = (torch.nn.functional.silu(leaf @ weight.T).softmax(-1) * leaf[:, :4]).sum()
            (gradient,) = torch.autograd.grad(loss, leaf)
        return loss.detach(), gradient

    # The BLAS sums in another order where a matrix lies in another way.
    assert_follows(function, x, weight, tolerance=1e-5)


def test_what_is_written_in_place_is_written_again():
    buffer, place, x = torch.zeros(6, 5), torch.zeros(2, dtype=torch.int64), torch.randn(2, 5)

    def function():
        counter = torch.zeros(2)
        counter += x[:, 0]
        counter.mul_(2)
        scratch = torch.empty(2, 5)
        scratch.copy_(x).add_(counter[:, None])
        buffer.index_copy_(0, place, scratch[:1].expand(2, 5))
        buffer[3:5, 1:] = x[:, 1:]
        x[0, 0] = 7
        return counter, buffer.sum(0)

    assert_follows(function, x, place, buffer)


def test_numbers_of_python_are_constants_and_what_is_made_of_them_once():
    x = torch.randn(5)

    def function():
        table = torch.tensor([1.0, 2, 3, 4, 5]).cumsum(0) * torch.arange(5)
        changing = torch.ones(5)
        derived = changing * 2
        changing.add_(x)
        return table * x + changing * 3 + derived

    recorded = assert_follows(function, x)
    # ones, add_, *, *, +, +
    assert len(recorded._runs) == 6


def test_a_constant_table_of_the_caller_is_no_constant():
    table, x = torch.randn(5), torch.randn(5)
    assert_follows(lambda: table.exp() * x, table, x)


def test_an_output_may_be_an_input_a_view_or_twice_there():
    x = torch.randn(3, 5)

    def function():
        made = x * 2
        return x, x[1:], made, made.T, made

    assert_follows(function, x)


def test_results_share_memory_once_they_are_dead():
    x, weight = torch.randn(1000), torch.randn(1000)

    def function():
        result = x
        for _ in range(50):
            result = (result * weight).tanh() + x
        return result

    recorded = assert_follows(function, x, weight)
    storages = {run.keywords["out"].untyped_storage().data_ptr() for run in recorded._runs}
    assert len(storages) <= 5


def test_a_recording_keeps_what_it_needs():
    def function():
        return torch.arange(100.0) * weight[0] + torch.tensor(3.0)

    weight = [torch.full((100,), 2.0)]
    recorded = Recording(function, CPU)
    weight.clear()
    gc.collect()
    ballast = [torch.full((100,), torch.nan) for _ in range(100)]
    recorded.outputs.zero_()
    recorded.replay()
    torch.testing.assert_close(recorded.outputs, torch.arange(100.0) * 2 + 3)
    del ballast


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x * float(x[0]),
        lambda x: x if x.isfinite().all() else -x,
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.unique(),
        lambda x: torch.tensor(x.tolist()),
        lambda x: torch.from_numpy(x.numpy() + 1),
        lambda x: torch.equal(x, x),
    ],
)
def test_what_brings_values_to_the_host_is_refused(function):
    x = torch.randn(5)
    with pytest.raises(CaptureError, match="to the host"):
        Recording(lambda: function(x), CPU)


@pytest.mark.parametrize("function", [torch.rand_like, torch.nn.functional.dropout, lambda x: x.uniform_()])
def test_random_numbers_are_refused(function):
    x = torch.randn(5)
    with pytest.raises(CaptureError, match="random numbers"):
        Recording(lambda: function(x), CPU)


def test_tensors_without_memory_of_their_own_are_refused():
    x = torch.eye(3).to_sparse()
    with pytest.raises(CaptureError, match="sparse"):
        Recording(lambda: x * 2, CPU)


def test_an_error_of_the_function_is_raised():
    def function():
        torch.ones(3) + torch.ones(2)

    with pytest.raises(RuntimeError, match="size of tensor"):
        Recording(function, CPU)
