"""Rewards as decoders see them."""

from ggro_hf.rewards.automatic import describe, load_reward
from ggro_hf.rewards.base import Capabilities, Conversation, Reward, Scoring
from ggro_hf.rewards.causal import RewardModel, RewardPrefix, score_segments
from ggro_hf.rewards.encoder import EncoderReward
from ggro_hf.rewards.formats import ChatTemplate, Dialogue, Format, Pair, TextFormat, TextTemplate
from ggro_hf.rewards.function import FunctionReward
from ggro_hf.rewards.head_reward import HeadReward
from ggro_hf.rewards.heads import HEADS, FeedForward, Gated, Head, HeadFamily, LoadedBackbone
from ggro_hf.rewards.implicit import ImplicitReward
from ggro_hf.rewards.process import ProcessReward
from ggro_hf.rewards.segment_pass import SegmentScore
from ggro_hf.rewards.steps import STEP_FORMATS, EndedSteps, MarkedSteps, StepFormat, StepTurns, TaggedSteps
from ggro_hf.rewards.text import TextReward
from ggro_hf.rewards.transforms import Transformed, WeightedSum

__all__ = [
    "HEADS",
    "STEP_FORMATS",
    "Capabilities",
    "ChatTemplate",
    "Conversation",
    "Dialogue",
    "EncoderReward",
    "EndedSteps",
    "FeedForward",
    "Format",
    "FunctionReward",
    "Gated",
    "Head",
    "HeadFamily",
    "HeadReward",
    "ImplicitReward",
    "LoadedBackbone",
    "MarkedSteps",
    "Pair",
    "ProcessReward",
    "Reward",
    "RewardModel",
    "RewardPrefix",
    "Scoring",
    "SegmentScore",
    "StepFormat",
    "StepTurns",
    "TaggedSteps",
    "TextFormat",
    "TextReward",
    "TextTemplate",
    "Transformed",
    "WeightedSum",
    "describe",
    "load_reward",
    "score_segments",
]
