"""`score_select` by csrc/cpu/score_select.cpp and csrc/cuda/score_select.cu."""

import torch

from ggro_kernels.native import DTYPE_CODES, address, run, with_unit_column_stride


def score_select(
    hidden: torch.Tensor,
    head: torch.Tensor,
    logits: torch.Tensor,
    weight: float,
    temperature: float,
    uniforms: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`(index[B], reward[B, k], score[B, k])`; greedy without uniforms."""
    hidden, head, logits = with_unit_column_stride(hidden), head.contiguous(), logits.contiguous()
    uniforms = None if uniforms is None else uniforms.contiguous()
    rows, candidates, width = hidden.shape
    index = torch.empty(rows, dtype=torch.int64, device=hidden.device)
    reward = torch.empty(rows, candidates, dtype=torch.float32, device=hidden.device)
    score = torch.empty(rows, candidates, dtype=torch.float32, device=hidden.device)
    run(
        "score_select",
        hidden.device,
        hidden.data_ptr(),
        DTYPE_CODES[hidden.dtype],
        hidden.stride(0),
        hidden.stride(1),
        head.data_ptr(),
        DTYPE_CODES[head.dtype],
        logits.data_ptr(),
        DTYPE_CODES[logits.dtype],
        address(uniforms),
        rows,
        candidates,
        width,
        weight,
        temperature,
        index.data_ptr(),
        reward.data_ptr(),
        score.data_ptr(),
    )
    return index, reward, score
