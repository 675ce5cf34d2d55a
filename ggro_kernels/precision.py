"""What the ops accumulate in."""

import torch


def accumulation_dtype(*tensors: torch.Tensor) -> torch.dtype:
    """fp64 if one of the tensors is fp64, else fp32: the dtype of sums and of what is computed from them."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
