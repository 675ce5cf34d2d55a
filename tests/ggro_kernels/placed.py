"""The public functions for tests that make their tensors on the CPU: they run where the implementation under test does.

With a GPU, the Triton and the CUDA kernels get them there; the results come back. A tensor keeps its strides, its
offset and what lies between its rows. Without a GPU these are the public functions.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

import ggro_kernels
from tests.ggro_kernels import implementations


def to_gpu(x: torch.Tensor) -> torch.Tensor:
    """`x` on the GPU in the same layout; within its autograd graph where it needs a gradient."""
    if x.requires_grad:
        return x.to("cuda")
    storage = torch.tensor([], dtype=x.dtype).set_(x.untyped_storage())
    return storage.to("cuda").as_strided(x.shape, x.stride(), x.storage_offset())


def _placed(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, impl: str = "auto", **options: Any) -> Any:
        if impl not in implementations.on_gpu:
            return function(*args, impl=impl, **options)
        args, options = tree_map_only(torch.Tensor, to_gpu, (args, options))
        return tree_map_only(torch.Tensor, torch.Tensor.cpu, function(*args, impl=impl, **options))

    return call


batch_invariant_linear = _placed(ggro_kernels.batch_invariant_linear)
candidate_scores = _placed(ggro_kernels.candidate_scores)
entropy_topk = _placed(ggro_kernels.entropy_topk)
lm_head_entropy_topk = _placed(ggro_kernels.lm_head_entropy_topk)
merge_partials = _placed(ggro_kernels.merge_partials)
prefix_attention = _placed(ggro_kernels.prefix_attention)
project_topk = _placed(ggro_kernels.project_topk)
score_select = _placed(ggro_kernels.score_select)
weighted_bt_loss = _placed(ggro_kernels.weighted_bt_loss)
