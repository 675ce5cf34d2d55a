"""Every op with CUDA kernels on small odd shapes, for compute-sanitizer: `python -m tests.gpu_check.small_cases`.

Whether the results are right is for the tests to say. Exits with `NOTHING_TO_DO` where the kernels cannot run.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

import ggro_kernels
from ggro_kernels import dispatch
from ggro_kernels.library import has_cuda_kernels
from tests.ggro_kernels.op_calls import outputs_of
from tests.ggro_kernels.placed import to_gpu
from tests.gpu.samples import KERNEL_SAMPLES
from tests.gpu_check.check import NOTHING_TO_DO

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Call:
    """A public function and arguments for it."""

    op: str
    arguments: dict[str, Any]
    backward: bool = False

    def run(self, move: Callable[[torch.Tensor], torch.Tensor]) -> None:
        arguments = tree_map_only(torch.Tensor, move, self.arguments)
        if self.backward:
            arguments = {
                name: x.requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
                for name, x in arguments.items()
            }
        outputs = outputs_of(getattr(ggro_kernels, self.op)(**arguments, impl="native"))
        if self.backward:
            sum(x.float().sum() for x in outputs if x.requires_grad).backward()


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Rows that begin anywhere, the last of which ends where the memory does."""
    return torch.randn(*shape[:-1], shape[-1] + 1).to(dtype)[..., 1:]


def entropy_topk() -> Iterator[Call]:
    # The second has its maxima looked at first; 64 and 65 differ in how many columns share one.
    for dtype, (vocab, k) in product(DTYPES, ((1, 1), (5003, 5), (77, 77), (5003, 64), (2500, 65), (1031, 256))):
        yield Call("entropy_topk", {"logits": normal(2, vocab, dtype=dtype), "k": k, "temperature": 0.7})
    for dtype in DTYPES:
        yield Call("entropy_topk", {"logits": normal(2, 1031, dtype=dtype), "k": 5}, backward=True)


def candidate_scores() -> Iterator[Call]:
    for left, right, width in product(DTYPES, DTYPES, (1, 33, 300)):
        # An id outside the table is not looked up.
        ids = torch.tensor([[0, 9, 3], [10, 2, -1]])
        gradient, table = normal(2, width, dtype=left), normal(10, width, dtype=right)
        yield Call("candidate_scores", {"gradient": gradient, "table": table, "ids": ids})


def score_select() -> Iterator[Call]:
    for dtype, head, (candidates, width) in product(DTYPES, DTYPES, ((1, 1), (7, 33), (40, 300))):
        arguments = {
            "hidden": normal(2, candidates, width, dtype=dtype),
            "head": normal(width, dtype=head),
            "logits": torch.randn(2, candidates),
            "weight": 0.5,
        }
        yield Call("score_select", arguments)
        yield Call("score_select", {**arguments, "mode": "categorical", "uniforms": torch.tensor([0.0, 0.99])})


def prefix_attention() -> Iterator[Call]:
    shapes = ((2, 1, 24, 0, (1, 2)), (4, 2, 64, 70, (1,) * 5), (3, 3, 33, 17, (3, 1)), (8, 1, 128, 33, (1,) * 20))
    for dtype, (heads, key_heads, width, prefix, branches) in product(DTYPES, shapes):
        tokens = sum(branches)
        starts = [sum(branches[:index]) for index, length in enumerate(branches) for _ in range(length)]
        arguments = {
            "query": normal(1, heads, tokens, width, dtype=dtype),
            "prefix_key": normal(1, key_heads, prefix, width, dtype=dtype),
            "prefix_value": normal(1, key_heads, prefix, width, dtype=dtype),
            "branch_key": normal(1, key_heads, tokens, width, dtype=dtype),
            "branch_value": normal(1, key_heads, tokens, width, dtype=dtype),
            "branch_starts": torch.tensor([starts]),
        }
        yield Call("prefix_attention", arguments)
        backwards = {"branch_starts": torch.zeros_like(arguments["branch_starts"])}
        backwards["branch_ends"] = torch.arange(tokens).flip(0)[None]
        yield Call("prefix_attention", {**arguments, **backwards})


def projections() -> Iterator[Call]:
    for dtype, k in product(DTYPES, (1, 25, 100)):
        hidden, weight = normal(3, 33, dtype=dtype), normal(2500, 33, dtype=dtype)
        yield Call("lm_head_entropy_topk", {"hidden": hidden, "weight": weight, "k": k})
        yield Call("project_topk", {"gradient": hidden, "table": weight, "k": k})


def calls() -> list[Call]:
    """Those of ops with CUDA kernels: the samples that all tests share, then the shapes of this module."""
    torch.manual_seed(0)
    samples = [Call(sample.function.__name__, sample.arguments) for sample in KERNEL_SAMPLES.values()]
    makers = (entropy_topk, candidate_scores, score_select, prefix_attention, projections)
    ours = [call for make in makers for call in make()]
    return [call for call in samples + ours if has_cuda_kernels(call.op)]


def main() -> int:
    if dispatch.cuda_error() is not None:
        print(dispatch.cuda_error())
        return NOTHING_TO_DO
    chosen = calls()
    for call in chosen:
        call.run(to_gpu)
        # An error belongs to this call.
        torch.cuda.synchronize()
    print(f"{len(chosen)} calls of {', '.join(sorted({call.op for call in chosen}))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
