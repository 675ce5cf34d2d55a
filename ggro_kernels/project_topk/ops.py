"""Registration of `project_topk` with torch's dispatcher."""

import torch

from ggro_kernels.dispatch import resolve
from ggro_kernels.library import register
from ggro_kernels.precision import accumulation_dtype
from ggro_kernels.project_topk import native, reference

Outputs = tuple[torch.Tensor, torch.Tensor]


def _run(
    gradient: torch.Tensor,
    table: torch.Tensor,
    k: int,
    bias: torch.Tensor | None,
    forbidden: torch.Tensor | None,
    impl: str,
) -> Outputs:
    if resolve(impl, gradient.device, gradient.dtype, table.dtype) == "native":
        return native.project_topk(gradient, table, k, bias, forbidden)
    with torch.no_grad():
        return reference.project_topk(gradient, table, k, bias, forbidden)


def _fake(
    gradient: torch.Tensor,
    table: torch.Tensor,
    k: int,
    bias: torch.Tensor | None,
    forbidden: torch.Tensor | None,
    impl: str,
) -> Outputs:
    shape = (gradient.shape[0], k)
    scores = gradient.new_empty(shape, dtype=accumulation_dtype(gradient, table))
    return scores, gradient.new_empty(shape, dtype=torch.int64)


project_topk_op = register(
    "project_topk(Tensor gradient, Tensor table, SymInt k, Tensor? bias, Tensor? forbidden, str impl)"
    " -> (Tensor, Tensor)",
    _run,
    _fake,
)
