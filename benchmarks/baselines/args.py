"""ARGS as released: a token of every candidate through the reward model, each row with its own copy of the prefix."""

from copy import copy

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel


@torch.no_grad()
def decode(
    policy: PreTrainedModel,
    reward: PreTrainedModel,
    prompt_ids: list[int],
    max_new_tokens: int,
    *,
    weight: float,
    candidates: int,
    rows: int,
) -> list[int]:
    """The response of argmax(logit + weight * reward) over the policy's likeliest `candidates`.

    `rows` candidates go through the reward model at a time, and so many copies of its KV cache there are: the first
    step encodes the prompt in every row, later ones feed one token a row, and the winner's cache is gathered into all
    rows after each step.
    """
    sequence = torch.tensor([prompt_ids])
    policy_cache = DynamicCache(config=policy.config)
    reward_cache: Cache | None = None
    new = sequence
    for _ in range(max_new_tokens):
        logits = policy(input_ids=new, past_key_values=policy_cache, logits_to_keep=1).logits[0, -1]
        values, tokens = logits.topk(candidates)
        winner: tuple[Tensor, int, Cache] | None = None
        for some_values, some_tokens in zip(values.split(rows), tokens[:, None].split(rows), strict=True):
            if reward_cache is None:
                cache = DynamicCache(config=reward.config)
                input_ids = torch.cat([sequence.expand(len(some_tokens), -1), some_tokens], dim=1)
            else:
                cache = _same_tensors(reward_cache)
                input_ids = some_tokens
            rewards = reward(input_ids=input_ids, past_key_values=cache, use_cache=True).logits[:, 0]
            scores = some_values + weight * rewards
            row = int(scores.argmax())
            if winner is None or scores[row] > winner[0]:
                winner = scores[row], row, cache
                new = some_tokens[row : row + 1]
        assert winner is not None
        _, row, reward_cache = winner
        reward_cache.batch_select_indices(torch.full((rows,), row))
        sequence = torch.cat([sequence, new], dim=1)
    return sequence[0, len(prompt_ids) :].tolist()


def _same_tensors(cache: Cache) -> Cache:
    """A cache that grows by itself; appending makes new tensors, so nothing is copied here."""
    return Cache(layers=[copy(layer) for layer in cache.layers])
