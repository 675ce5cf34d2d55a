"""The ops as torch sees them: opcheck, torch.compile, inference mode, a fresh process."""

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from typing import Any

import pytest
import torch

from ggro_kernels import candidate_scores, entropy_topk
from ggro_kernels.candidate_scores.ops import candidate_scores_op
from ggro_kernels.entropy_topk.ops import entropy_topk_op
from ggro_kernels.testing import bitwise


def run_in_fresh_process(code: str, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


ENTROPY_TOPK_SAMPLES = {
    "fp32": (torch.randn(3, 100), 5, 1.0),
    "bf16 with a row stride": (torch.randn(3, 100).bfloat16()[:, :77], 5, 0.7),
    "fp16 column stride": (torch.randn(100, 3).half().t(), 2, 1.0),
    "no rows": (torch.randn(0, 100), 5, 1.0),
    "fp64": (torch.randn(2, 10, dtype=torch.float64), 5, 1.0),
    "requires grad": (torch.randn(2, 10, requires_grad=True), 5, 1.0),
}


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("name", ENTROPY_TOPK_SAMPLES)
def test_opcheck_entropy_topk(name: str, impl: str) -> None:
    torch.library.opcheck(entropy_topk_op, (*ENTROPY_TOPK_SAMPLES[name], impl))


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.float32, torch.bfloat16)])
@pytest.mark.parametrize("positions", [0, 4])
def test_opcheck_candidate_scores(positions: int, dtypes: tuple[torch.dtype, torch.dtype], impl: str) -> None:
    arguments = (torch.randn(positions, 33).to(dtypes[0]), torch.randn(50, 33).to(dtypes[1]))
    torch.library.opcheck(candidate_scores_op, (*arguments, torch.randint(50, (positions, 5)), impl))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(dynamic: bool) -> None:
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


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_grad_modes(mode: Callable[[], Any]) -> None:
    logits = torch.randn(2, 40)
    with mode():
        result = entropy_topk(logits, 3)
    expected = entropy_topk(logits, 3)
    for a, b in zip(result, expected, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(bitwise(result.entropy), bitwise(expected.entropy))


def test_meta_tensors_give_shapes() -> None:
    result = entropy_topk(torch.empty(3, 40, dtype=torch.bfloat16, device="meta"), 4)
    assert [(list(t.shape), t.dtype) for t in result] == [
        ([3], torch.float32),
        ([3], torch.float32),
        ([3, 4], torch.bfloat16),
        ([3, 4], torch.int64),
    ]


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
