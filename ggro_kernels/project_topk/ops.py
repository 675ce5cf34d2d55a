"""Registration of `project_topk` with torch's dispatcher."""

import torch

from ggro_kernels.library import register
from ggro_kernels.precision import accumulation_dtype
from ggro_kernels.project_topk import native, reference

Outputs = tuple[torch.Tensor, torch.Tensor]


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
    reference=reference.project_topk,
    fake=_fake,
    native=native.project_topk,
    cuda=True,
    triton="ggro_kernels.project_topk.triton:project_topk",
    dtypes_of=("gradient", "table"),
)
