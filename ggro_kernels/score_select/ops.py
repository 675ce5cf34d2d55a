"""Registration of `score_select` with torch's dispatcher."""

import torch

from ggro_kernels.library import register
from ggro_kernels.precision import accumulation_dtype
from ggro_kernels.score_select import native, reference

Outputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _fake(
    hidden: torch.Tensor,
    head: torch.Tensor,
    logits: torch.Tensor,
    weight: float,
    temperature: float,
    uniforms: torch.Tensor | None,
    impl: str,
) -> Outputs:
    dtype = accumulation_dtype(hidden, head, logits)
    return (
        logits.new_empty(logits.shape[0], dtype=torch.int64),
        logits.new_empty(logits.shape, dtype=dtype),
        logits.new_empty(logits.shape, dtype=dtype),
    )


score_select_op = register(
    "score_select(Tensor hidden, Tensor head, Tensor logits, float weight, float temperature, Tensor? uniforms,"
    " str impl) -> (Tensor, Tensor, Tensor)",
    reference=reference.score_select,
    fake=_fake,
    native=native.score_select,
    cuda=True,
    triton="ggro_kernels.score_select.triton:score_select",
    dtypes_of=("hidden", "head", "logits"),
)
