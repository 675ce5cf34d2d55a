"""Chunk-level beam search and cascade reward sampling, written out from their descriptions.

Nothing here is fast and nothing but the source of random numbers is shared with the decoders: one sequence after
another, a forward over the whole of it for every token and every reward, candidates drawn until one is accepted.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from math import exp, inf, isnan, nan

import torch
from transformers import PreTrainedModel

from ggro_hf.decoding.drawing import ACCEPTING, uniforms

Rewarding = Callable[[list[int]], float]
"""From prompt and response to the reward."""


@dataclass
class PlainPolicy:
    """Draws from a causal model: temperature, then top-k, then top-p."""

    model: PreTrainedModel
    temperature: float
    top_k: int | None = None
    top_p: float | None = None
    _known: dict[tuple[int, ...], torch.Tensor] = field(default_factory=dict)

    def logits(self, token_ids: list[int]) -> torch.Tensor:
        """Logits [V] after a sequence."""
        key = tuple(token_ids)
        if key not in self._known:
            with torch.no_grad():
                self._known[key] = self.model(torch.tensor([token_ids]), use_cache=False).logits[0, -1].double()
        return self._known[key]

    def entropy(self, token_ids: list[int]) -> float:
        """Of the model itself, in nats."""
        logarithms = self.logits(token_ids).log_softmax(0)
        return -(logarithms.exp() * logarithms).sum().item()

    def law(self, token_ids: list[int]) -> list[tuple[int, float]]:
        """Tokens with their probabilities: the likeliest first with top-k, else by id."""
        logits = self.logits(token_ids).tolist()
        tokens = list(range(len(logits)))
        if self.temperature == 0:
            return [(min(tokens, key=lambda token: (-logits[token], token)), 1.0)]
        if self.top_k is not None:
            tokens = sorted(tokens, key=lambda token: (-logits[token], token))[: self.top_k]
        weights = [exp((logits[token] - max(logits)) / self.temperature) for token in tokens]
        if self.top_p is not None:
            total, reached = sum(weights), 0.0
            for place in sorted(range(len(tokens)), key=lambda place: -weights[place]):
                # A token stays while those before it do not make up the share.
                if reached >= self.top_p * total:
                    weights[place] = 0.0
                else:
                    reached += weights[place]
        return [(token, weight / sum(weights)) for token, weight in zip(tokens, weights, strict=True)]

    def draw(self, token_ids: list[int], number: float) -> int:
        """The first token at which the sum of probabilities exceeds the number."""
        reached = 0.0
        for token, probability in self.law(token_ids):
            reached += probability
            if number < reached:
                return token
        raise AssertionError("probabilities sum to one")


@dataclass
class Choice:
    """What a search chose among: candidates, their rewards, and the number of the chosen."""

    candidates: list[list[int]]
    rewards: list[float]
    chosen: int


@dataclass
class Found:
    token_ids: list[int]
    reward: float
    choices: list[Choice]


def plain_chunk_beam_search(
    policy: PlainPolicy,
    reward: Rewarding,
    prompt: list[int],
    *,
    max_new_tokens: int,
    eos_ids: frozenset[int],
    width: int,
    successors: int,
    chunk_length: int,
    seed: int,
    row: int = 0,
    as_released: bool = False,
) -> Found:
    """Beams that have not ended get successors; the best of all stay, one that has ended once."""
    beams = [Found([], nan, [])]
    ended = [False]
    for round_number in count():
        pool: list[Found] = []
        live = 0
        for beam, has_ended in zip(beams, ended, strict=True):
            if has_ended:
                pool += [beam] * (successors if as_released else 1)
                continue
            draws = successors if round_number else width * successors
            numbers = uniforms(seed, row, round_number, live).random((chunk_length, draws))
            live += 1
            chunks = []
            for draw in range(draws):
                chunk: list[int] = []
                while len(chunk) < chunk_length and len(beam.token_ids) + len(chunk) < max_new_tokens:
                    chunk.append(policy.draw(prompt + beam.token_ids + chunk, numbers[len(chunk), draw]))
                    if chunk[-1] in eos_ids:
                        break
                chunks.append(chunk)
            rewards = [reward(prompt + beam.token_ids + chunk) for chunk in chunks]
            pool += [
                Found(beam.token_ids + chunk, value, [*beam.choices, Choice(chunks, rewards, number)])
                for number, (chunk, value) in enumerate(zip(chunks, rewards, strict=True))
            ]
        pool.sort(key=lambda beam: inf if isnan(beam.reward) else -beam.reward)
        beams = pool[:width]
        ended = [beam.token_ids[-1] in eos_ids or len(beam.token_ids) == max_new_tokens for beam in beams]
        if all(ended):
            return beams[0]
    raise AssertionError


def plain_cards(
    policy: PlainPolicy,
    reward: Rewarding,
    prompt: list[int],
    *,
    max_new_tokens: int,
    eos_ids: frozenset[int],
    reward_threshold: float,
    entropy_threshold: float,
    alpha: float,
    max_segment: int,
    attempts: int,
    hard: bool,
    seed: int,
    row: int = 0,
) -> Found:
    """Segments up to a token of high entropy, each drawn again until it is accepted."""
    first = (1 - alpha) * reward(prompt) + alpha * reward_threshold
    token_ids: list[int] = []
    choices: list[Choice] = []
    for segment_number in count():
        candidates: list[list[int]] = []
        rewards: list[float] = []
        chosen = None
        for attempt in range(attempts + 1):
            numbers = uniforms(seed, row, segment_number, attempt)
            segment: list[int] = []
            while len(segment) < max_segment and len(token_ids) + len(segment) < max_new_tokens:
                sequence = prompt + token_ids + segment
                number = numbers.random()
                if len(segment) >= 4 and policy.entropy(sequence) >= entropy_threshold:
                    break
                segment.append(policy.draw(sequence, number))
                if segment[-1] in eos_ids:
                    break
            candidates.append(segment)
            rewards.append(reward(prompt + token_ids + segment))
            if attempt == attempts:
                break
            generated = len(token_ids) + len(segment)
            wanted = min(reward_threshold, first + generated * (reward_threshold - first) / max_new_tokens)
            if hard:
                accepted = rewards[-1] >= wanted
            else:
                probability = min(1.0, exp(min(0.0, (rewards[-1] - wanted) / policy.temperature)))
                accepted = uniforms(seed, row, segment_number, attempt, purpose=ACCEPTING).random() < probability
            if accepted:
                chosen = attempt
                break
        if chosen is None:
            chosen = rewards.index(max(rewards))
        choices.append(Choice(candidates, rewards, chosen))
        token_ids = token_ids + candidates[chosen]
        if token_ids[-1] in eos_ids or len(token_ids) == max_new_tokens:
            return Found(token_ids, rewards[chosen], choices)
    raise AssertionError
