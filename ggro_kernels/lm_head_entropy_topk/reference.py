"""The specification of `lm_head_entropy_topk` in eager torch: any device, any float dtype."""

import torch

from ggro_kernels.entropy_topk.reference import entropy_topk
from ggro_kernels.precision import accumulation_dtype


def lm_head_entropy_topk(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    k: int,
    bias: torch.Tensor | None,
    softcap: float | None,
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`(entropy[R], logsumexp[R], values[R, k], indices[R, k])` of hidden [R, d], weight [V, d] and bias [V]."""
    dtype = accumulation_dtype(hidden, weight)
    logits = hidden.to(dtype) @ weight.to(dtype).t()  # [R, V]
    if bias is not None:
        logits = logits + bias.to(dtype)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return entropy_topk(logits, k, temperature)
