"""Best-of-N: `generate` with several sequences, and one forward of the reward model over all of them."""

import torch
from transformers import PreTrainedModel

from benchmarks.baselines.common import rewards_of


@torch.no_grad()
def decode(
    policy: PreTrainedModel,
    reward: PreTrainedModel,
    prompt_ids: list[int],
    max_new_tokens: int,
    *,
    samples: int,
    temperature: float,
    top_k: int,
    seed: int,
) -> list[int]:
    """The sample of largest reward."""
    # `generate` takes no generator.
    torch.manual_seed(seed)
    prompt = torch.tensor([prompt_ids])
    sequences = policy.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=max_new_tokens,
        num_return_sequences=samples,
        do_sample=True,
        temperature=temperature,
        top_k=top_k,
    )
    best = rewards_of(reward, sequences, batch=samples).argmax()
    return sequences[best, len(prompt_ids) :].tolist()
