"""A reward model's pass over segments behind prefixes, and back to their embeddings; on a CPU recorded by length."""

import itertools
import logging
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from ggro_hf.attention import attending
from ggro_hf.graphs import captured_size
from ggro_hf.models import device_of
from ggro_hf.recording import CaptureError, Recording
from ggro_hf.rewards.behind import BEHIND_PREFIXES, Behind, Held, holding, new_number
from ggro_hf.step_pool import check_capturable, fingerprint_of
from ggro_hf.transfer import to_device

# Recordings that are kept, and tokens of the longest: their intermediate results stay in memory.
_MOST_RECORDINGS, _LONGEST = 16, 256

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SegmentScore:
    """Reward of prefix and segment, and the gradient `[tokens, d]` at the segment's first input embeddings.

    `place` is where the prefix's cache has the segment, None if it is empty.
    """

    reward: float
    gradient: Tensor | None
    place: tuple[int, int] | None


class _NewTokens(DynamicLayer):
    """Hands attention the new keys and values alone; it finds the prefixes itself."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        return key_states, value_states

    def get_seq_length(self) -> int:
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0


class _Pass:
    """Backbone and head over a number of tokens behind whatever prefixes, with or without the way back."""

    def __init__(self, model: PreTrainedModel, layers: int, tokens: int, *, gradient: bool) -> None:
        device = device_of(model)
        self._model = model
        self._layers = layers
        self._gradient = gradient
        self._number = new_number()
        # Token, position, start of its segment, and whether that ends with it.
        self._inputs = torch.zeros(4, tokens, dtype=torch.int64, device=device)
        self._recording: Recording[tuple[Tensor, Tensor | None]] | None = None

    def record(self, parts: Sequence[Behind]) -> None:
        """Let it be replayed from now on. Raises whatever keeps it from being recorded."""
        with holding(self._number, self._held(parts)):
            self._recording = Recording(self._run, self._inputs.device)

    def __call__(self, parts: Sequence[Behind]) -> tuple[Tensor, Tensor | None]:
        """Rewards `[T]` at every token, and the gradients `[T, d]` of those at segments' ends; until the next call."""
        with holding(self._number, self._held(parts)):
            if self._recording is None:
                return self._run()
            self._recording.replay()
            return self._recording.outputs

    def _held(self, parts: Sequence[Behind]) -> Held:
        """Make the parts the inputs."""
        tokens = self._inputs.shape[1]
        ends = frozenset(_ends(parts))
        rows = [
            [token for part in parts for segment in part.segments for token in segment],
            [position for part in parts for position in part.positions],
            [start for part in parts for start in part.starts],
            [int(token in ends) for token in range(tokens)],
        ]
        self._inputs.copy_(to_device([row + [0] * (tokens - len(row)) for row in rows], None), non_blocking=True)
        return Held(parts, self._inputs[2])

    def _run(self) -> tuple[Tensor, Tensor | None]:
        model: Any = self._model
        ids, positions, _, ends = self._inputs[:, None]
        with torch.inference_mode(False), torch.set_grad_enabled(self._gradient), attending(model, BEHIND_PREFIXES):
            embeddings = model.get_input_embeddings()(ids).detach().requires_grad_(self._gradient)
            hidden = model.base_model(
                inputs_embeds=embeddings,
                position_ids=positions,
                past_key_values=Cache(layers=[_NewTokens() for _ in range(self._layers)]),
                use_cache=True,
                behind=self._number,
            ).last_hidden_state
            rewards = model.score(hidden[0])[:, 0]
            if not self._gradient:
                return rewards, None
            # A segment's reward depends on its own tokens alone, so the gradient of their sum is that of each.
            (gradient,) = torch.autograd.grad(rewards, embeddings, grad_outputs=ends[0].to(rewards))
        return rewards.detach(), gradient[0]


class SegmentPasses:
    """The passes of one model, which is called with the attention of `behind.py`."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._fingerprint: Hashable = None
        self._recorded: OrderedDict[tuple[int, bool], _Pass] = OrderedDict()
        self.records = _can_be_recorded(model)
        """Whether its passes are recorded."""

    def refresh(self) -> None:
        """Forget what was recorded of a model that has changed since."""
        fingerprint = fingerprint_of(self._model)
        if fingerprint != self._fingerprint:
            self._fingerprint = fingerprint
            self._recorded.clear()
            self.records = _can_be_recorded(self._model)

    def score(self, parts: Sequence[Behind], gradient_tokens: Sequence[int]) -> list[SegmentScore]:
        """Scores of all segments, none of which may be empty, in order; their keys and values join the caches.

        `gradient_tokens` has for every part at how many of its segments' first tokens gradients are wanted.
        """
        rewards, gradient = self._pass_for(parts, gradient=any(gradient_tokens))(parts)
        values = rewards.tolist()
        segments = [
            (*place, wanted) for part, wanted in zip(parts, gradient_tokens, strict=True) for place in part.places
        ]
        scores = []
        for last, (start, end, wanted) in zip(_ends(parts), segments, strict=True):
            first = last + 1 - (end - start)
            own = gradient[first : min(first + wanted, last + 1)].clone() if gradient is not None and wanted else None
            scores.append(SegmentScore(values[last], own, (start, end)))
        return scores

    def _pass_for(self, parts: Sequence[Behind], *, gradient: bool) -> _Pass:
        tokens = sum(part.tokens for part in parts)
        layers = len(parts[0].cache.rewindable)
        if not self.records or tokens > _LONGEST:
            return _Pass(self._model, layers, tokens, gradient=gradient)
        key = captured_size(tokens), gradient
        found = self._recorded.get(key)
        if found is not None:
            self._recorded.move_to_end(key)
            return found
        made = _Pass(self._model, layers, key[0], gradient=gradient)
        # At once, so that a reward does not depend on how often such a pass ran before.
        try:
            made.record(parts)
        # Whatever it is, the ordinary pass can do without.
        except Exception as error:
            # Not where it is the tokens' fault, or memory's: then this raises.
            made(parts)
            name, reason = type(self._model).__name__, str(error).partition("\n")[0]
            _logger.info("%s scores segments by ordinary passes: %s", name, reason)
            self.records = False
            return made
        self._recorded[key] = made
        while len(self._recorded) > _MOST_RECORDINGS:
            self._recorded.popitem(last=False)
        return made


def _can_be_recorded(model: PreTrainedModel) -> bool:
    try:
        check_capturable(model)
    except CaptureError:
        return False
    return device_of(model).type == "cpu"


def _ends(parts: Sequence[Behind]) -> list[int]:
    """Of every segment the place of its last token in the pass."""
    lengths = (len(segment) for part in parts for segment in part.segments)
    return [end - 1 for end in itertools.accumulate(lengths)]
