"""Registration of `entropy_topk` with torch's dispatcher."""

import torch

from ggro_kernels.dispatch import resolve
from ggro_kernels.entropy_topk import native, reference
from ggro_kernels.library import register

Outputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def _run(logits: torch.Tensor, k: int, temperature: float, impl: str) -> Outputs:
    if resolve(impl, logits.device, logits.dtype) == "native":
        return native.entropy_topk(logits, k, temperature)
    return reference.entropy_topk(logits.detach(), k, temperature)


def _fake(logits: torch.Tensor, k: int, temperature: float, impl: str) -> Outputs:
    rows = logits.shape[0]
    statistics = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return (
        logits.new_empty(rows, dtype=statistics),
        logits.new_empty(rows, dtype=statistics),
        logits.new_empty((rows, k)),
        logits.new_empty((rows, k), dtype=torch.int64),
    )


entropy_topk_op = register(
    "entropy_topk(Tensor logits, SymInt k, float temperature, str impl) -> (Tensor, Tensor, Tensor, Tensor)",
    _run,
    _fake,
)
