"""What a response asks of the models while it is decoded. Whoever runs it may serve several responses at once."""

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from ggro_hf.results import Counters
from ggro_hf.rewards import RewardPrefix, score_segments

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Step:
    """Let rows grow by a token each; answered by a list of the positions after them, in order, or why there is none.

    `run_ahead` says that the likeliest token will probably be the next.
    """

    tokens: Mapping[int, int]
    run_ahead: bool = False

    @property
    def phase(self) -> str:
        """What the counters call it."""
        return "decode"


@dataclass(frozen=True, slots=True)
class Score:
    """Score segments behind a prefix, with gradients at their first tokens; answered by a list of `SegmentScore`."""

    prefix: RewardPrefix
    segments: list[list[int]]
    gradient_tokens: int

    @property
    def phase(self) -> str:
        """What the counters call it."""
        return "reward and gradient" if self.gradient_tokens else "reward"


Work = Step | Score
Decoding = Generator[Work, list[Any], T]
"""A response, or a part of one, that yields its work and is sent the answers."""


def run_alone(decoding: Decoding[T], step: Callable[[Step], list[Any]], counters: Counters) -> T:
    """Decode one response by itself; `step` is what its lane does."""
    answers: list[Any] = []
    try:
        work = next(decoding)
        while True:
            with counters.phase(work.phase):
                if isinstance(work, Step):
                    answers = step(work)
                else:
                    (answers,) = score_segments([(work.prefix, work.segments)], work.gradient_tokens)
            work = decoding.send(answers)
    except StopIteration as finished:
        result: T = finished.value
        return result
