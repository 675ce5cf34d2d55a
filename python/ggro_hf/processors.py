"""Pieces of guided decoding for other people's loops: processors and a stopping criterion for `generate`.

    gate = EntropyGate(2.0, RewardGuidedLogitsProcessor(reward, weight=1.5, candidates=10, max_new_tokens=128))
    model.generate(**inputs, do_sample=False, max_new_tokens=128, logits_processor=[gate])

guides the tokens of which the model is unsure and leaves the others alone. The decoders do the same with less work.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from ggro_hf.decoding.guided import check_positive, check_reward, check_some_reward, check_weight
from ggro_hf.reading import TopK, checked_entropy
from ggro_hf.results import Counters
from ggro_hf.rewards import Conversation, Reward, Scoring
from ggro_hf.transfer import to_host
from ggro_kernels import entropy_topk

Inner = Callable[[torch.LongTensor, Tensor], Tensor]


class EntropyGate(LogitsProcessor):
    """Applies another processor in those rows whose next-token entropy is at or above a threshold.

    The entropy is that of the scores as they arrive, so of the model itself where the gate is the first processor.
    `inner` is called with the whole batch, so that a processor which remembers its rows finds them in their places, but
    only where some row is open; without one the gate just remembers.

    `entropies[B]` fp32, nats, are those of the last call, on the device of the scores. Continuous batching, whose
    rows have no fixed place, is not supported; it may drop the gate with a warning.

    Raises ValueError for a threshold that is NaN; when called with `inner`, FloatingPointError where scores hold NaN or
    +inf.
    """

    supports_continuous_batching = False

    def __init__(self, threshold: float, inner: Inner | None = None) -> None:
        if math.isnan(threshold):
            raise ValueError("threshold is NaN, but must be a number of nats (inf for a gate that never opens)")
        self.threshold = threshold
        self.inner = inner
        self.entropies: Tensor | None = None
        self._prompt_length = self._length = -1

    def __call__(self, input_ids: torch.LongTensor, scores: Tensor) -> Tensor:
        length = input_ids.shape[1]
        # Within one generation, every call has one token more than the one before.
        if length != self._length + 1:
            self._prompt_length = length
        self._length = length
        self.entropies = entropy_topk(scores, 1).entropy
        if self.inner is None:
            return scores
        entropies = [checked_entropy(entropy) for entropy in self.entropies.tolist()]
        is_open = [entropy >= self.threshold for entropy in entropies]
        if not any(is_open):
            return scores
        processed = self.inner(input_ids, scores)
        if all(is_open):
            return processed
        return torch.where(torch.tensor(is_open, device="cpu").to(scores.device)[:, None], processed, scores)

    def new_tokens(self, input_ids: Tensor) -> int:
        """Tokens after the prompt in `input_ids[B, L]`, which end with the token drawn after the gate's last call.

        Raises ValueError where the gate has not been called for this batch.
        """
        if self.entropies is None or input_ids.shape != (len(self.entropies), self._length + 1):
            raise ValueError(
                f"the gate has not seen this step (input_ids of shape {tuple(input_ids.shape)}); "
                "hand it to the same generate call: logits_processor=[gate]"
            )
        return self._length + 1 - self._prompt_length

    def end_generation(self) -> None:
        """Take the next call for the first one of a generation, even if it continues the last one's output."""
        self._length = -1


class EntropyStoppingCriteria(StoppingCriteria):
    """Stops a row at the first token that was chosen at or above the gate's threshold of entropy.

    The token itself is part of the output: a criterion is asked when it has been appended. Drop it to continue from the
    position before it. `generate` gives criteria no scores, so the entropy is read from `gate`, which must be among the
    same call's processors. After a generation that this criterion has ended in all rows, its output may be the next
    prompt; one that ended otherwise and is continued counts its tokens as before.

    Args:
        gate: whose entropies and threshold are used.
        min_new_tokens: so many tokens a response has at least.

    Raises ValueError for `min_new_tokens` below 1; when called, where the gate has not seen the step.
    """

    def __init__(self, gate: EntropyGate, *, min_new_tokens: int = 1) -> None:
        check_positive(min_new_tokens=min_new_tokens)
        self.gate = gate
        self.min_new_tokens = min_new_tokens
        self._stopped: Tensor | None = None

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **kwargs: Any) -> torch.BoolTensor:
        new_tokens = self.gate.new_tokens(input_ids)
        entropies = self.gate.entropies
        assert entropies is not None
        stops = (entropies >= self.gate.threshold) & (new_tokens >= self.min_new_tokens)
        self._stopped = stops if new_tokens == 1 or self._stopped is None else self._stopped | stops
        if self._stopped.all():
            self.gate.end_generation()
        return stops  # type: ignore[return-value]


@dataclass(slots=True)
class _Row:
    """A response in the making: the sequence at the last call, of which `prompt_length` tokens are the prompt, and the
    candidates scored then.
    """

    token_ids: list[int]
    prompt_length: int
    scoring: Scoring
    candidates: list[int] = field(default_factory=list)

    def continues_as(self, token_ids: list[int], max_new_tokens: int) -> bool:
        """Whether a sequence is this one with more tokens, and not too long for the same response."""
        length = len(self.token_ids)
        return length < len(token_ids) <= self.prompt_length + max_new_tokens and token_ids[:length] == self.token_ids


class RewardGuidedLogitsProcessor(LogitsProcessor):
    """ARGS as a processor: the likeliest tokens get `score + weight * reward`, all others -inf.

    With `generate(do_sample=False)` the output is that of the `ARGS` decoder, ties aside; with `do_sample=True` and
    `temperature`, that of its law. A reward that is NaN never wins.

    Every row is one scoring of the reward. Where a row continues what it was at the last call, only what is new is
    computed, and the token that was chosen not again; any other row starts a conversation: in the first call, of a new
    generation, of a beam that has two successors. A row that has grown by more than `max_new_tokens` starts one too.

    Limits: beam search works on log-probabilities and computes most rows anew. Continuous batching, whose rows have no
    identity, is not supported; it may drop this processor with a warning. A prompt that continues the last response of
    the same object (the next turn of a chat) is taken for the same response unless it is too long for one; that is
    right for rewards that read token ids, and others need `reset` in between.

    Args:
        reward: of prompt and response.
        weight: of the reward against the scores (w).
        candidates: number of likeliest tokens that compete (k); those that are -inf already do not.
        max_new_tokens: of a response.
        pad_token_id: what batches are padded with on the left, and finished rows on the right. A prompt must not begin
            with it. None for batches without padding.
        tokenizer: the policy's, to check it against the reward's, and for rewards that read text.

    `counters` has the reward tokens of all calls. Raises ValueError for settings out of range, for a tokenizer that the
    reward cannot work with, and what the reward raises; when called, ValueError where the vocabulary is smaller than
    `candidates` or a row has padding only, FloatingPointError where scores hold NaN or +inf or all rewards are NaN.

    Source: Khanov et al., 2024 (ARGS).
    """

    supports_continuous_batching = False

    def __init__(
        self,
        reward: Reward,
        *,
        weight: float = 1.5,
        candidates: int = 10,
        max_new_tokens: int = 128,
        pad_token_id: int | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        check_reward(reward)
        check_weight(weight)
        check_positive(candidates=candidates, max_new_tokens=max_new_tokens)
        if tokenizer is not None:
            reward.check_tokenizer(tokenizer)
        self.reward = reward
        self.weight = weight
        self.candidates = candidates
        self.max_new_tokens = max_new_tokens
        self.pad_token_id = pad_token_id
        self.tokenizer = tokenizer
        self.counters = Counters()
        self._rows: list[_Row] = []

    def reset(self) -> None:
        """Take all rows of the next call for new conversations."""
        self._rows = []

    def __call__(self, input_ids: torch.LongTensor, scores: Tensor) -> Tensor:
        if self.candidates > scores.shape[-1]:
            raise ValueError(
                f"candidates is {self.candidates}, but the vocabulary has {scores.shape[-1]} tokens; lower it"
            )
        # Where the reward raises, the next call must not find rows that have moved on.
        known, self._rows = dict(enumerate(self._rows)), []
        rows = []
        guided = torch.full_like(scores, -torch.inf)
        for index, padded in enumerate(input_ids.tolist()):
            token_ids = self._without_padding(padded, index)
            row = self._claim(known, token_ids, index)
            rows.append(row or self._open(token_ids))
            if row is not None:
                if token_ids[-1] == self.pad_token_id:
                    guided[index] = scores[index]
                    continue
                self._advance(row, token_ids)
            tokens, values = self._score(rows[-1], scores[index])
            places = torch.tensor(tokens, device="cpu").to(scores.device)
            guided[index, places] = torch.tensor(values, dtype=scores.dtype, device="cpu").to(scores.device)
        self._rows = rows
        return guided

    def _without_padding(self, padded: list[int], index: int) -> list[int]:
        start = next((place for place, token in enumerate(padded) if token != self.pad_token_id), None)
        if start is None:
            raise ValueError(
                f"row {index} of input_ids has no tokens but padding ({self.pad_token_id}); give it a prompt"
            )
        return padded[start:]

    def _claim(self, known: dict[int, _Row], token_ids: list[int], index: int) -> _Row | None:
        """Take the row that `token_ids` continue out of those of the last call: that in the same place, or another."""
        for place in (index, *known):
            row = known.get(place)
            if row is not None and row.continues_as(token_ids, self.max_new_tokens):
                return known.pop(place)
        return None

    def _open(self, token_ids: list[int]) -> _Row:
        conversation = Conversation(token_ids, tokenizer=self.tokenizer)
        return _Row(token_ids, len(token_ids), self.reward.open(conversation, self.counters, self.max_new_tokens))

    def _advance(self, row: _Row, token_ids: list[int]) -> None:
        """Bring the scoring from the last call's sequence to `token_ids`, which continue it."""
        rest = token_ids[len(row.token_ids) :]
        if rest[0] in row.candidates:
            row.scoring.keep([(0, row.candidates.index(rest[0]))])
            rest = rest[1:]
        if rest:
            row.scoring.score([[rest]])
            row.scoring.keep([(0, 0)])
        row.token_ids = token_ids

    def _score(self, row: _Row, scores: Tensor) -> tuple[list[int], list[float]]:
        """The candidates of a row of scores `[V]`, and their new scores."""
        reader = TopK(self.candidates)
        position = reader.on_host(*to_host(*reader.on_device(scores)))
        finite = sum(logit > -math.inf for logit in position.logits)
        row.candidates = position.tokens[:finite]
        (rewards,) = row.scoring.score([[[token] for token in row.candidates]])
        check_some_reward(rewards)
        logits = position.logits[:finite]
        guided = [logit + self.weight * reward for logit, reward in zip(logits, rewards, strict=True)]
        return row.candidates, [-math.inf if math.isnan(score) else score for score in guided]
