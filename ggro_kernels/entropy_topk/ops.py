"""Registration of `entropy_topk` and its gradient with torch's dispatcher."""

from typing import Any

import torch

from ggro_kernels.entropy_topk import native, reference
from ggro_kernels.library import register
from ggro_kernels.precision import accumulation_dtype

Outputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def _fake(logits: torch.Tensor, k: int, temperature: float, impl: str) -> Outputs:
    rows = logits.shape[0]
    statistics = accumulation_dtype(logits)
    return (
        logits.new_empty(rows, dtype=statistics),
        logits.new_empty(rows, dtype=statistics),
        logits.new_empty((rows, k)),
        logits.new_empty((rows, k), dtype=torch.int64),
    )


def _fake_backward(
    entropy_gradient: torch.Tensor,
    logsumexp_gradient: torch.Tensor,
    values_gradient: torch.Tensor,
    logits: torch.Tensor,
    entropy: torch.Tensor,
    logsumexp: torch.Tensor,
    indices: torch.Tensor,
    temperature: float,
    impl: str,
) -> torch.Tensor:
    return logits.new_empty(logits.shape)


entropy_topk_backward_op = register(
    "entropy_topk_backward(Tensor entropy_gradient, Tensor logsumexp_gradient, Tensor values_gradient, Tensor logits,"
    " Tensor entropy, Tensor logsumexp, Tensor indices, float temperature, str impl) -> Tensor",
    reference=reference.entropy_topk_backward,
    fake=_fake_backward,
    native=native.entropy_topk_backward,
    cuda=True,
    triton="ggro_kernels.entropy_topk.triton:entropy_topk_backward",
    dtypes_of=("logits",),
)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    logits, _, ctx.temperature, ctx.impl = inputs
    entropy, logsumexp, _, indices = output
    ctx.mark_non_differentiable(indices)
    ctx.save_for_backward(logits, entropy, logsumexp, indices)


def _backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    gradient = entropy_topk_backward_op(*gradients[:3], *ctx.saved_tensors, ctx.temperature, ctx.impl)
    return gradient, None, None, None


entropy_topk_op = register(
    "entropy_topk(Tensor logits, SymInt k, float temperature, str impl) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=reference.entropy_topk,
    fake=_fake,
    native=native.entropy_topk,
    cuda=True,
    triton="ggro_kernels.entropy_topk.triton:entropy_topk",
    dtypes_of=("logits",),
    save_for_backward=_save_for_backward,
    backward=_backward,
)
