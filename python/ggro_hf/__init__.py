"""Reward-guided decoding on HuggingFace models with the least work per step."""

from ggro_hf.attention import PREFIX_ATTENTION, pack_branches
from ggro_hf.decoding import (
    ARGS,
    CARDS,
    GGRO,
    PRESETS,
    BestOfN,
    ChunkBeamSearch,
    Decoder,
    Greedy,
    NoProgressError,
    Preset,
    RejectionSampling,
    Sample,
)
from ggro_hf.generation import generate, generate_iter
from ggro_hf.results import Candidate, Counters, DecoderOutput, Generation, Segment, Trace
from ggro_hf.rewards import Capabilities, Conversation, Reward, RewardModel, Scoring

__all__ = [
    "ARGS",
    "CARDS",
    "GGRO",
    "PREFIX_ATTENTION",
    "PRESETS",
    "BestOfN",
    "Candidate",
    "Capabilities",
    "ChunkBeamSearch",
    "Conversation",
    "Counters",
    "Decoder",
    "DecoderOutput",
    "Generation",
    "Greedy",
    "NoProgressError",
    "Preset",
    "RejectionSampling",
    "Reward",
    "RewardModel",
    "Sample",
    "Scoring",
    "Segment",
    "Trace",
    "generate",
    "generate_iter",
    "pack_branches",
]
