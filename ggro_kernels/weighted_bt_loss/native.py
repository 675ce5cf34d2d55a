"""`weighted_bt_loss` and its gradient by csrc/cpu/weighted_bt_loss.cpp."""

from collections.abc import Callable

import torch

from ggro_kernels.dispatch import native
from ggro_kernels.native import DTYPE_CODES, address, with_unit_column_stride


def _run(
    kernel: Callable[..., None],
    chosen_rewards: torch.Tensor,
    rejected_rewards: torch.Tensor,
    chosen_positions: torch.Tensor,
    rejected_positions: torch.Tensor,
    weights: torch.Tensor,
    reduction: str,
    *,
    loss: torch.Tensor | None = None,
    loss_gradient: torch.Tensor | None = None,
    chosen_gradient: torch.Tensor | None = None,
    rejected_gradient: torch.Tensor | None = None,
) -> None:
    """Call `kernel` with the pairs and those of the other tensors that it has to do with."""
    chosen_rewards, rejected_rewards = map(with_unit_column_stride, (chosen_rewards, rejected_rewards))
    chosen_positions, rejected_positions = chosen_positions.contiguous(), rejected_positions.contiguous()
    weights = weights.contiguous()
    rows, pairs = weights.shape
    kernel(
        chosen_rewards.data_ptr(),
        chosen_rewards.shape[1],
        chosen_rewards.stride(0),
        rejected_rewards.data_ptr(),
        rejected_rewards.shape[1],
        rejected_rewards.stride(0),
        DTYPE_CODES[chosen_rewards.dtype],
        chosen_positions.data_ptr(),
        rejected_positions.data_ptr(),
        weights.data_ptr(),
        DTYPE_CODES[weights.dtype],
        rows,
        pairs,
        reduction == "mean",
        address(loss),
        address(loss_gradient),
        address(chosen_gradient),
        address(rejected_gradient),
        torch.get_num_threads(),
    )


def weighted_bt_loss(
    chosen_rewards: torch.Tensor,
    rejected_rewards: torch.Tensor,
    chosen_positions: torch.Tensor,
    rejected_positions: torch.Tensor,
    weights: torch.Tensor,
    reduction: str,
) -> torch.Tensor:
    """The loss of CPU tensors, a scalar."""
    loss = torch.empty((), dtype=torch.float32)
    _run(
        native().weighted_bt_loss,
        chosen_rewards,
        rejected_rewards,
        chosen_positions,
        rejected_positions,
        weights,
        reduction,
        loss=loss,
    )
    return loss


def weighted_bt_loss_backward(
    loss_gradient: torch.Tensor,
    chosen_rewards: torch.Tensor,
    rejected_rewards: torch.Tensor,
    chosen_positions: torch.Tensor,
    rejected_positions: torch.Tensor,
    weights: torch.Tensor,
    reduction: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`(chosen_gradient[B, Tc], rejected_gradient[B, Tr])` of CPU tensors in the dtype of the rewards."""
    chosen_gradient = torch.empty(chosen_rewards.shape, dtype=chosen_rewards.dtype)
    rejected_gradient = torch.empty(rejected_rewards.shape, dtype=rejected_rewards.dtype)
    _run(
        native().weighted_bt_loss_backward,
        chosen_rewards,
        rejected_rewards,
        chosen_positions,
        rejected_positions,
        weights,
        reduction,
        loss_gradient=loss_gradient,
        chosen_gradient=chosen_gradient,
        rejected_gradient=rejected_gradient,
    )
    return chosen_gradient, rejected_gradient
