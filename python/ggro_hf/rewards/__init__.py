"""Rewards as decoders see them."""

from ggro_hf.rewards.base import Capabilities, Conversation, Reward, Scoring
from ggro_hf.rewards.causal import RewardModel, RewardPrefix, SegmentScore
from ggro_hf.rewards.encoder import EncoderReward
from ggro_hf.rewards.formats import ChatTemplate, Dialogue, Format, Pair, TextFormat, TextTemplate
from ggro_hf.rewards.function import FunctionReward
from ggro_hf.rewards.text import TextReward

__all__ = [
    "Capabilities",
    "ChatTemplate",
    "Conversation",
    "Dialogue",
    "EncoderReward",
    "Format",
    "FunctionReward",
    "Pair",
    "Reward",
    "RewardModel",
    "RewardPrefix",
    "Scoring",
    "SegmentScore",
    "TextFormat",
    "TextReward",
    "TextTemplate",
]
