"""Registration of `weighted_bt_loss` and its gradient with torch's dispatcher."""

from typing import Any

import torch

from ggro_kernels.dispatch import resolve
from ggro_kernels.library import register
from ggro_kernels.precision import accumulation_dtype
from ggro_kernels.weighted_bt_loss import native, reference


def _run(
    chosen_rewards: torch.Tensor,
    rejected_rewards: torch.Tensor,
    chosen_positions: torch.Tensor,
    rejected_positions: torch.Tensor,
    weights: torch.Tensor,
    reduction: str,
    impl: str,
) -> torch.Tensor:
    pairs = chosen_rewards, rejected_rewards, chosen_positions, rejected_positions, weights, reduction
    if resolve(impl, weights.device, chosen_rewards.dtype, weights.dtype) == "native":
        return native.weighted_bt_loss(*pairs)
    with torch.no_grad():
        return reference.weighted_bt_loss(*pairs)


def _fake(
    chosen_rewards: torch.Tensor,
    rejected_rewards: torch.Tensor,
    chosen_positions: torch.Tensor,
    rejected_positions: torch.Tensor,
    weights: torch.Tensor,
    reduction: str,
    impl: str,
) -> torch.Tensor:
    return chosen_rewards.new_empty((), dtype=accumulation_dtype(chosen_rewards, weights))


def _run_backward(
    loss_gradient: torch.Tensor,
    chosen_rewards: torch.Tensor,
    rejected_rewards: torch.Tensor,
    chosen_positions: torch.Tensor,
    rejected_positions: torch.Tensor,
    weights: torch.Tensor,
    reduction: str,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    pairs = chosen_rewards, rejected_rewards, chosen_positions, rejected_positions, weights, reduction
    if resolve(impl, weights.device, chosen_rewards.dtype, weights.dtype) == "native":
        return native.weighted_bt_loss_backward(loss_gradient, *pairs)
    with torch.no_grad():
        return reference.weighted_bt_loss_backward(loss_gradient, *pairs)


def _fake_backward(
    loss_gradient: torch.Tensor,
    chosen_rewards: torch.Tensor,
    rejected_rewards: torch.Tensor,
    chosen_positions: torch.Tensor,
    rejected_positions: torch.Tensor,
    weights: torch.Tensor,
    reduction: str,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    return chosen_rewards.new_empty(chosen_rewards.shape), rejected_rewards.new_empty(rejected_rewards.shape)


_PAIRS = (
    "Tensor chosen_rewards, Tensor rejected_rewards, Tensor chosen_positions, Tensor rejected_positions,"
    " Tensor weights, str reduction, str impl"
)

weighted_bt_loss_backward_op = register(
    f"weighted_bt_loss_backward(Tensor loss_gradient, {_PAIRS}) -> (Tensor, Tensor)", _run_backward, _fake_backward
)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    *tensors, ctx.reduction, ctx.impl = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, loss_gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    gradients = weighted_bt_loss_backward_op(loss_gradient, *ctx.saved_tensors, ctx.reduction, ctx.impl)
    return *gradients, None, None, None, None, None


weighted_bt_loss_op = register(
    f"weighted_bt_loss({_PAIRS}) -> Tensor", _run, _fake, save_for_backward=_save_for_backward, backward=_backward
)
