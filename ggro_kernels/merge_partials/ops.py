"""Registration of `merge_partials` with torch's dispatcher."""

import torch

from ggro_kernels.dispatch import resolve
from ggro_kernels.library import register
from ggro_kernels.merge_partials import native, reference

Outputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def _run(
    entropy: torch.Tensor,
    logsumexp: torch.Tensor,
    values: torch.Tensor,
    indices: torch.Tensor,
    offsets: torch.Tensor,
    impl: str,
) -> Outputs:
    if resolve(impl, values.device, values.dtype, entropy.dtype) == "native":
        return native.merge_partials(entropy, logsumexp, values, indices, offsets)
    with torch.no_grad():
        return reference.merge_partials(entropy, logsumexp, values, indices, offsets)


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
    _run,
    _fake,
)
