"""The calls whose kernels are compiled: the shapes, dtypes and options that choose a different kernel or configuration.

A tensor is only allocated: what a pointer, a stride or a size is divisible by is what a kernel is specialised on.
"""

from collections.abc import Callable
from dataclasses import dataclass

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


def _entropy_topk() -> list[Case]:
    return [
        Case(
            f"entropy_topk {vocab} {name}, k={k}",
            lambda vocab=vocab, dtype=dtype, k=k: entropy_topk(torch.empty(2, vocab, dtype=dtype), k, impl="triton"),
            wide_loads=("_reduce_tiles",) if vocab % 16 == 0 else (),
        )
        for vocab, k in ((128256, 25), (128257, 25), (128256, 256), (2000, 25))
        for name, dtype in FLOATS.items()
    ]


def cases() -> list[Case]:
    return [*_entropy_topk()]
