"""Registration of `prefix_attention` with torch's dispatcher."""

import torch

from ggro_kernels.library import register
from ggro_kernels.prefix_attention import native, reference


def _fake(
    query: torch.Tensor,
    prefix_key: torch.Tensor,
    prefix_value: torch.Tensor,
    branch_key: torch.Tensor,
    branch_value: torch.Tensor,
    branch_starts: torch.Tensor,
    branch_ends: torch.Tensor | None,
    prefix_lengths: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    window: int | None,
    impl: str,
) -> torch.Tensor:
    batch, query_heads, tokens, _ = query.shape
    return query.new_empty(batch, tokens, query_heads, prefix_value.shape[3]).transpose(1, 2)


prefix_attention_op = register(
    "prefix_attention(Tensor query, Tensor prefix_key, Tensor prefix_value, Tensor branch_key, Tensor branch_value, "
    "Tensor branch_starts, Tensor? branch_ends, Tensor? prefix_lengths, float scale, float? softcap, SymInt? window, "
    "str impl) -> Tensor",
    reference=reference.prefix_attention,
    fake=_fake,
    native=native.prefix_attention,
    cuda=True,
    triton="ggro_kernels.prefix_attention.triton:prefix_attention",
    dtypes_of=("query",),
)
