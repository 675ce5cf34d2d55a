"""Registration of `candidate_scores` and its gradients with torch's dispatcher."""

from typing import Any

import torch

from ggro_kernels.candidate_scores import native, reference
from ggro_kernels.library import register
from ggro_kernels.precision import accumulation_dtype


def _fake(gradient: torch.Tensor, table: torch.Tensor, ids: torch.Tensor, impl: str) -> torch.Tensor:
    return gradient.new_empty(ids.shape, dtype=accumulation_dtype(gradient, table))


def _fake_gradient_gradient(
    scores_gradient: torch.Tensor, gradient: torch.Tensor, table: torch.Tensor, ids: torch.Tensor
) -> torch.Tensor:
    return gradient.new_empty(gradient.shape)


def _fake_table_gradient(
    scores_gradient: torch.Tensor, gradient: torch.Tensor, table: torch.Tensor, ids: torch.Tensor
) -> torch.Tensor:
    return table.new_empty(table.shape)


_SAVED = "Tensor scores_gradient, Tensor gradient, Tensor table, Tensor ids"

gradient_gradient_op = register(
    f"candidate_scores_gradient_gradient({_SAVED}) -> Tensor",
    reference=reference.gradient_gradient,
    fake=_fake_gradient_gradient,
)
# An op of its own, so that a compiler does not sum repeated rows in an order of its choice.
table_gradient_op = register(
    f"candidate_scores_table_gradient({_SAVED}) -> Tensor",
    reference=reference.table_gradient,
    fake=_fake_table_gradient,
)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])


def _backward(ctx: Any, scores_gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    saved = ctx.saved_tensors
    return (
        gradient_gradient_op(scores_gradient, *saved) if ctx.needs_input_grad[0] else None,
        table_gradient_op(scores_gradient, *saved) if ctx.needs_input_grad[1] else None,
        None,
        None,
    )


candidate_scores_op = register(
    "candidate_scores(Tensor gradient, Tensor table, Tensor ids, str impl) -> Tensor",
    reference=reference.candidate_scores,
    fake=_fake,
    native=native.candidate_scores,
    cuda=True,
    triton="ggro_kernels.candidate_scores.triton:candidate_scores",
    dtypes_of=("gradient", "table"),
    save_for_backward=_save_for_backward,
    backward=_backward,
)
