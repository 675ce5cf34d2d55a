"""The calls whose kernels are compiled: the shapes, dtypes and options that choose a different kernel or configuration.

A tensor is only allocated: what a pointer, a stride or a size is divisible by is what a kernel is specialised on.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from ggro_kernels import entropy_topk

FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Case:
    """A call of a public function with `impl="triton"`."""

    name: str
    call: Callable[[], object]
    wide_loads: tuple[str, ...] = ()
    """The kernels that must load 16 bytes at a time."""


def _entropy_topk(vocab: int, k: int, dtype: torch.dtype) -> None:
    logits = torch.empty(2, vocab, dtype=dtype)
    entropy_topk(logits, k, impl="triton")


def _entropy_topk_backward(dtype: torch.dtype) -> None:
    logits = torch.empty(2, 128256, dtype=dtype, requires_grad=True)
    result = entropy_topk(logits, 25, temperature=0.7, impl="triton")
    torch.autograd.backward(result[:3], [torch.empty_like(x) for x in result[:3]])


def _entropy_topk_cases() -> list[Case]:
    forward = [
        Case(
            f"entropy_topk {vocab} {name}, k={k}",
            partial(_entropy_topk, vocab, k, dtype),
            wide_loads=("_reduce_tiles",) if vocab % 16 == 0 else (),
        )
        for vocab, k in ((128256, 25), (128257, 25), (262144, 256), (2000, 25))
        for name, dtype in FLOATS.items()
    ]
    backward = [
        Case(f"entropy_topk_backward {name}", partial(_entropy_topk_backward, dtype), wide_loads=("_backward",))
        for name, dtype in FLOATS.items()
    ]
    return forward + backward


def cases() -> list[Case]:
    return [*_entropy_topk_cases()]
