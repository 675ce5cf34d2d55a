"""A reward that a test writes down: any function of the response's token ids."""

from collections.abc import Callable, Sequence

from ggro_hf.results import Counters
from ggro_hf.rewards import Capabilities, Conversation, Reward, Scoring


class RuleReward(Reward):
    """`rule` maps the tokens of a response, finished or not, to its reward."""

    def __init__(self, rule: Callable[[tuple[int, ...]], float]) -> None:
        self.rule = rule

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(reads_ids=True, cached_prefix=False, tree=False, gradient=False, max_tokens=None)

    def open(self, conversation: Conversation, counters: Counters, max_new_tokens: int) -> Scoring:
        return _RuleScoring(self.rule)


class _RuleScoring(Scoring):
    def __init__(self, rule: Callable[[tuple[int, ...]], float]) -> None:
        self._rule = rule
        self._sequences: list[tuple[int, ...]] = [()]
        self._continued: list[list[tuple[int, ...]]] = []

    def score(self, continuations: Sequence[Sequence[list[int]]]) -> list[list[float]]:
        self._continued = [
            [sequence + tuple(continuation) for continuation in own]
            for sequence, own in zip(self._sequences, continuations, strict=True)
        ]
        return [[self._rule(response) for response in own] for own in self._continued]

    def keep(self, chosen: Sequence[tuple[int, int]]) -> None:
        self._sequences = [self._continued[sequence][number] for sequence, number in chosen]
