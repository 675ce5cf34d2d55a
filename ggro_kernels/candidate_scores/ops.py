"""Registration of `candidate_scores` with torch's dispatcher."""

import torch

from ggro_kernels.candidate_scores import native, reference
from ggro_kernels.dispatch import resolve
from ggro_kernels.library import register


def _run(gradient: torch.Tensor, table: torch.Tensor, ids: torch.Tensor, impl: str) -> torch.Tensor:
    if resolve(impl, gradient.device, gradient.dtype, table.dtype) == "native":
        return native.candidate_scores(gradient, table, ids)
    return reference.candidate_scores(gradient.detach(), table.detach(), ids)


def _fake(gradient: torch.Tensor, table: torch.Tensor, ids: torch.Tensor, impl: str) -> torch.Tensor:
    return gradient.new_empty(ids.shape, dtype=reference.score_dtype(gradient, table))


candidate_scores_op = register(
    "candidate_scores(Tensor gradient, Tensor table, Tensor ids, str impl) -> Tensor", _run, _fake
)
