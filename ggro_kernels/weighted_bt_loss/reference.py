"""The specification of `weighted_bt_loss` and its gradient in eager torch: any device, any float dtype."""

from typing import Any

import torch
from torch.nn.functional import logsigmoid

from ggro_kernels.precision import accumulation_dtype
from ggro_kernels.weighted_bt_loss.pairs import Pairs


def _compared(pairs: Pairs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Positions, margins and divisor; pairs of weight zero are at position 0 with margin 0."""
    pairs.check_positions()
    dropped = pairs.weights == 0
    chosen_positions = pairs.chosen_positions.masked_fill(dropped, 0)
    rejected_positions = pairs.rejected_positions.masked_fill(dropped, 0)
    chosen = pairs.chosen_rewards.double().gather(1, chosen_positions)
    rejected = pairs.rejected_rewards.double().gather(1, rejected_positions)
    margins = (chosen - rejected).masked_fill(dropped, 0.0)
    count = (~dropped).sum().clamp(min=1) if pairs.reduction == "mean" else torch.ones_like(dropped.sum())
    return chosen_positions, rejected_positions, margins, count


def weighted_bt_loss(*arguments: Any) -> torch.Tensor:
    """The loss of `Pairs`, a scalar."""
    pairs = Pairs(*arguments)
    _, _, margins, count = _compared(pairs)
    loss = -(pairs.weights.double() * logsigmoid(margins)).sum() / count
    return loss.to(accumulation_dtype(pairs.chosen_rewards, pairs.weights))


def weighted_bt_loss_backward(loss_gradient: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """`(chosen_gradient[B, Tc], rejected_gradient[B, Tr])` of `Pairs` in the dtype of the rewards."""
    pairs = Pairs(*arguments)
    chosen_positions, rejected_positions, margins, count = _compared(pairs)
    slopes = loss_gradient.double() * pairs.weights.double() * torch.sigmoid(-margins) / count
    # The slope of a dropped pair is NaN where the gradient of the loss is.
    slopes = slopes.masked_fill(pairs.weights == 0, 0.0)

    def scatter(rewards: torch.Tensor, positions: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
        zeros = torch.zeros(rewards.shape, dtype=torch.float64, device=rewards.device)
        return zeros.scatter_add_(1, positions, gradients).to(rewards.dtype)

    return (
        scatter(pairs.chosen_rewards, chosen_positions, -slopes),
        scatter(pairs.rejected_rewards, rejected_positions, slopes),
    )
