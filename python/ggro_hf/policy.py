"""The frozen language model: a sequence that can be extended, rewound and committed without recomputing its prefix."""

from typing import Any

import torch
from transformers import PreTrainedModel

from ggro_hf.cache import Branch, RewindableCache, common_prefix_length
from ggro_hf.results import Counters
from ggro_hf.transfer import to_device, wait_for


class Policy:
    """A causal language model and one sequence in its KV cache.

    `token_ids` are the tokens in the cache; `logits[V]` predict the token after them. Raises ValueError where the
    model has no rewindable KV cache.
    """

    def __init__(self, model: PreTrainedModel, counters: Counters, capacity: int = 0) -> None:
        check_policy(model)
        self._model = model
        embedding: Any = model.get_input_embeddings()
        self._device: torch.device = embedding.weight.device
        self._counters = counters
        self._cache = RewindableCache(model.config, capacity)
        self.token_ids: list[int] = []
        self.logits: torch.Tensor = torch.empty(0)

    # Cheaper than no_grad, and fine here: no policy tensor ever takes part in a backward pass.
    @torch.inference_mode()
    def extend(self, token_ids: list[int]) -> torch.Tensor:
        """Append tokens in one forward pass and return the logits `[V]` after the last."""
        inputs = to_device([token_ids], self._device)
        output = self._model(input_ids=inputs, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._counters.policy_tokens += len(token_ids)
        self.token_ids += token_ids
        self.logits = output.logits[0, -1]
        return self.logits

    def wait(self) -> None:
        """Return when `logits` are computed."""
        wait_for(self._device)

    def rewind(self, length: int) -> None:
        """Drop all tokens but the first `length`."""
        self._cache.rewind(length)
        del self.token_ids[length:]

    def save(self, start: int) -> Branch:
        """Copy the tokens from `start` on with their keys and values."""
        return self._cache.save(self.token_ids[start:])

    @torch.inference_mode()
    def restore(self, branch: Branch) -> None:
        """Append a branch that was saved after the same prefix; `logits` stay as they were."""
        self._cache.restore(branch)
        self.token_ids += branch.token_ids

    def move_to(self, token_ids: list[int]) -> torch.Tensor:
        """Make the sequence `token_ids`, recomputing only what follows the longest common prefix; return its logits."""
        kept = min(common_prefix_length(self.token_ids, token_ids), len(token_ids) - 1)
        self.rewind(kept)
        return self.extend(token_ids[kept:])


def check_policy(model: PreTrainedModel) -> None:
    """Raise ValueError where `model` cannot serve as a policy."""
    if model.config.is_encoder_decoder or not model.can_generate():
        raise ValueError(
            f"model is a {type(model).__name__}, which is no decoder-only language model; "
            "load one with AutoModelForCausalLM"
        )


def context_length(model: PreTrainedModel) -> int | None:
    """Largest number of tokens the model was built for, if its configuration says so."""
    return getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
