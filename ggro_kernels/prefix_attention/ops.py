"""Registration of `prefix_attention` and its gradient with torch's dispatcher."""

from typing import Any

import torch

from ggro_kernels.library import register
from ggro_kernels.prefix_attention import native, reference


def _fake(
    query: torch.Tensor,
    prefix_key: torch.Tensor,
    prefix_value: torch.Tensor,
    branch_key: torch.Tensor,
    branch_value: torch.Tensor,
    branch_starts: torch.Tensor,
    branch_ends: torch.Tensor | None,
    prefix_lengths: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    window: int | None,
    impl: str,
) -> torch.Tensor:
    batch, query_heads, tokens, _ = query.shape
    return query.new_empty(batch, tokens, query_heads, prefix_value.shape[3]).transpose(1, 2)


def _fake_backward(
    gradient: torch.Tensor,
    query: torch.Tensor,
    prefix_key: torch.Tensor,
    prefix_value: torch.Tensor,
    branch_key: torch.Tensor,
    branch_value: torch.Tensor,
    branch_starts: torch.Tensor,
    branch_ends: torch.Tensor | None,
    prefix_lengths: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    window: int | None,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    of_query, of_key, of_value = (
        query.new_empty(x.transpose(1, 2).shape).transpose(1, 2) for x in (query, branch_key, branch_value)
    )
    return of_query, of_key, of_value


_INPUTS = (
    "Tensor query, Tensor prefix_key, Tensor prefix_value, Tensor branch_key, Tensor branch_value, "
    "Tensor branch_starts, Tensor? branch_ends, Tensor? prefix_lengths, float scale, float? softcap, SymInt? window, "
    "str impl"
)

prefix_attention_backward_op = register(
    f"prefix_attention_backward(Tensor gradient, {_INPUTS}) -> (Tensor, Tensor, Tensor)",
    reference=reference.prefix_attention_backward,
    fake=_fake_backward,
    native=native.prefix_attention_backward,
    dtypes_of=("query",),
)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    *tensors, ctx.scale, ctx.softcap, ctx.window, ctx.impl = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    # Not all that runs forward has a kernel for the way back.
    impl = "reference" if ctx.impl == "reference" else "auto"
    options = ctx.scale, ctx.softcap, ctx.window, impl
    of_query, of_key, of_value = prefix_attention_backward_op(gradient, *ctx.saved_tensors, *options)
    return of_query, None, None, of_key, of_value, *[None] * 7


prefix_attention_op = register(
    f"prefix_attention({_INPUTS}) -> Tensor",
    reference=reference.prefix_attention,
    fake=_fake,
    native=native.prefix_attention,
    cuda=True,
    triton="ggro_kernels.prefix_attention.triton:prefix_attention",
    dtypes_of=("query",),
    save_for_backward=_save_for_backward,
    backward=_backward,
)
