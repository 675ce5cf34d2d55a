"""Reward-guided decoding on HuggingFace models with the least work per step."""

from ggro_hf.attention import PREFIX_ATTENTION, pack_branches
from ggro_hf.decoding import GGRO, PRESETS, BestOfN, Decoder, Greedy, NoProgressError, Preset, Sample
from ggro_hf.generation import generate, generate_iter
from ggro_hf.results import Candidate, Counters, DecoderOutput, Generation, Segment, Trace
from ggro_hf.rewards import RewardModel

__all__ = [
    "GGRO",
    "PREFIX_ATTENTION",
    "PRESETS",
    "BestOfN",
    "Candidate",
    "Counters",
    "Decoder",
    "DecoderOutput",
    "Generation",
    "Greedy",
    "NoProgressError",
    "Preset",
    "RewardModel",
    "Sample",
    "Segment",
    "Trace",
    "generate",
    "generate_iter",
    "pack_branches",
]
