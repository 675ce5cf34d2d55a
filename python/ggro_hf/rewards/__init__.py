"""Rewards as decoders see them."""

from ggro_hf.rewards.base import Capabilities, Conversation, Reward, Scoring
from ggro_hf.rewards.causal import RewardModel, RewardPrefix, SegmentScore

__all__ = ["Capabilities", "Conversation", "Reward", "RewardModel", "RewardPrefix", "Scoring", "SegmentScore"]
