"""The specification of `entropy_topk` in eager torch: any device, any float dtype."""

import torch

from ggro_kernels.precision import accumulation_dtype
from ggro_kernels.selection import take_bits, top_k_indices


def entropy_topk(
    logits: torch.Tensor, k: int, temperature: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`(entropy[R], logsumexp[R], values[R, k], indices[R, k])` of logits [R, V]; fp64 logits are computed in fp64."""
    accumulate = accumulation_dtype(logits)
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
    return entropy, logsumexp, take_bits(logits, indices), indices


def entropy_topk_backward(
    entropy_gradient: torch.Tensor,
    logsumexp_gradient: torch.Tensor,
    values_gradient: torch.Tensor,
    logits: torch.Tensor,
    entropy: torch.Tensor,
    logsumexp: torch.Tensor,
    indices: torch.Tensor,
    temperature: float,
) -> torch.Tensor:
    """Gradient [R, V] of the logits, in their dtype."""
    accumulate = logsumexp.dtype
    for_entropy, for_logsumexp = entropy_gradient.unsqueeze(1), logsumexp_gradient.unsqueeze(1)
    log_probabilities = logits.to(accumulate) / temperature - logsumexp.unsqueeze(1)
    # A statistic of NaN matters only where its gradient is used.
    entropy_terms = torch.where(for_entropy == 0, 0.0, for_entropy * (log_probabilities + entropy.unsqueeze(1)))
    gradient = log_probabilities.exp() * (for_logsumexp - entropy_terms) / temperature
    impossible = (logits == -torch.inf) | (log_probabilities == -torch.inf)
    gradient = gradient.masked_fill(impossible | ((for_entropy == 0) & (for_logsumexp == 0)), 0.0)
    return gradient.scatter_add(1, indices, values_gradient.to(accumulate)).to(logits.dtype).contiguous()
