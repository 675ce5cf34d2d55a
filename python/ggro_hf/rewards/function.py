"""A Python function of texts as a reward."""

from collections.abc import Callable, Sequence
from math import isnan
from numbers import Real
from typing import Any

import numpy as np
import torch

from ggro_hf.results import Counters
from ggro_hf.rewards.base import Capabilities, Conversation, Reward, Scoring
from ggro_hf.rewards.formats import Dialogue, TextFormat
from ggro_hf.rewards.responses import ResponseScoring, name_of, prompt_of

TextFunction = Callable[[list[str]], Sequence[float] | torch.Tensor | np.ndarray]
"""From n texts to n rewards: a sequence of numbers, or a tensor or array of shape [n]."""


class FunctionReward(Reward):
    """A function that gives a list of texts their rewards: rules, an API, a judge.

    A text is what `format` writes, by default "Human: ...", an empty line and "Assistant: ...";
    TextTemplate("{response}") gives the response alone. No text is asked for twice in a call of `score`; `batch_size`
    is the largest number of texts in one call of the function, None for no limit.

    Scores raise RuntimeError where the function raises, after calling it for single texts to find the one at fault;
    TypeError where it returns no numbers; ValueError where their number or shape is wrong, or one is NaN.
    """

    def __init__(
        self, function: TextFunction, *, format: TextFormat | None = None, batch_size: int | None = None
    ) -> None:
        if not callable(function):
            raise TypeError(f"function is a {type(function).__name__}; give a callable from list[str] to list[float]")
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, but must be at least 1, or None for no limit")
        self.function = function
        self.format = format or Dialogue()
        self.batch_size = batch_size

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(reads_ids=False, cached_prefix=False, tree=False, gradient=False, max_tokens=None)

    def open(self, conversation: Conversation, counters: Counters, max_new_tokens: int) -> Scoring:
        return _FunctionScoring(self, conversation)


class _FunctionScoring(ResponseScoring):
    def __init__(self, reward: FunctionReward, conversation: Conversation) -> None:
        super().__init__(conversation)
        self._reward = reward
        self._prompt = prompt_of(conversation) if reward.format.reads_prompt else ""
        function = reward.function
        self._name = f"reward function {getattr(function, '__name__', type(function).__name__)}"

    def _compute(self, responses: list[str], places: list[tuple[int, int]]) -> list[float]:
        written = self._reward.format.render(self._prompt, responses)
        named = {text: name_of(place, text) for text, place in zip(reversed(written), reversed(places), strict=True)}
        texts = list(dict.fromkeys(written))
        size = self._reward.batch_size or len(texts)
        rewards: dict[str, float] = {}
        for start in range(0, len(texts), size):
            batch = texts[start : start + size]
            rewards.update(zip(batch, self._call(batch, [named[text] for text in batch]), strict=True))
        return [rewards[text] for text in written]

    def _call(self, texts: list[str], names: list[str]) -> list[float]:
        try:
            result = self._reward.function(list(texts))
        except Exception as error:
            where, cause = self._culprit(texts, names, error)
            raise RuntimeError(f"{self._name} raised {type(cause).__name__}: {cause}, for {where}") from cause
        rewards = self._numbers(result, names)
        for name, reward in zip(names, rewards, strict=True):
            if isnan(reward):
                raise ValueError(f"{self._name} returned NaN for {name}; return a number for every text")
        return rewards

    def _culprit(self, texts: list[str], names: list[str], error: Exception) -> tuple[str, Exception]:
        if len(texts) == 1:
            return names[0], error
        for text, name in zip(texts, names, strict=True):
            try:
                self._reward.function([text])
            except Exception as alone:
                return name, alone
        return f"{len(texts)} texts together, though for none alone; the first is {names[0]}", error

    def _numbers(self, result: Any, names: list[str]) -> list[float]:
        wanted = f"return {len(names)} numbers, one for each text"
        if isinstance(result, torch.Tensor | np.ndarray):
            if tuple(result.shape) != (len(names),):
                raise ValueError(
                    f"{self._name} returned the shape {list(result.shape)} for {len(names)} texts; "
                    f"{wanted}: the shape [{len(names)}]"
                )
            result = result.tolist()
        elif isinstance(result, str | bytes) or not isinstance(result, Sequence):
            raise TypeError(f"{self._name} returned a {type(result).__name__} for {len(names)} texts; {wanted}")
        if len(result) != len(names):
            raise ValueError(f"{self._name} returned {len(result)} rewards for {len(names)} texts; {wanted}")
        return [self._number(value, name) for value, name in zip(result, names, strict=True)]

    def _number(self, value: Any, name: str) -> float:
        if isinstance(value, torch.Tensor | np.ndarray) and value.ndim == 0:
            value = value.item()
        if not isinstance(value, Real):
            raise TypeError(f"{self._name} returned {value!r}, a {type(value).__name__}, for {name}; return a number")
        return float(value)
