"""Several continuations of one sequence, decoded together: a pass for all of them, the prefix read where it lies."""

import logging
import weakref
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from ggro_hf.attention import PREFIX_ATTENTION, attending
from ggro_hf.cache import ForkedCache, KeysAndValues, RewindableCache
from ggro_hf.decode_step import forward
from ggro_hf.models import device_of, disagreement, embedding_rows
from ggro_hf.results import Counters
from ggro_hf.transfer import to_device

_logger = logging.getLogger(__name__)


class PolicyRows:
    """Continuations of a policy's sequence, all of the same length."""

    def __init__(
        self,
        model: PreTrainedModel,
        cache: RewindableCache,
        prefix_length: int,
        counters: Counters,
        rows: int,
    ) -> None:
        self._model = model
        self._counters = counters
        self._length = prefix_length
        self._shares = _shares_prefix(model)
        self._cache = cache.fork(rows)
        self._rows = rows

    @torch.inference_mode()
    def extend(self, token_ids: list[int]) -> torch.Tensor:
        """Append one token to every row and return the logits `[rows, V]` after them."""
        logits = _forward(self._model, self._cache, token_ids, self._length, shares=self._shares)
        self._counters.policy_tokens += len(token_ids)
        self._length += 1
        return logits

    @torch.inference_mode()
    def select(self, rows: list[int]) -> None:
        """Make `rows` the rows: repeated ones fork, missing ones are dropped."""
        if rows != list(range(self._rows)):
            self._cache.select(to_device([rows], device_of(self._model))[0])
            self._rows = len(rows)

    @torch.inference_mode()
    def read(self, row: int) -> KeysAndValues:
        """Copy a row's keys and values behind the prefix."""
        return self._cache.read(row)


def _forward(
    model: PreTrainedModel, cache: ForkedCache, token_ids: list[int], position: int, *, shares: bool
) -> torch.Tensor:
    device = device_of(model)
    inputs: dict[str, Any] = {
        "input_ids": to_device([[token] for token in token_ids], device),
        "position_ids": torch.full((len(token_ids), 1), position, device=device),
        "past_key_values": cache,
        "use_cache": True,
        "logits_to_keep": 1,
    }
    if not shares:
        cache.join()
        logits: torch.Tensor = model(**inputs).logits
        return logits[:, -1]
    with attending(model, PREFIX_ATTENTION):
        logits = model(**inputs, shared_prefix=cache.shared_prefix).logits
    return logits[:, -1]


_shares: weakref.WeakKeyDictionary[PreTrainedModel, bool] = weakref.WeakKeyDictionary()


def _shares_prefix(model: PreTrainedModel) -> bool:
    """Whether rows of this model can read one prefix where it lies; tried once a model on a few tokens."""
    if model not in _shares:
        _shares[model] = _try_sharing(model)
    return _shares[model]


@torch.inference_mode()
def _try_sharing(model: PreTrainedModel) -> bool:
    vocabulary = embedding_rows(model)
    prefix = [(7 * token + 1) % vocabulary for token in range(5)]

    def two_steps(*, shares: bool) -> torch.Tensor:
        cache = RewindableCache(model.config)
        forward(model, cache, prefix)
        fork = cache.fork(2)
        return torch.cat(
            [
                _forward(model, fork, [step, (step + 9) % vocabulary], len(prefix) + step, shares=shares)
                for step in range(2)
            ]
        )

    reason = disagreement("logits", partial(two_steps, shares=True), two_steps(shares=False), model.dtype)
    if reason is not None:
        _logger.warning("%s decodes rows with a copy of the prefix for each: %s", type(model).__name__, reason)
    return reason is None
