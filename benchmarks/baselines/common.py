"""What the baselines share: drawing tokens, and rewards of whole sequences."""

import torch
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedModel, TemperatureLogitsWarper, TopKLogitsWarper

_REWARD_BATCH = 8


def warpers(temperature: float, top_k: int) -> LogitsProcessorList:
    """Those that `generate` makes of these settings."""
    return LogitsProcessorList([TemperatureLogitsWarper(temperature), TopKLogitsWarper(top_k)])


def draw(logits: Tensor, sequences: Tensor, warp: LogitsProcessorList, generator: torch.Generator) -> Tensor:
    """One token `[R, 1]` for every row of `logits[R, V]`."""
    probabilities = torch.softmax(warp(sequences, logits), dim=-1)
    return torch.multinomial(probabilities, 1, generator=generator)


def rewards_of(reward: PreTrainedModel, sequences: Tensor, batch: int = _REWARD_BATCH) -> Tensor:
    """Rewards `[R]` of whole sequences `[R, T]`, everything computed anew."""
    return torch.cat([reward(input_ids=rows, use_cache=False).logits[:, 0] for rows in sequences.split(batch)])
