"""The calls whose kernels are compiled: the shapes, dtypes and options that choose a different kernel or configuration.

A tensor is only allocated: what a pointer, a stride or a size is divisible by is what a kernel is specialised on.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ggro_kernels import entropy_topk, lm_head_entropy_topk, merge_partials, project_topk

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


def _pairs() -> list[tuple[str, torch.dtype, torch.dtype]]:
    """One dtype twice, and fp32 with a table of bf16."""
    same = [(name, dtype, dtype) for name, dtype in FLOATS.items()]
    return [*same, ("fp32 with bf16", torch.float32, torch.bfloat16)]


def _project_topk() -> list[Case]:
    return [
        Case(
            f"project_topk {rows} x {width} x 128256 {name}, k={k}",
            lambda rows=rows, width=width, k=k, left=left, right=right: project_topk(
                torch.empty(rows, width, dtype=left),
                torch.empty(128256, width, dtype=right),
                k,
                bias=torch.empty(128256),
                forbidden=torch.empty(128256, dtype=torch.bool),
                impl="triton",
            ),
            wide_loads=("_scores",) if width % 16 == 0 else (),
        )
        # 256 rows take several slabs, whose best are merged.
        for rows, width, k in ((20, 4096, 256), (20, 1031, 64), (256, 4096, 25))
        for name, left, right in _pairs()
    ]


def _lm_head_entropy_topk() -> list[Case]:
    return [
        Case(
            f"lm_head_entropy_topk 1 x 4096 x 128256 {name}, k={k}, softcap {softcap}",
            lambda k=k, left=left, right=right, softcap=softcap: lm_head_entropy_topk(
                torch.empty(1, 4096, dtype=left),
                torch.empty(128256, 4096, dtype=right),
                k,
                softcap=softcap,
                temperature=0.7,
                impl="triton",
            ),
            wide_loads=("_scores",),
        )
        for k, softcap in ((25, None), (64, 30.0))
        for name, left, right in _pairs()
    ]


def _merge_partials() -> list[Case]:
    return [
        Case(
            f"merge_partials {shards} x {k} {name}",
            lambda shards=shards, k=k, dtype=dtype: merge_partials(
                *torch.empty(2, shards, 64).unbind(),
                torch.empty(shards, 64, k, dtype=dtype),
                torch.empty(shards, 64, k, dtype=torch.int64),
                torch.empty(shards, dtype=torch.int64),
                impl="triton",
            ),
        )
        for shards, k in ((2, 25), (4, 25), (8, 25), (64, 256))
        for name, dtype in FLOATS.items()
    ]


def cases() -> list[Case]:
    return [*_entropy_topk(), *_project_topk(), *_lm_head_entropy_topk(), *_merge_partials()]
