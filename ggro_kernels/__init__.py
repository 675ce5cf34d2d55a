"""Fused kernels for reward-guided decoding: plain functions on torch tensors."""

from ggro_kernels.candidate_scores.api import candidate_scores
from ggro_kernels.entropy_topk.api import EntropyTopK, entropy_topk
from ggro_kernels.lm_head_entropy_topk.api import lm_head_entropy_topk
from ggro_kernels.prefix_attention.api import prefix_attention
from ggro_kernels.project_topk.api import ProjectTopK, project_topk

__version__ = "0.1.0"
__all__ = [
    "EntropyTopK",
    "ProjectTopK",
    "candidate_scores",
    "entropy_topk",
    "lm_head_entropy_topk",
    "prefix_attention",
    "project_topk",
]
