"""Fused kernels for reward-guided decoding: plain functions on torch tensors."""

from ggro_kernels.candidate_scores.api import candidate_scores
from ggro_kernels.entropy_topk.api import EntropyTopK, entropy_topk

__version__ = "0.1.0"
__all__ = ["EntropyTopK", "candidate_scores", "entropy_topk"]
