"""Registration of `batch_invariant_linear` and its gradient with torch's dispatcher."""

from typing import Any

import torch

from ggro_kernels.batch_invariant_linear import native, reference
from ggro_kernels.library import register


def _fake(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, impl: str) -> torch.Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


def _fake_backward(gradient: torch.Tensor, weight: torch.Tensor, impl: str) -> torch.Tensor:
    return gradient.new_empty((gradient.shape[0], weight.shape[1]))


batch_invariant_linear_backward_op = register(
    "batch_invariant_linear_backward(Tensor gradient, Tensor weight, str impl) -> Tensor",
    reference=reference.batch_invariant_linear_backward,
    fake=_fake_backward,
    native=native.batch_invariant_linear_backward,
    dtypes_of=("gradient", "weight"),
)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, weight, _, ctx.impl = inputs
    ctx.save_for_backward(weight)


def _backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    (weight,) = ctx.saved_tensors
    needed = ctx.needs_input_grad[0]
    return batch_invariant_linear_backward_op(gradient, weight, ctx.impl) if needed else None, None, None, None


batch_invariant_linear_op = register(
    "batch_invariant_linear(Tensor x, Tensor weight, Tensor? bias, str impl) -> Tensor",
    reference=reference.batch_invariant_linear,
    fake=_fake,
    native=native.batch_invariant_linear,
    dtypes_of=("x", "weight"),
    save_for_backward=_save_for_backward,
    backward=_backward,
)
