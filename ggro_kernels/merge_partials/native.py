"""`merge_partials` by csrc/cpu/merge_partials.cpp."""

import torch

from ggro_kernels.dispatch import native
from ggro_kernels.native import DTYPE_CODES


def merge_partials(
    entropy: torch.Tensor, logsumexp: torch.Tensor, values: torch.Tensor, indices: torch.Tensor, offsets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`(entropy[R], logsumexp[R], values[R, k], indices[R, k])` of S shards on the CPU."""
    entropy, logsumexp, offsets = entropy.contiguous(), logsumexp.contiguous(), offsets.contiguous()
    values, indices = values.contiguous(), indices.contiguous()
    shards, rows, k = values.shape
    merged_entropy = torch.empty(rows, dtype=torch.float32)
    merged_logsumexp = torch.empty(rows, dtype=torch.float32)
    merged_values = torch.empty(rows, k, dtype=values.dtype)
    merged_indices = torch.empty(rows, k, dtype=torch.int64)
    native().merge_partials(
        entropy.data_ptr(),
        logsumexp.data_ptr(),
        values.data_ptr(),
        DTYPE_CODES[values.dtype],
        indices.data_ptr(),
        offsets.data_ptr(),
        shards,
        rows,
        k,
        merged_entropy.data_ptr(),
        merged_logsumexp.data_ptr(),
        merged_values.data_ptr(),
        merged_indices.data_ptr(),
        torch.get_num_threads(),
    )
    return merged_entropy, merged_logsumexp, merged_values, merged_indices
