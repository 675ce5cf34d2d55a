"""Reward models as decoders see them."""

from ggro_hf.rewards.causal import RewardModel, RewardPrefix, SegmentScore

__all__ = ["RewardModel", "RewardPrefix", "SegmentScore"]
