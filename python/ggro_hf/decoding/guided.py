"""What decoders that ask a reward share."""

import math
from collections.abc import Sequence
from typing import Any, Self

from transformers.generation.streamers import BaseStreamer
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from ggro_hf.decoding.base import Decoder, Request
from ggro_hf.decoding.presets import preset_settings
from ggro_hf.results import Counters
from ggro_hf.rewards import Conversation, Reward, Scoring


class GuidedDecoder(Decoder):
    """A decoder that scores candidates with a reward.

    `tokenizer` is the policy's. It is checked against the reward's where the reward reads token ids, and makes text of
    them where it reads text; `ggro_hf.generate` hands its own to the decoder.
    """

    def __init__(
        self,
        reward: Reward,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        streamer: BaseStreamer | None = None,
    ) -> None:
        super().__init__(streamer=streamer)
        check_reward(reward)
        self.reward = reward
        self.tokenizer = tokenizer
        if tokenizer is not None:
            self.check_tokenizer(tokenizer)

    @classmethod
    def from_preset(cls, name: str, reward: Reward, **overrides: Any) -> Self:
        """A decoder with the settings of `PRESETS[name]`, of which keyword arguments override any."""
        return cls(reward, **(preset_settings(name, cls.__name__) | overrides))

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.reward.check_tokenizer(tokenizer)

    def _open_scoring(self, request: Request, counters: Counters) -> Scoring:
        conversation = Conversation(request.prompt_ids, request.prompt, request.tokenizer or self.tokenizer)
        with counters.phase("reward"):
            return self.reward.open(conversation, counters, request.max_new_tokens)


def check_reward(reward: object) -> None:
    """Raise TypeError for what is no reward."""
    if not isinstance(reward, Reward):
        raise TypeError(
            f"reward is a {type(reward).__name__}, but must be a ggro_hf.Reward: wrap a model in RewardModel, a "
            "function of texts in FunctionReward"
        )


def check_weight(weight: float) -> None:
    """Raise ValueError for a weight that is not finite."""
    if not math.isfinite(weight):
        raise ValueError(f"weight is {weight}, but must be a finite number")


def check_temperature(temperature: float) -> None:
    """Raise ValueError for a temperature that nothing can be divided by."""
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature is {temperature}, but must be a positive number")


def check_positive(**values: int) -> None:
    """Raise ValueError for a number below 1."""
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name} is {value}, but must be at least 1")


def best_index(scores: Sequence[float]) -> int:
    """Index of the largest score, the first of equals; NaN never wins. Raises FloatingPointError if all are NaN."""
    check_some_reward(scores)
    return max((index for index, score in enumerate(scores) if score == score), key=scores.__getitem__)


def check_some_reward(rewards: Sequence[float]) -> None:
    """Raise FloatingPointError where all rewards are NaN."""
    if all(map(math.isnan, rewards)):
        raise FloatingPointError(
            "the reward is NaN for every candidate; check the reward model's weights and its dtype"
        )
