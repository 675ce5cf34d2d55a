"""Registration of `merge_partials` with torch's dispatcher."""

import torch

from ggro_kernels.library import register
from ggro_kernels.merge_partials import native, reference

Outputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def _fake(
    entropy: torch.Tensor,
    logsumexp: torch.Tensor,
    values: torch.Tensor,
    indices: torch.Tensor,
    offsets: torch.Tensor,
    impl: str,
) -> Outputs:
    _, rows, k = values.shape
    return entropy.new_empty(rows), entropy.new_empty(rows), values.new_empty((rows, k)), indices.new_empty((rows, k))


merge_partials_op = register(
    "merge_partials(Tensor entropy, Tensor logsumexp, Tensor values, Tensor indices, Tensor offsets, str impl)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    reference=reference.merge_partials,
    fake=_fake,
    native=native.merge_partials,
    triton="ggro_kernels.merge_partials.triton:merge_partials",
    dtypes_of=("values", "entropy"),
)
