"""Registration of `weighted_bt_loss` and its gradient with torch's dispatcher."""

from typing import Any

import torch

from ggro_kernels.library import register
from ggro_kernels.precision import accumulation_dtype
from ggro_kernels.weighted_bt_loss import native, reference
from ggro_kernels.weighted_bt_loss.pairs import Pairs


def _fake(*arguments: Any) -> torch.Tensor:
    pairs = Pairs(*arguments[:-1])
    return pairs.weights.new_empty((), dtype=accumulation_dtype(pairs.chosen_rewards, pairs.weights))


def _fake_backward(
    loss_gradient: torch.Tensor, chosen_rewards: torch.Tensor, rejected_rewards: torch.Tensor, *others: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    return chosen_rewards.new_empty(chosen_rewards.shape), rejected_rewards.new_empty(rejected_rewards.shape)


_PAIRS = (
    "Tensor chosen_rewards, Tensor rejected_rewards, Tensor chosen_positions, Tensor rejected_positions,"
    " Tensor weights, str reduction, str impl"
)

weighted_bt_loss_backward_op = register(
    f"weighted_bt_loss_backward(Tensor loss_gradient, {_PAIRS}) -> (Tensor, Tensor)",
    reference=reference.weighted_bt_loss_backward,
    fake=_fake_backward,
    native=native.weighted_bt_loss_backward,
    triton="ggro_kernels.weighted_bt_loss.triton:weighted_bt_loss_backward",
    dtypes_of=("chosen_rewards", "weights"),
)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    *tensors, ctx.reduction, ctx.impl = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, loss_gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    gradients = weighted_bt_loss_backward_op(loss_gradient, *ctx.saved_tensors, ctx.reduction, ctx.impl)
    return *gradients, None, None, None, None, None


weighted_bt_loss_op = register(
    f"weighted_bt_loss({_PAIRS}) -> Tensor",
    reference=reference.weighted_bt_loss,
    fake=_fake,
    native=native.weighted_bt_loss,
    triton="ggro_kernels.weighted_bt_loss.triton:weighted_bt_loss",
    dtypes_of=("chosen_rewards", "weights"),
    save_for_backward=_save_for_backward,
    backward=_backward,
)
