"""`weighted_bt_loss` and its gradient by csrc/cpu/weighted_bt_loss.cpp."""

from collections.abc import Callable
from typing import Any

import torch

from ggro_kernels.dispatch import native
from ggro_kernels.native import DTYPE_CODES, address
from ggro_kernels.weighted_bt_loss.pairs import Pairs


def _run(
    kernel: Callable[..., None],
    pairs: Pairs,
    *,
    loss: torch.Tensor | None = None,
    loss_gradient: torch.Tensor | None = None,
    chosen_gradient: torch.Tensor | None = None,
    rejected_gradient: torch.Tensor | None = None,
) -> None:
    """Call `kernel` with the pairs and those of the other tensors that it has to do with."""
    pairs = pairs.laid_out()
    kernel(
        pairs.chosen_rewards.data_ptr(),
        pairs.chosen_rewards.shape[1],
        pairs.chosen_rewards.stride(0),
        pairs.rejected_rewards.data_ptr(),
        pairs.rejected_rewards.shape[1],
        pairs.rejected_rewards.stride(0),
        DTYPE_CODES[pairs.chosen_rewards.dtype],
        pairs.chosen_positions.data_ptr(),
        pairs.rejected_positions.data_ptr(),
        pairs.weights.data_ptr(),
        DTYPE_CODES[pairs.weights.dtype],
        *pairs.weights.shape,
        pairs.reduction == "mean",
        address(loss),
        address(loss_gradient),
        address(chosen_gradient),
        address(rejected_gradient),
        torch.get_num_threads(),
    )


def weighted_bt_loss(*arguments: Any) -> torch.Tensor:
    """The loss of `Pairs` on a CPU, a scalar."""
    loss = torch.empty((), dtype=torch.float32)
    _run(native().weighted_bt_loss, Pairs(*arguments), loss=loss)
    return loss


def weighted_bt_loss_backward(loss_gradient: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """`(chosen_gradient[B, Tc], rejected_gradient[B, Tr])` of `Pairs` on a CPU in the dtype of the rewards."""
    pairs = Pairs(*arguments)
    chosen_gradient = torch.empty(pairs.chosen_rewards.shape, dtype=pairs.chosen_rewards.dtype)
    rejected_gradient = torch.empty(pairs.rejected_rewards.shape, dtype=pairs.rejected_rewards.dtype)
    _run(
        native().weighted_bt_loss_backward,
        pairs,
        loss_gradient=loss_gradient,
        chosen_gradient=chosen_gradient,
        rejected_gradient=rejected_gradient,
    )
    return chosen_gradient, rejected_gradient
