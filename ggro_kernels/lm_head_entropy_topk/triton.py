"""`lm_head_entropy_topk` in Triton."""

import torch

from ggro_kernels.triton_parts.projection import project


def lm_head_entropy_topk(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    k: int,
    bias: torch.Tensor | None,
    softcap: float | None,
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`(entropy[R], logsumexp[R], values[R, k], indices[R, k])` of hidden [R, d], weight [V, d] and bias [V]."""
    rows, device = hidden.shape[0], hidden.device
    entropy, logsumexp = (torch.empty(rows, device=device) for _ in range(2))
    values = torch.empty(rows, k, device=device)
    indices = torch.empty(rows, k, dtype=torch.int64, device=device)
    if rows > 0:
        project(
            hidden,
            weight,
            values,
            indices,
            bias=bias,
            softcap=softcap,
            temperature=temperature,
            statistics=(entropy, logsumexp),
        )
    return entropy, logsumexp, values, indices
