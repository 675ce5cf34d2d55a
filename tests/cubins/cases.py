"""The calls whose kernels are compiled: the shapes, dtypes and options that choose a different kernel or configuration.

A tensor is only allocated: what a pointer, a stride or a size is divisible by is what a kernel is specialised on.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from ggro_kernels import entropy_topk, prefix_attention

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


def _prefix_attention(
    dtype: torch.dtype, tokens: int, heads: tuple[int, int], widths: tuple[int, int], every_option: bool
) -> None:
    def empty(heads: int, length: int, width: int) -> torch.Tensor:
        return torch.empty(2, heads, length, width, dtype=dtype)

    (query_heads, key_heads), (width, value_width) = heads, widths
    options: dict = {}
    if every_option:
        options = {"prefix_lengths": torch.zeros(2, dtype=torch.int64), "window": 100, "softcap": 5.0}
    prefix_attention(
        empty(query_heads, tokens, width),
        empty(key_heads, 2048, width),
        empty(key_heads, 2048, value_width),
        empty(key_heads, tokens, width),
        empty(key_heads, tokens, value_width),
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
            wide_loads=("_attend_kernel", "_merge_kernel") if widths[0] % 16 == 0 else (),
        )
        for heads, widths, tokens, every_option in (
            ((32, 8), (128, 128), 1, False),
            ((32, 8), (128, 128), 30, False),
            ((32, 8), (128, 128), 30, True),
            ((4, 4), (64, 64), 30, False),
            ((28, 4), (24, 80), 30, True),
            ((16, 8), (256, 256), 30, True),
            ((16, 1), (576, 512), 30, False),
        )
        for name, dtype in FLOATS.items()
    ]


def cases() -> list[Case]:
    return [*_entropy_topk_cases(), *_prefix_attention_cases()]
