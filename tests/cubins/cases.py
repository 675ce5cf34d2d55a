"""The calls whose kernels are compiled: the shapes, dtypes and options that choose a different kernel or configuration.

A tensor is only allocated: what a pointer, a stride or a size is divisible by is what a kernel is specialised on.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from ggro_kernels import (
    candidate_scores,
    entropy_topk,
    lm_head_entropy_topk,
    merge_partials,
    prefix_attention,
    project_topk,
    score_select,
    weighted_bt_loss,
)

FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Where fp16 is loaded and multiplied as bf16 is, by the same configuration.
FP32_AND_HALF = {"fp32": torch.float32, "bf16": torch.bfloat16}


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
        for vocab, k, dtypes in (
            (128256, 25, FLOATS),
            (128257, 25, FP32_AND_HALF),
            (262144, 256, FP32_AND_HALF),
            (2000, 25, FP32_AND_HALF),
        )
        for name, dtype in dtypes.items()
    ]
    backward = [
        Case(f"entropy_topk_backward {name}", partial(_entropy_topk_backward, dtype), wide_loads=("_backward",))
        for name, dtype in FLOATS.items()
    ]
    return forward + backward


def _prefix_attention(
    dtype: torch.dtype, tokens: int, heads: tuple[int, int], widths: tuple[int, int], every_option: bool
) -> None:
    def empty(heads: int, length: int, width: int) -> torch.Tensor:
        return torch.empty(2, heads, length, width, dtype=dtype)

    branch_tokens = 512 if every_option else tokens
    (query_heads, key_heads), (width, value_width) = heads, widths
    options: dict = {}
    if every_option:
        ends = torch.zeros(2, tokens, dtype=torch.int64)
        lengths = torch.zeros(2, dtype=torch.int64)
        options = {"branch_ends": ends, "prefix_lengths": lengths, "window": 100, "softcap": 5.0}
    prefix_attention(
        empty(query_heads, tokens, width),
        empty(key_heads, 2048, width),
        empty(key_heads, 2048, value_width),
        empty(key_heads, branch_tokens, width),
        empty(key_heads, branch_tokens, value_width),
        torch.zeros(2, tokens, dtype=torch.int64),
        **options,
        impl="triton",
    )


def _prefix_attention_cases() -> list[Case]:
    return [
        Case(
            f"prefix_attention {name}, {tokens} tokens, {'/'.join(map(str, heads))} x {'/'.join(map(str, widths))}"
            + ", every option" * every_option,
            partial(_prefix_attention, dtype, tokens, heads, widths, every_option),
            wide_loads=("attend_kernel", "merge_kernel") if widths[0] % 16 == 0 else (),
        )
        for heads, widths, tokens, every_option in (
            ((32, 8), (128, 128), 1, False),
            ((32, 8), (128, 128), 30, True),
            ((4, 4), (64, 64), 30, False),
            ((28, 4), (24, 80), 30, True),
            ((16, 8), (256, 256), 30, True),
            ((16, 1), (576, 512), 30, False),
        )
        for name, dtype in FP32_AND_HALF.items()
    ]


def _candidate_scores_cases() -> list[Case]:
    def call(width: int, gradient_dtype: torch.dtype, table_dtype: torch.dtype) -> torch.Tensor:
        gradient, table = torch.empty(256, width, dtype=gradient_dtype), torch.empty(2, width, dtype=table_dtype)
        return candidate_scores(gradient, table, torch.zeros(256, 25, dtype=torch.int64), impl="triton")

    pairs = [(left, right) for left in FP32_AND_HALF for right in FP32_AND_HALF]
    return [
        Case(
            f"candidate_scores {width} {left} by {right}",
            lambda width=width, left=left, right=right: call(width, FLOATS[left], FLOATS[right]),
            wide_loads=("_candidate_scores_kernel",) if width % 16 == 0 else (),
        )
        for width, some in ((4096, pairs), (1031, [("fp32", "fp32"), ("bf16", "bf16")]))
        for left, right in some
    ]


def _score_select_cases() -> list[Case]:
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
            wide_loads=("_score_select_kernel",) if width % 16 == 0 else (),
        )
        for candidates, width in ((30, 4096), (30, 1031), (500, 4096))
        for name, dtype in FP32_AND_HALF.items()
        for sample in (False, True)
    ]


def _weighted_bt_loss_cases() -> list[Case]:
    def call(dtype: torch.dtype, weights_dtype: torch.dtype, reduction: str) -> None:
        chosen, rejected = (torch.empty(8, 1024, dtype=dtype, requires_grad=True) for _ in range(2))
        positions = torch.zeros(8, 256, dtype=torch.int64)
        weights = torch.empty(8, 256, dtype=weights_dtype)
        weighted_bt_loss(chosen, rejected, positions, positions, weights, reduction=reduction, impl="triton").backward()

    return [
        Case(
            f"weighted_bt_loss {name} by {weights}, {reduction}",
            lambda name=name, weights=weights, reduction=reduction: call(FLOATS[name], FLOATS[weights], reduction),
        )
        for name, weights, reduction in (
            ("fp32", "fp32", "mean"),
            ("fp32", "fp32", "sum"),
            ("bf16", "fp32", "mean"),
            ("bf16", "bf16", "mean"),
            ("fp16", "fp32", "mean"),
        )
    ]


def _pairs() -> list[tuple[str, torch.dtype, torch.dtype]]:
    """One dtype twice, and fp32 with a table of bf16."""
    same = [(name, dtype, dtype) for name, dtype in FP32_AND_HALF.items()]
    return [*same, ("fp32 with bf16", torch.float32, torch.bfloat16)]


def _project_topk_cases() -> list[Case]:
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


def _lm_head_entropy_topk_cases() -> list[Case]:
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


def _merge_partials_cases() -> list[Case]:
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
        for shards, k in ((2, 25), (8, 25), (64, 256))
        for name, dtype in FP32_AND_HALF.items()
    ]


def cases() -> list[Case]:
    return [
        *_entropy_topk_cases(),
        *_prefix_attention_cases(),
        *_candidate_scores_cases(),
        *_score_select_cases(),
        *_weighted_bt_loss_cases(),
        *_project_topk_cases(),
        *_lm_head_entropy_topk_cases(),
        *_merge_partials_cases(),
    ]
