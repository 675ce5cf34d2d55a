"""Registration of `lm_head_entropy_topk` with torch's dispatcher."""

import torch

from ggro_kernels.library import register
from ggro_kernels.lm_head_entropy_topk import native, reference
from ggro_kernels.precision import accumulation_dtype

Outputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def _fake(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    k: int,
    bias: torch.Tensor | None,
    softcap: float | None,
    temperature: float,
    impl: str,
) -> Outputs:
    rows = hidden.shape[0]
    dtype = accumulation_dtype(hidden, weight)
    return (
        hidden.new_empty(rows, dtype=dtype),
        hidden.new_empty(rows, dtype=dtype),
        hidden.new_empty((rows, k), dtype=dtype),
        hidden.new_empty((rows, k), dtype=torch.int64),
    )


lm_head_entropy_topk_op = register(
    "lm_head_entropy_topk(Tensor hidden, Tensor weight, SymInt k, Tensor? bias, float? softcap, float temperature,"
    " str impl) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=reference.lm_head_entropy_topk,
    fake=_fake,
    native=native.lm_head_entropy_topk,
    cuda=True,
    triton="ggro_kernels.lm_head_entropy_topk.triton:lm_head_entropy_topk",
    dtypes_of=("hidden", "weight"),
)
