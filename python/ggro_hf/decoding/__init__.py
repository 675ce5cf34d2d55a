"""Decoding methods, one object each."""

from ggro_hf.decoding.args import ARGS
from ggro_hf.decoding.base import Decoder
from ggro_hf.decoding.best_of_n import BestOfN
from ggro_hf.decoding.cards import CARDS
from ggro_hf.decoding.chunk_beam_search import ChunkBeamSearch
from ggro_hf.decoding.exhaustive import ExhaustiveSearch
from ggro_hf.decoding.ggro import GGRO
from ggro_hf.decoding.greedy import Greedy
from ggro_hf.decoding.presets import PRESETS, Preset
from ggro_hf.decoding.rejection_sampling import RejectionSampling
from ggro_hf.decoding.released import NoProgressError
from ggro_hf.decoding.sample import Sample

__all__ = [
    "ARGS",
    "CARDS",
    "GGRO",
    "PRESETS",
    "BestOfN",
    "ChunkBeamSearch",
    "Decoder",
    "ExhaustiveSearch",
    "Greedy",
    "NoProgressError",
    "Preset",
    "RejectionSampling",
    "Sample",
]
