"""Chunk-level beam search: all rows sampled side by side, each with its own copy of the prefix, re-scored whole."""

import torch
from transformers import DynamicCache, PreTrainedModel

from benchmarks.baselines.common import draw, rewards_of, warpers


@torch.no_grad()
def decode(
    policy: PreTrainedModel,
    reward: PreTrainedModel,
    prompt_ids: list[int],
    max_new_tokens: int,
    *,
    width: int,
    successors: int,
    chunk_length: int,
    temperature: float,
    top_k: int,
    seed: int,
) -> list[int]:
    """The response of the best beam: `width * successors` rows, of which every chunk keeps the best `width`.

    The prompt is encoded in every row, caches are gathered at the end of a chunk, and the reward model reads prompt
    and response of all rows from the start.
    """
    generator = torch.Generator().manual_seed(seed)
    warp = warpers(temperature, top_k)
    sequences = torch.tensor([prompt_ids]).repeat(width * successors, 1)
    cache = DynamicCache(config=policy.config)
    new = sequences
    for step in range(1, max_new_tokens + 1):
        logits = policy(input_ids=new, past_key_values=cache, logits_to_keep=1).logits[:, -1]
        new = draw(logits, sequences, warp, generator)
        sequences = torch.cat([sequences, new], dim=1)
        if step % chunk_length == 0 or step == max_new_tokens:
            order = rewards_of(reward, sequences).topk(width).indices.repeat(successors)
            sequences, new = sequences[order], new[order]
            cache.reorder_cache(order)
    return sequences[0, len(prompt_ids) :].tolist()
