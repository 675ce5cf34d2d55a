"""The frozen language model: a sequence that can be extended, rewound and committed without recomputing its prefix."""

from typing import Generic, TypeVar

import torch
from transformers import PreTrainedModel

from ggro_hf import step_pool
from ggro_hf.cache import Branch, common_prefix_length
from ggro_hf.decode_step import forward
from ggro_hf.policy_rows import PolicyRows
from ggro_hf.reading import Reader
from ggro_hf.results import Counters
from ggro_hf.transfer import to_host

T = TypeVar("T")


class Policy(Generic[T]):
    """A causal language model and one sequence in its KV cache.

    `token_ids` are the tokens in the cache; `position` is what the reader made of the logits computed last. Raises
    ValueError where the model has no rewindable KV cache.
    """

    position: T

    def __init__(self, model: PreTrainedModel, counters: Counters, reader: Reader[T], capacity: int = 0) -> None:
        check_policy(model)
        self._model = model
        self._reader = reader
        self._counters = counters
        self._slot = step_pool.lend(self, model, capacity)
        self._cache = self._slot.cache
        self.token_ids: list[int] = []

    # Cheaper than no_grad, and fine here: no policy tensor ever takes part in a backward pass.
    @torch.inference_mode()
    def extend(self, token_ids: list[int], *, run_ahead: bool = False) -> T:
        """Append tokens in one forward pass and return the position after the last, at one wait for the device.

        `run_ahead` says that the likeliest token will probably be the next: where there is a captured step, the device
        begins with it before the host has seen which it is. Raises FloatingPointError where the reader does.
        """
        sequence = self.token_ids + token_ids
        step = self._slot.step_for(self._model, sequence, self._reader) if len(token_ids) == 1 else None
        if step is None:
            self._stop()
            logits = forward(self._model, self._cache, token_ids)
            self._counters.policy_tokens += len(token_ids)
            tensors = to_host(*self._reader.on_device(logits))
        else:
            launches = step.launches
            run_ahead = run_ahead and len(sequence) + 1 < step.rows
            tensors = step.run(token_ids[0], len(sequence) - 1, self._reader, run_ahead=run_ahead)
            self._cache.rewind(len(sequence))
            self._counters.policy_tokens += step.launches - launches
        self.token_ids = sequence
        self.position = self._reader.on_host(*tensors)
        return self.position

    def rewind(self, length: int) -> None:
        """Drop all tokens but the first `length`."""
        self._stop()
        self._cache.rewind(length)
        del self.token_ids[length:]

    def save(self, start: int) -> Branch:
        """Copy the tokens from `start` on with their keys and values."""
        return self._cache.save(self.token_ids[start:])

    @torch.inference_mode()
    def restore(self, branch: Branch) -> None:
        """Append a branch that was saved after the same prefix; `position` stays as it was."""
        self._stop()
        self._cache.restore(branch)
        self.token_ids += branch.token_ids

    def move_to(self, token_ids: list[int]) -> T:
        """Make the sequence `token_ids`, recomputing what follows the longest common prefix; return its position."""
        kept = min(common_prefix_length(self.token_ids, token_ids), len(token_ids) - 1)
        self.rewind(kept)
        return self.extend(token_ids[kept:])

    @torch.inference_mode()
    def fork(self, rows: int) -> PolicyRows:
        """Rows that continue the sequence, which must stay as it is meanwhile."""
        self._stop()
        return PolicyRows(self._model, self._cache, len(self.token_ids), self._counters, rows)

    def _stop(self) -> None:
        if self._slot.step is not None:
            self._slot.step.stop()


def check_policy(model: PreTrainedModel) -> None:
    """Raise ValueError where `model` cannot serve as a policy."""
    if model.config.is_encoder_decoder or not model.can_generate():
        raise ValueError(
            f"model is a {type(model).__name__}, which is no decoder-only language model; "
            "load one with AutoModelForCausalLM"
        )
