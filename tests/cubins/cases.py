"""The calls whose kernels are compiled: the shapes, dtypes and options that choose a different kernel or configuration.

A tensor is only allocated: what a pointer, a stride or a size is divisible by is what a kernel is specialised on.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ggro_kernels import candidate_scores, entropy_topk, score_select, weighted_bt_loss

FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Case:
    """A call of a public function with `impl="triton"`."""

    name: str
    call: Callable[[], object]
    wide_loads: bool = True
    """Whether every kernel that reads more than a few numbers must load 16 bytes at a time."""


def _entropy_topk() -> list[Case]:
    return [
        Case(
            f"entropy_topk {vocab} {name}, k={k}",
            lambda vocab=vocab, dtype=dtype, k=k: entropy_topk(torch.empty(2, vocab, dtype=dtype), k, impl="triton"),
            wide_loads=vocab % 16 == 0,
        )
        for vocab, k in ((128256, 25), (128257, 25), (128256, 256), (2000, 25))
        for name, dtype in FLOATS.items()
    ]


def _candidate_scores() -> list[Case]:
    def call(width: int, gradient_dtype: torch.dtype, table_dtype: torch.dtype) -> torch.Tensor:
        gradient, table = torch.empty(256, width, dtype=gradient_dtype), torch.empty(2, width, dtype=table_dtype)
        return candidate_scores(gradient, table, torch.zeros(256, 25, dtype=torch.int64), impl="triton")

    pairs = [(left, right) for left in FLOATS for right in FLOATS]
    return [
        Case(
            f"candidate_scores {width} {left} by {right}",
            lambda width=width, left=left, right=right: call(width, FLOATS[left], FLOATS[right]),
            wide_loads=width % 16 == 0,
        )
        for width, some in ((4096, pairs), (1031, [("fp32", "fp32"), ("bf16", "bf16")]))
        for left, right in some
    ]


def _score_select() -> list[Case]:
    def call(candidates: int, width: int, dtype: torch.dtype, sample: bool) -> object:
        hidden, head = torch.empty(2, candidates, width, dtype=dtype), torch.empty(width, dtype=dtype)
        options = {"mode": "categorical", "uniforms": torch.zeros(2)} if sample else {}
        return score_select(hidden, head, torch.empty(2, candidates, dtype=dtype), 1.0, **options, impl="triton")

    return [
        Case(
            f"score_select {candidates} {width} {name} {'categorical' if sample else 'greedy'}",
            lambda candidates=candidates, width=width, dtype=dtype, sample=sample: call(
                candidates, width, dtype, sample
            ),
            wide_loads=width % 16 == 0,
        )
        for candidates, width in ((30, 4096), (30, 1031), (500, 4096))
        for name, dtype in FLOATS.items()
        for sample in (False, True)
    ]


def _weighted_bt_loss() -> list[Case]:
    def call(dtype: torch.dtype, weights_dtype: torch.dtype, reduction: str) -> None:
        chosen, rejected = (torch.empty(8, 1024, dtype=dtype, requires_grad=True) for _ in range(2))
        positions = torch.zeros(8, 256, dtype=torch.int64)
        weights = torch.empty(8, 256, dtype=weights_dtype)
        weighted_bt_loss(chosen, rejected, positions, positions, weights, reduction=reduction, impl="triton").backward()

    return [
        Case(
            f"weighted_bt_loss {name} by {weights}, {reduction}",
            lambda name=name, weights=weights, reduction=reduction: call(FLOATS[name], FLOATS[weights], reduction),
            # Gathers, of little.
            wide_loads=False,
        )
        for name, weights, reduction in (
            ("fp32", "fp32", "mean"),
            ("fp32", "fp32", "sum"),
            ("bf16", "fp32", "mean"),
            ("bf16", "bf16", "mean"),
            ("fp16", "fp32", "mean"),
        )
    ]


def cases() -> list[Case]:
    return [*_entropy_topk(), *_candidate_scores(), *_score_select(), *_weighted_bt_loss()]
