"""Rewards made of others: scaled, centred and clipped, and weighted sums."""

import math
from collections.abc import Sequence

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from ggro_hf.results import Counters
from ggro_hf.rewards.base import Capabilities, Conversation, Reward, Scoring


class Transformed(Reward):
    """`scale * (reward - center)`, clipped to `clip = (low, high)` where given; a NaN stays one.

    A bound may be infinite. A cost becomes a reward with `scale=-1`. Raises ValueError where scale or center is not
    finite, or the bounds are not in order.
    """

    def __init__(
        self, reward: Reward, *, scale: float = 1.0, center: float = 0.0, clip: tuple[float, float] | None = None
    ) -> None:
        for name, number in (("scale", scale), ("center", center)):
            if not math.isfinite(number):
                raise ValueError(f"{name} is {number}, but a reward is multiplied and moved by finite numbers")
        if clip is not None and not clip[0] <= clip[1]:
            raise ValueError(f"clip is {clip}, but its bounds are (low, high), the lower first and neither of them NaN")
        self.reward, self.scale, self.center, self.clip = reward, scale, center, clip

    @property
    def capabilities(self) -> Capabilities:
        return _without_gradient([self.reward])

    def open(self, conversation: Conversation, counters: Counters, max_new_tokens: int) -> Scoring:
        return _TransformedScoring(self, self.reward.open(conversation, counters, max_new_tokens))

    def check_tokenizer(self, policy_tokenizer: PreTrainedTokenizerBase) -> None:
        self.reward.check_tokenizer(policy_tokenizer)

    def __call__(self, reward: float) -> float:
        """The transform of one number."""
        value = self.scale * (reward - self.center)
        if self.clip is None:
            return value
        low, high = self.clip
        # Python's min and max return a NaN that comes first.
        return min(max(value, low), high)


class WeightedSum(Reward):
    """`sum_i weight_i * reward_i` of rewards that score the same responses.

    Raises ValueError where there are no terms or a weight is not finite.
    """

    def __init__(self, terms: Sequence[tuple[float, Reward]]) -> None:
        self.terms = list(terms)
        if not self.terms:
            raise ValueError("terms are empty; give at least one (weight, reward)")
        for index, (weight, _) in enumerate(self.terms):
            if not math.isfinite(weight):
                raise ValueError(f"weight of term {index} is {weight}; give a finite number")

    @property
    def capabilities(self) -> Capabilities:
        return _without_gradient([reward for _, reward in self.terms])

    def open(self, conversation: Conversation, counters: Counters, max_new_tokens: int) -> Scoring:
        opened = [(weight, reward.open(conversation, counters, max_new_tokens)) for weight, reward in self.terms]
        return _WeightedSumScoring(opened)

    def check_tokenizer(self, policy_tokenizer: PreTrainedTokenizerBase) -> None:
        for _, reward in self.terms:
            reward.check_tokenizer(policy_tokenizer)


class _TransformedScoring(Scoring):
    def __init__(self, transform: Transformed, scoring: Scoring) -> None:
        self._transform, self._scoring = transform, scoring

    def score(self, continuations: Sequence[Sequence[list[int]]]) -> list[list[float]]:
        return [[self._transform(reward) for reward in rewards] for rewards in self._scoring.score(continuations)]

    def keep(self, chosen: Sequence[tuple[int, int]]) -> None:
        self._scoring.keep(chosen)


class _WeightedSumScoring(Scoring):
    def __init__(self, terms: list[tuple[float, Scoring]]) -> None:
        self._terms = terms

    def score(self, continuations: Sequence[Sequence[list[int]]]) -> list[list[float]]:
        totals = [[0.0] * len(of_sequence) for of_sequence in continuations]
        for weight, scoring in self._terms:
            for total, rewards in zip(totals, scoring.score(continuations), strict=True):
                total[:] = [so_far + weight * reward for so_far, reward in zip(total, rewards, strict=True)]
        return totals

    def keep(self, chosen: Sequence[tuple[int, int]]) -> None:
        for _, scoring in self._terms:
            scoring.keep(chosen)


def _without_gradient(rewards: list[Reward]) -> Capabilities:
    """What all of them can do; a gradient is none of it, being that of a `RewardModel` alone."""
    each = [reward.capabilities for reward in rewards]
    limits = [one.max_tokens for one in each if one.max_tokens is not None]
    return Capabilities(
        reads_ids=all(one.reads_ids for one in each),
        cached_prefix=all(one.cached_prefix for one in each),
        tree=all(one.tree for one in each),
        gradient=False,
        max_tokens=min(limits, default=None),
    )
