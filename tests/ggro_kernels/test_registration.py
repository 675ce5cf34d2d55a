"""Every op as torch sees it: opcheck, torch.compile, inference mode, meta tensors, threads, a fresh process."""

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_map_only

from ggro_kernels import candidate_scores, entropy_topk
from ggro_kernels.library import NAMESPACE, registered_ops
from tests.ggro_kernels.implementations import on_threads
from tests.ggro_kernels.op_calls import OpCalls, assert_bitwise_equal, outputs_of
from tests.ggro_kernels.samples import SAMPLES, OpSample

sampled = pytest.mark.parametrize("sample", [pytest.param(sample, id=name) for name, sample in SAMPLES.items()])


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
    )


def run_in_fresh_process(code: str) -> None:
    result = run_python(code)
    assert result.returncode == 0, result.stderr


def ops_called_by(sample: OpSample, **options: Any) -> list[tuple[Any, tuple]]:
    """The ops of a sample and of its backward pass, with their arguments."""
    arguments = {
        name: value.detach().requires_grad_()
        if isinstance(value, torch.Tensor) and value.is_floating_point()
        else value
        for name, value in sample.arguments.items()
    }
    with OpCalls() as recorder:
        differentiable = [x for x in outputs_of(sample.function(**arguments, **options)) if x.requires_grad]
        if differentiable:
            sum(x.double().sum() for x in differentiable).backward()
    return recorder.calls


def test_every_op_has_a_sample() -> None:
    called = {
        func._schema.name.removeprefix(f"{NAMESPACE}::")
        for sample in SAMPLES.values()
        for func, _ in ops_called_by(sample)
    }
    assert called == set(registered_ops())


@pytest.mark.parametrize("impl", ["auto", "reference"])
@sampled
def test_opcheck(sample: OpSample, impl: str) -> None:
    calls = ops_called_by(sample, impl=impl)
    assert calls
    for func, arguments in calls:
        torch.library.opcheck(func, tree_map_only(torch.Tensor, torch.Tensor.detach, arguments))


@pytest.mark.parametrize("dynamic", [False, True])
@sampled
def test_compile_fullgraph(sample: OpSample, dynamic: bool) -> None:
    torch.compiler.reset()
    compiled = torch.compile(sample.function, fullgraph=True, dynamic=dynamic)
    assert_bitwise_equal(compiled(**sample.arguments), sample.function(**sample.arguments))


@pytest.mark.parametrize("dynamic", [False, True])
@sampled
def test_compile_fullgraph_with_backward(sample: OpSample, dynamic: bool) -> None:
    def gradients(function: Callable[..., Any]) -> list[torch.Tensor | None]:
        leaves = {
            name: value.detach().requires_grad_()
            for name, value in sample.arguments.items()
            if isinstance(value, torch.Tensor) and value.is_floating_point()
        }
        differentiable = [x for x in outputs_of(function(**{**sample.arguments, **leaves})) if x.requires_grad]
        if not differentiable:
            return []
        loss = sum((x.double() * (i + 1)).sum() for i, x in enumerate(differentiable))
        return list(torch.autograd.grad(loss, list(leaves.values()), allow_unused=True))

    torch.compiler.reset()
    expected = gradients(sample.function)
    if not expected:
        pytest.skip("not differentiable")
    compiled = gradients(torch.compile(sample.function, fullgraph=True, dynamic=dynamic))
    for actual, eager in zip(compiled, expected, strict=True):
        assert (actual is None) == (eager is None)
        if actual is not None:
            assert_bitwise_equal(actual, eager)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
@sampled
def test_no_graph_without_gradients(sample: OpSample, mode: Callable[[], Any]) -> None:
    arguments = {
        name: value.detach().requires_grad_()
        if isinstance(value, torch.Tensor) and value.is_floating_point()
        else value
        for name, value in sample.arguments.items()
    }
    with mode():
        assert not any(x.requires_grad for x in outputs_of(sample.function(**arguments)))


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
@sampled
def test_grad_modes(sample: OpSample, mode: Callable[[], Any]) -> None:
    with mode():
        result = sample.function(**sample.arguments)
    assert_bitwise_equal(result, sample.function(**sample.arguments))


@sampled
def test_meta_tensors_give_shapes(sample: OpSample) -> None:
    arguments = {
        name: value.to("meta") if isinstance(value, torch.Tensor) else value for name, value in sample.arguments.items()
    }
    shapes = outputs_of(sample.function(**arguments))
    for meta, real in zip(shapes, outputs_of(sample.function(**sample.arguments)), strict=True):
        assert meta.device.type == "meta"
        assert (meta.shape, meta.dtype, meta.stride()) == (real.shape, real.dtype, real.stride())


@sampled
def test_same_bits_for_any_number_of_threads(sample: OpSample, native_impl: str) -> None:
    if any(value.dtype == torch.float64 for value in sample.arguments.values() if isinstance(value, torch.Tensor)):
        pytest.skip("fp64 has no native kernels")
    alone = sample.function(**sample.arguments, impl=native_impl)
    for threads in (2, 3, 4, 7):
        with on_threads(threads):
            assert_bitwise_equal(sample.function(**sample.arguments, impl=native_impl), alone)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_two_ops_for_several_shapes(dynamic: bool) -> None:
    def step(logits: torch.Tensor, table: torch.Tensor, temperature: float) -> tuple[torch.Tensor, ...]:
        result = entropy_topk(logits * 2, 5, temperature=temperature)
        scores = candidate_scores(logits[:, :16], table, result.indices)
        return result.entropy + 1, result.logsumexp, result.values, result.indices, scores

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic)
    for rows, vocab, temperature in ((3, 100, 1.0), (4, 101, 0.7), (1, 257, 0.7)):
        logits, table = torch.randn(rows, vocab), torch.randn(vocab, 16)
        arguments = (logits, table, temperature)
        for actual, expected in zip(compiled(*arguments), step(*arguments), strict=True):
            torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_compile_with_gradients_elsewhere_in_the_graph() -> None:
    weight = torch.randn(8, 50, requires_grad=True)

    def loss(hidden: torch.Tensor) -> torch.Tensor:
        logits = hidden @ weight
        return (logits * entropy_topk(logits, 3).entropy.unsqueeze(1)).sum()

    hidden = torch.randn(4, 8)
    (eager,) = torch.autograd.grad(loss(hidden), weight)
    (compiled,) = torch.autograd.grad(torch.compile(loss, fullgraph=True)(hidden), weight)
    torch.testing.assert_close(compiled, eager)


def test_error_inside_compiled_code_is_the_op_error() -> None:
    compiled = torch.compile(candidate_scores, fullgraph=True)
    with pytest.raises(IndexError, match=r"ids\[0, 0\] must be in 0 \.\. 4"):
        compiled(torch.randn(1, 3), torch.randn(5, 3), torch.tensor([[5]]))


def test_first_call_of_a_process_under_compile() -> None:
    run_in_fresh_process(
        """
        import torch, ggro_kernels
        x = torch.randn(2, 300)
        compiled = torch.compile(lambda x: ggro_kernels.entropy_topk(x, 7), fullgraph=True)(x)
        assert isinstance(compiled, ggro_kernels.EntropyTopK)
        for a, b in zip(compiled, ggro_kernels.entropy_topk(x, 7)):
            assert torch.equal(a, b)
        """
    )


def test_import_needs_torch_only() -> None:
    run_in_fresh_process(
        """
        import sys
        for name in ("triton", "transformers", "numpy", "safetensors", "tqdm", "jinja2"):
            sys.modules[name] = None
        import torch, ggro_kernels, ggro_kernels.info, ggro_kernels.testing
        for impl in ("auto", "reference"):
            ggro_kernels.entropy_topk(torch.randn(2, 30), 3, impl=impl)
        """
    )
