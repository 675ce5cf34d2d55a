"""Decoding methods, one object each."""

from ggro_hf.decoding.base import Decoder
from ggro_hf.decoding.best_of_n import BestOfN
from ggro_hf.decoding.ggro import GGRO
from ggro_hf.decoding.greedy import Greedy
from ggro_hf.decoding.presets import PRESETS, Preset
from ggro_hf.decoding.released import NoProgressError
from ggro_hf.decoding.sample import Sample

__all__ = ["GGRO", "PRESETS", "BestOfN", "Decoder", "Greedy", "NoProgressError", "Preset", "Sample"]
