"""The weighted Bradley-Terry loss of a reward model on partial responses."""

import torch

from ggro_kernels.checks import check_choice, check_floating, check_int64, check_shape, check_tensor
from ggro_kernels.dispatch import check_impl
from ggro_kernels.weighted_bt_loss.ops import weighted_bt_loss_op


def weighted_bt_loss(
    chosen_rewards: torch.Tensor,
    rejected_rewards: torch.Tensor,
    chosen_positions: torch.Tensor,
    rejected_positions: torch.Tensor,
    weights: torch.Tensor,
    *,
    reduction: str = "mean",
    impl: str = "auto",
) -> torch.Tensor:
    """`-w * log sigmoid(chosen reward - rejected reward)` over K pairs of positions in each of B pairs of responses.

    One forward pass of a causal reward model gives the reward of every prefix of a response; this gathers those that
    a training step compares.

    Args:
        chosen_rewards: [B, Tc] rewards at every position of the preferred response, fp32, bf16 or fp16 (fp64 by the
            reference only), Tc >= 1; any strides, B may be 0. Differentiable.
        rejected_rewards: [B, Tr] those of the other response, Tr >= 1, same dtype. Differentiable.
        chosen_positions: [B, K] int64, each in 0 .. Tc - 1.
        rejected_positions: [B, K] int64, each in 0 .. Tr - 1.
        weights: [B, K], of any of these dtypes, constants: no gradient reaches them. A pair of weight zero does not
            exist, neither its positions nor its rewards are looked at: that is how to pad, and how
            `binary_entropy_weight` drops a pair.
        reduction: "mean" divides the sum by the number of pairs of non-zero weight (not by the sum of the weights),
            "sum" does not.
        impl: "auto", "native", "triton" or "reference"; an explicit request runs or raises.

    Returns:
        The loss, a scalar, in nats times weight: fp32 (fp64 if rewards or weights are fp64), summed in fp64 in a fixed
        order whatever the number of threads; 0 if there is no pair. The gradients have the dtype of the rewards, and
        those of a position that occurs several times are summed in the order of the pairs.

    Raises:
        TypeError, ValueError: wrong dtypes, shapes, devices, reduction or impl.
        IndexError: a position outside the rewards (checked on a CPU; on an accelerator the check would need a sync,
            and Triton's loss is NaN).
        RuntimeError: the implementation asked for is not available.

    Source: SP-PRM, weighted preference loss on partial sequences; its mean is over the rows left after those of weight
    zero were filtered out.
    """
    check_tensor("chosen_rewards", chosen_rewards, "[B, Tc]")
    check_tensor("rejected_rewards", rejected_rewards, "[B, Tr]", like=chosen_rewards)
    check_tensor("chosen_positions", chosen_positions, "[B, K]", like=chosen_rewards)
    check_tensor("rejected_positions", rejected_positions, "[B, K]", like=chosen_rewards)
    check_tensor("weights", weights, "[B, K]", like=chosen_rewards)
    check_floating("chosen_rewards", chosen_rewards)
    if rejected_rewards.dtype != chosen_rewards.dtype:
        raise TypeError(
            f"rejected_rewards must have the dtype of chosen_rewards, {chosen_rewards.dtype}, "
            f"got {rejected_rewards.dtype}"
        )
    check_int64("chosen_positions", chosen_positions)
    check_int64("rejected_positions", rejected_positions)
    check_floating("weights", weights)
    rows, pairs = chosen_positions.shape
    for name, rewards in (("chosen_rewards", chosen_rewards), ("rejected_rewards", rejected_rewards)):
        if rewards.shape[0] != rows or rewards.shape[1] < 1:
            raise ValueError(
                f"{name} must have shape [{rows}, T] with T >= 1 to go with chosen_positions, got {list(rewards.shape)}"
            )
    check_shape("rejected_positions", rejected_positions, (rows, pairs), "chosen_positions")
    check_shape("weights", weights, (rows, pairs), "chosen_positions")
    check_choice("reduction", reduction, ("mean", "sum"))
    check_impl(impl)
    return weighted_bt_loss_op(
        chosen_rewards, rejected_rewards, chosen_positions, rejected_positions, weights.detach(), reduction, impl
    )
