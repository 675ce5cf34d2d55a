"""Fused kernels for reward-guided decoding: plain functions on torch tensors."""

from ggro_kernels.batch_invariant_linear.api import batch_invariant_linear
from ggro_kernels.candidate_scores.api import candidate_scores
from ggro_kernels.entropy_topk.api import EntropyTopK, entropy_topk
from ggro_kernels.lm_head_entropy_topk.api import lm_head_entropy_topk
from ggro_kernels.merge_partials.api import merge_partials
from ggro_kernels.prefix_attention.api import prefix_attention
from ggro_kernels.project_topk.api import ProjectTopK, project_topk
from ggro_kernels.score_select.api import ScoreSelect, score_select
from ggro_kernels.weighted_bt_loss.api import weighted_bt_loss
from ggro_kernels.weighted_bt_loss.weights import binary_entropy_weight

__version__ = "0.1.0"
__all__ = [
    "EntropyTopK",
    "ProjectTopK",
    "ScoreSelect",
    "batch_invariant_linear",
    "binary_entropy_weight",
    "candidate_scores",
    "entropy_topk",
    "lm_head_entropy_topk",
    "merge_partials",
    "prefix_attention",
    "project_topk",
    "score_select",
    "weighted_bt_loss",
]
