"""`lm_head_entropy_topk` by csrc/cpu/lm_head_entropy_topk.cpp and csrc/cuda/projection.cu."""

import torch

from ggro_kernels.native import DTYPE_CODES, address, run, with_unit_column_stride


def lm_head_entropy_topk(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    k: int,
    bias: torch.Tensor | None,
    softcap: float | None,
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`(entropy[R], logsumexp[R], values[R, k], indices[R, k])` of hidden [R, d], weight [V, d] and bias [V]."""
    hidden, weight = with_unit_column_stride(hidden), with_unit_column_stride(weight)
    bias = None if bias is None else bias.to(torch.float32).contiguous()
    rows, width = hidden.shape
    entropy = torch.empty(rows, dtype=torch.float32, device=hidden.device)
    logsumexp = torch.empty(rows, dtype=torch.float32, device=hidden.device)
    values = torch.empty(rows, k, dtype=torch.float32, device=hidden.device)
    indices = torch.empty(rows, k, dtype=torch.int64, device=hidden.device)
    run(
        "lm_head_entropy_topk",
        hidden.device,
        hidden.data_ptr(),
        DTYPE_CODES[hidden.dtype],
        hidden.stride(0),
        weight.data_ptr(),
        DTYPE_CODES[weight.dtype],
        weight.stride(0),
        address(bias),
        0.0 if softcap is None else softcap,
        temperature,
        rows,
        weight.shape[0],
        width,
        k,
        entropy.data_ptr(),
        logsumexp.data_ptr(),
        values.data_ptr(),
        indices.data_ptr(),
    )
    return entropy, logsumexp, values, indices
