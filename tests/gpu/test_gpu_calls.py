"""Every op on a GPU: CUDA graphs, torch.compile, streams, no host sync, the choice of implementation."""

from typing import Any

import pytest
import torch

from ggro_kernels import dispatch, entropy_topk, info
from ggro_kernels.library import NAMESPACE, has_cuda_kernels, has_triton_kernels, registered_ops, takes_impl
from tests.ggro_kernels.op_calls import assert_bitwise_equal, outputs_of
from tests.ggro_kernels.samples import OpSample
from tests.gpu.samples import GpuCall, copy_of, differ, overwrite, requires_gpu, sampled, with_kernels

pytestmark = requires_gpu

# About ten milliseconds of a GPU's clock, long beside any launch.
SLEEP_CYCLES = 20_000_000


@with_kernels
def test_a_captured_graph_replays_with_new_values(sample: OpSample, impl: str) -> None:
    call = GpuCall.of(sample, impl)
    before = copy_of(call())
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    call.halve()
    for _ in range(2):
        overwrite(captured)
        graph.replay()
        expected = call()
        assert_bitwise_equal(captured, expected)
    assert differ(before, expected) or not call.has_numbers(expected)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@with_kernels
def test_compiled_code_gives_the_same_bits(sample: OpSample, impl: str, mode: str) -> None:
    call = GpuCall.of(sample, impl)
    torch.compiler.reset()

    def function(**arguments: Any) -> Any:
        return sample.function(**arguments, impl=impl)

    compiled = torch.compile(function, fullgraph=True, mode=mode)
    # With "reduce-overhead" the first run is eager, the second is captured, the third replayed.
    for _ in range(4):
        expected = call()
        torch.compiler.cudagraph_mark_step_begin()
        assert_bitwise_equal(copy_of(call(compiled)), expected)
        call.halve()


@with_kernels
def test_nothing_waits_for_the_gpu(sample: OpSample, impl: str) -> None:
    call = GpuCall.of(sample, impl)
    expected = call()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_bitwise_equal(result, expected)


def test_waiting_for_the_gpu_would_be_noticed() -> None:
    entropy = entropy_topk(torch.randn(1, 100, device="cuda"), 3).entropy
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):
            entropy.item()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@with_kernels
def test_work_is_queued_on_the_current_stream(sample: OpSample, impl: str) -> None:
    call = GpuCall.of(sample, impl)
    expected = call()
    late = [(x, x.clone(memory_format=torch.preserve_format)) for x in call.floating()]
    for x, _ in late:
        x.zero_()
    early = call()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        # On any other stream a kernel would find the zeros.
        torch.cuda._sleep(SLEEP_CYCLES)
        for x, values in late:
            x.copy_(values)
        result = call()
    stream.synchronize()
    assert_bitwise_equal(result, expected)
    assert differ(early, expected) or not call.has_numbers(expected)


@sampled
def test_auto_is_the_fastest_that_runs(sample: OpSample, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GGRO_IMPL", raising=False)
    call = GpuCall.of(sample)
    result = call()
    assert all(x.is_cuda for x in outputs_of(result))
    op = sample.function.__name__
    assert_bitwise_equal(result, GpuCall.of(sample, expected_impl(op))())
    if expected_impl(op) == "triton":
        with pytest.raises(RuntimeError, match=r"no kernel of this op for a GPU|not available"):
            GpuCall.of(sample, "native")()


def test_every_op_runs_its_kernel_on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GGRO_IMPL", raising=False)
    capabilities = info.capabilities()
    assert capabilities["triton"]["error"] is None and not capabilities["triton"]["interpreted"]
    for op in registered_ops():
        if takes_impl(op):
            assert capabilities["ops"][f"{NAMESPACE}::{op}"]["cuda"] == expected_impl(op), op


def expected_impl(op: str) -> str:
    """What `impl="auto"` is to choose on this GPU."""
    if has_cuda_kernels(op) and dispatch.cuda_error() is None:
        return "native"
    return "triton" if has_triton_kernels(op) else "reference"
