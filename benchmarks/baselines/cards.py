"""Segment-level rejection sampling: one draw after another, the prefix computed again for each and for its reward."""

from math import exp

import torch
from torch import Tensor
from transformers import DynamicCache, LogitsProcessorList, PreTrainedModel

from benchmarks.baselines.common import draw, rewards_of, warpers

_TOKENS_BEFORE_AN_ENTROPY_STOP = 4


@torch.no_grad()
def decode(
    policy: PreTrainedModel,
    reward: PreTrainedModel,
    prompt_ids: list[int],
    max_new_tokens: int,
    *,
    reward_threshold: float,
    entropy_threshold: float,
    alpha: float,
    temperature: float,
    top_k: int,
    max_segment: int,
    attempts: int,
    seed: int,
) -> tuple[list[int], int]:
    """A response of accepted segments, and how many were drawn; a segment ends before a token of high entropy (nats).

    A candidate of reward r is accepted with probability min(1, exp((r - threshold) / temperature)), where the
    threshold moves from (1 - alpha) r(prompt) + alpha r* to r* as the response grows; after so many rejected
    `attempts` the best of them and one more is taken. With alpha 1, an infinite entropy threshold and segments of the
    full length this is rejection sampling of whole responses.
    """
    generator = torch.Generator().manual_seed(seed)
    warp = warpers(temperature, top_k)
    sequence = torch.tensor([prompt_ids])
    end = len(prompt_ids) + max_new_tokens
    start_threshold = (1 - alpha) * float(rewards_of(reward, sequence)) + alpha * reward_threshold
    candidates = 0
    while sequence.shape[1] < end:
        best: tuple[float, Tensor] | None = None
        longest = min(max_segment, end - sequence.shape[1])
        for attempt in range(attempts + 1):
            candidate = _draw_segment(policy, sequence, longest, entropy_threshold, warp, generator)
            value = float(rewards_of(reward, candidate))
            candidates += 1
            if best is None or value > best[0]:
                best = value, candidate
            if attempt == attempts:
                sequence = best[1]
                break
            done = (candidate.shape[1] - len(prompt_ids)) / max_new_tokens
            threshold = min(reward_threshold, start_threshold + done * (reward_threshold - start_threshold))
            if float(torch.rand((), generator=generator)) < exp(min(0.0, (value - threshold) / temperature)):
                sequence = candidate
                break
    return sequence[0, len(prompt_ids) :].tolist(), candidates


def _draw_segment(
    policy: PreTrainedModel,
    prefix: Tensor,
    longest: int,
    entropy_threshold: float,
    warp: LogitsProcessorList,
    generator: torch.Generator,
) -> Tensor:
    """Prefix and segment; the KV cache lives as long as the candidate is decoded."""
    cache = DynamicCache(config=policy.config)
    sequence = new = prefix
    for drawn in range(longest):
        logits = policy(input_ids=new, past_key_values=cache, logits_to_keep=1).logits[:, -1]
        probabilities = torch.softmax(logits, dim=-1)
        entropy = float(-(probabilities * torch.log(probabilities.clamp_min(1e-30))).sum())
        if drawn >= _TOKENS_BEFORE_AN_ENTROPY_STOP and entropy >= entropy_threshold:
            break
        new = draw(logits, sequence, warp, generator)
        sequence = torch.cat([sequence, new], dim=1)
    return sequence
