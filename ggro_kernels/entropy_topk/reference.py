"""The specification of `entropy_topk` in eager torch: any device, any float dtype."""

import torch

from ggro_kernels.selection import top_k_indices


def entropy_topk(
    logits: torch.Tensor, k: int, temperature: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`(entropy[R], logsumexp[R], values[R, k], indices[R, k])` of logits [R, V]; fp64 logits are computed in fp64."""
    accumulate = torch.float64 if logits.dtype == torch.float64 else torch.float32
    x = logits.to(accumulate) / temperature

    # NaN is greater than any maximum, so amax carries it into everything below.
    m = x.amax(dim=1, keepdim=True)  # [R, 1]
    shifted = x - m
    powers = shifted.exp()
    s = powers.sum(dim=1)
    # 0 * -inf would be NaN.
    t = torch.where(shifted == -torch.inf, 0.0, shifted * powers).sum(dim=1)
    m = m.squeeze(1)
    logsumexp = torch.where(m.isinf(), m, m + s.log())
    entropy = torch.where(m.isinf(), torch.nan, s.log() - t / s)

    indices = top_k_indices(logits, k)
    return entropy, logsumexp, logits.gather(1, indices), indices
