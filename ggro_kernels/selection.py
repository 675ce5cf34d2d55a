"""The order of selection, in eager torch: value descending, then index ascending."""

import torch


def top_k_indices(values: torch.Tensor, k: int) -> torch.Tensor:
    """[R, k] indices of the k largest of values [R, V]; -0.0 equals +0.0 and NaN is the largest value."""
    # A stable descending sort keeps equal values in index order; it puts NaN first. Adding zero turns -0.0 into +0.0.
    order = (values + 0.0).sort(dim=1, descending=True, stable=True).indices
    # Unlike contiguous(), with the strides of a [R, k] also where R is 0.
    return order[:, :k].clone(memory_format=torch.contiguous_format)


def bitwise(x: torch.Tensor) -> torch.Tensor:
    """The bits of a float tensor as integers: equal where and only where the bits are, NaN included."""
    return x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def take_bits(values: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """`values.gather(1, indices)` bit by bit: torch's gather of bf16 may change those of a NaN."""
    return bitwise(values).gather(1, indices).view(values.dtype)
