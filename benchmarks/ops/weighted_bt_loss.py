"""Weighted Bradley-Terry loss at many positions, forward and backward, against gathers and logsigmoid."""

from collections.abc import Callable

import torch
from torch.nn.functional import logsigmoid

from benchmarks.registry import Case, Inputs, Provider, ours

Loss = Callable[..., torch.Tensor]


def eager(
    chosen_rewards: torch.Tensor,
    rejected_rewards: torch.Tensor,
    chosen_positions: torch.Tensor,
    rejected_positions: torch.Tensor,
    weights: torch.Tensor,
) -> torch.Tensor:
    margins = chosen_rewards.gather(1, chosen_positions) - rejected_rewards.gather(1, rejected_positions)
    return -(weights * logsigmoid(margins)).mean()


def with_backward(loss: Loss) -> Callable[..., tuple[torch.Tensor, ...]]:
    """The loss and its gradients."""

    def run(
        chosen_rewards: torch.Tensor, rejected_rewards: torch.Tensor, **constants: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        value = loss(chosen_rewards, rejected_rewards, **constants)
        return value, *torch.autograd.grad(value, (chosen_rewards, rejected_rewards))

    return run


def case(rows: int, tokens: int, pairs: int, **flags: bool) -> Case:
    def inputs() -> Inputs:
        return {
            "chosen_rewards": torch.randn(rows, tokens, requires_grad=True),
            "rejected_rewards": torch.randn(rows, tokens, requires_grad=True),
            "chosen_positions": torch.randint(tokens, (rows, pairs)),
            "rejected_positions": torch.randint(tokens, (rows, pairs)),
            "weights": 1 + torch.rand(rows, pairs),
        }

    return Case(
        op="weighted_bt_loss",
        label=f"{rows} x {pairs} of {tokens}, with backward",
        shape={"rows": rows, "pairs": pairs, "tokens": tokens},
        dtype=torch.float32,
        # Positions, weights and rewards in, gradients out.
        bytes=rows * pairs * (2 * 8 + 4 + 2 * 4) + 2 * rows * tokens * 4,
        # Margin, exponential, logarithm, slope and sums.
        flops=12 * rows * pairs,
        inputs=inputs,
        providers=(ours("weighted_bt_loss", with_backward), Provider("eager", with_backward(eager))),
        **flags,
    )


SMALL = case(3, 20, 5)

CASES = [case(8, 512, 11, quick=True), case(64, 1024, 1024, shown=True)]

GPU_CASES = [case(8, 512, 11, quick=True, shown=True), case(64, 1024, 1024, shown=True)]
