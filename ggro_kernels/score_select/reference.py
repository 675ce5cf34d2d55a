"""The specification of `score_select` in eager torch: any device, any float dtype."""

import torch

from ggro_kernels.checks import check_unit_interval
from ggro_kernels.precision import accumulation_dtype


def score_select(
    hidden: torch.Tensor,
    head: torch.Tensor,
    logits: torch.Tensor,
    weight: float,
    temperature: float,
    uniforms: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`(index[B], reward[B, k], score[B, k])`; greedy without uniforms."""
    accumulate = accumulation_dtype(hidden, head, logits)
    reward = (hidden.to(accumulate) * head.to(accumulate)).sum(2).contiguous()
    logits = logits.to(accumulate).contiguous()
    # Padding stays out of reach whatever its reward, which may be NaN.
    score = torch.where(logits == -torch.inf, logits, logits + weight * reward)
    # The first of equal values; NaN is the largest.
    index = score.argmax(dim=1)
    if uniforms is not None:
        check_unit_interval("uniforms", uniforms)
        largest = score.gather(1, index.unsqueeze(1))
        cumulative = ((score.double() - largest.double()) / temperature).exp().cumsum(dim=1)
        below = cumulative <= uniforms.double().unsqueeze(1) * cumulative[:, -1:]
        index = torch.where(largest.squeeze(1).isfinite(), below.sum(dim=1), index)
    return index, reward, score
