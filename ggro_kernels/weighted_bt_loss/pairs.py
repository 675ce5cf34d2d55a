"""What a loss is of, as every implementation takes it."""

from typing import NamedTuple, Self

import torch

from ggro_kernels.checks import check_indices
from ggro_kernels.native import with_unit_column_stride


class Pairs(NamedTuple):
    """The arguments of `weighted_bt_loss` that the loss depends on, in their order."""

    chosen_rewards: torch.Tensor
    rejected_rewards: torch.Tensor
    chosen_positions: torch.Tensor
    rejected_positions: torch.Tensor
    weights: torch.Tensor
    reduction: str

    def check_positions(self) -> None:
        """Raise IndexError for a position outside the rewards; CPU only, elsewhere it would need a sync."""
        if self.weights.device.type != "cpu":
            return
        dropped = self.weights == 0
        for name, rewards, positions in (
            ("chosen", self.chosen_rewards, self.chosen_positions),
            ("rejected", self.rejected_rewards, self.rejected_positions),
        ):
            looked_at = positions.masked_fill(dropped, 0)
            check_indices(f"{name}_positions", looked_at, rewards.shape[1] - 1, f"the positions of {name}_rewards")

    def laid_out(self) -> Self:
        """The same with rewards of unit column stride and everything else contiguous."""
        return self._replace(
            chosen_rewards=with_unit_column_stride(self.chosen_rewards),
            rejected_rewards=with_unit_column_stride(self.rejected_rewards),
            chosen_positions=self.chosen_positions.contiguous(),
            rejected_positions=self.rejected_positions.contiguous(),
            weights=self.weights.contiguous(),
        )
