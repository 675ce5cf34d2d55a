"""How much a partial response counts in training: by the reference reward model's certainty about it."""

import torch

from ggro_kernels.checks import check_floating


def binary_entropy_weight(margin: torch.Tensor, *, clamp: float | None = 100.0) -> torch.Tensor:
    """`1 / H(sigmoid(margin))` where the reference model prefers the chosen response, 0 where it does not.

    Args:
        margin: reward of the chosen minus reward of the rejected partial response, any shape, any float dtype.
        clamp: the largest weight, reached at a margin of about 6.6; None for the bare formula, which grows like
            `e^margin / margin` and overflows to infinity.

    Returns:
        Weights of the margin's shape, fp32 (fp64 for fp64): 0 for `margin <= 0`, else from `1 / ln 2 = 1.4427` up; NaN
        stays NaN.

    Raises:
        TypeError: margin is not a float tensor.
        ValueError: clamp is not positive.

    Source: SP-PRM, weight of the preference loss; H in nats. The paper states no clamp.
    H = softplus(-|d|) + |d| sigmoid(-|d|), which unlike -p log p - q log q is not NaN for large |d|.
    """
    if not isinstance(margin, torch.Tensor):
        raise TypeError(f"margin must be a torch.Tensor, got {type(margin).__name__}")
    check_floating("margin", margin)
    if clamp is not None and not clamp > 0:
        raise ValueError(f"clamp must be positive or None, got {clamp}")
    margin = margin.to(torch.float64 if margin.dtype == torch.float64 else torch.float32)
    # Infinity times a probability of zero would be NaN.
    size = margin.abs().clamp(max=torch.finfo(margin.dtype).max)
    entropy = torch.nn.functional.softplus(-size) + size * torch.sigmoid(-size)
    weight = torch.where(margin <= 0, 0.0, 1 / entropy)
    return weight if clamp is None else weight.clamp(max=clamp)
