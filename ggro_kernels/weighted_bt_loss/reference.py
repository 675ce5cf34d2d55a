"""The specification of `weighted_bt_loss` and its gradient in eager torch: any device, any float dtype."""

import torch
from torch.nn.functional import logsigmoid

from ggro_kernels.checks import check_indices
from ggro_kernels.precision import accumulation_dtype


def _gather(name: str, rewards: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    check_indices(f"{name}_positions", positions, rewards.shape[1] - 1, f"the positions of {name}_rewards")
    return rewards.double().gather(1, positions)


def _pairs(
    chosen_rewards: torch.Tensor,
    rejected_rewards: torch.Tensor,
    chosen_positions: torch.Tensor,
    rejected_positions: torch.Tensor,
    weights: torch.Tensor,
    reduction: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Positions, margins, weights and divisor; pairs of weight zero are at position 0 with margin 0."""
    dropped = weights == 0
    chosen_positions = chosen_positions.masked_fill(dropped, 0)
    rejected_positions = rejected_positions.masked_fill(dropped, 0)
    chosen = _gather("chosen", chosen_rewards, chosen_positions)
    rejected = _gather("rejected", rejected_rewards, rejected_positions)
    margins = (chosen - rejected).masked_fill(dropped, 0.0)
    count = (~dropped).sum().clamp(min=1) if reduction == "mean" else torch.ones_like(dropped.sum())
    return chosen_positions, rejected_positions, margins, weights.double(), count


def weighted_bt_loss(
    chosen_rewards: torch.Tensor,
    rejected_rewards: torch.Tensor,
    chosen_positions: torch.Tensor,
    rejected_positions: torch.Tensor,
    weights: torch.Tensor,
    reduction: str,
) -> torch.Tensor:
    """The loss, a scalar."""
    _, _, margins, exact_weights, count = _pairs(
        chosen_rewards, rejected_rewards, chosen_positions, rejected_positions, weights, reduction
    )
    return (-(exact_weights * logsigmoid(margins)).sum() / count).to(accumulation_dtype(chosen_rewards, weights))


def weighted_bt_loss_backward(
    loss_gradient: torch.Tensor,
    chosen_rewards: torch.Tensor,
    rejected_rewards: torch.Tensor,
    chosen_positions: torch.Tensor,
    rejected_positions: torch.Tensor,
    weights: torch.Tensor,
    reduction: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`(chosen_gradient[B, Tc], rejected_gradient[B, Tr])` in the dtype of the rewards."""
    chosen_positions, rejected_positions, margins, exact_weights, count = _pairs(
        chosen_rewards, rejected_rewards, chosen_positions, rejected_positions, weights, reduction
    )
    slopes = loss_gradient.double() * exact_weights * torch.sigmoid(-margins) / count
    # The slope of a dropped pair is NaN where the gradient of the loss is.
    slopes = slopes.masked_fill(weights == 0, 0.0)

    def scatter(rewards: torch.Tensor, positions: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
        zeros = torch.zeros(rewards.shape, dtype=torch.float64, device=rewards.device)
        return zeros.scatter_add_(1, positions, gradients).to(rewards.dtype)

    return (
        scatter(chosen_rewards, chosen_positions, -slopes),
        scatter(rejected_rewards, rejected_positions, slopes),
    )
