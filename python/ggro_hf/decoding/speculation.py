"""How many candidates of a segment are decoded side by side, in the hope that the chain asks for them.

A batch of m candidates costs less than m, since the weights are read once; but only those that are asked for save
anything. What a batch costs is measured, how likely the chain asks for a candidate is learned from the chains so far.
"""

import itertools
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

import torch
from transformers import PreTrainedModel

from ggro_hf.policy_lane import PolicyLane
from ggro_hf.policy_lanes import Lane
from ggro_hf.results import Counters
from ggro_hf.rewards import RewardPrefix, score_segments

MOST_ROWS = 8
"""Candidates that are decoded side by side, where their number is chosen by cost."""

# Numbers of rows and of reward tokens whose cost is measured; between them it is taken to be linear.
_MEASURED_ROWS, _MEASURED_TOKENS = (1, 2, 4, 8), (4, 8, 16, 32)
_MEASURED_PREFIX = 128
# Runs before the cost is taken, in which the pass is captured, and those of which the shortest counts.
_UNTIMED, _TIMED = 1, 3

# Links of a chain after the first, and how many of them asked for a candidate of that rank in the ranking of the
# gradient, best first: of the embedded models and of random ones alike. They weigh as much as this many links.
_LINKS, _BY_RANK, _WEIGHT = 1.6, (0.0, 0.25, 0.15, 0.10, 0.07, 0.06, 0.04, 0.04), 20

# What is left to decode of a candidate that was begun beside others when the chain asks for it.
_LEFT = 0.2

# A batch must promise to save this much.
_WORTHWHILE = 0.97


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds of a policy step by rows, and of a reward pass with gradients by tokens."""

    steps: tuple[tuple[int, float], ...]
    scores: tuple[tuple[int, float], ...]

    def step(self, rows: float) -> float:
        """Of so many rows."""
        return _interpolated(self.steps, rows)

    def score(self, tokens: float) -> float:
        """Of so many tokens."""
        return _interpolated(self.scores, tokens)


@dataclass(frozen=True, slots=True)
class Plan:
    """Candidates to decode side by side, and whether all of them are scored at once or each when asked for."""

    rows: int
    scores_ahead: bool


class ChainStatistics:
    """How long chains are, and which candidates they ask for, with one reward model."""

    def __init__(self) -> None:
        self._chains, self._links = _WEIGHT / _LINKS, float(_WEIGHT)
        self._by_rank = [_WEIGHT * share for share in _BY_RANK]

    @property
    def links(self) -> float:
        """Links of a chain after its first."""
        return self._links / self._chains

    def asked(self, rows: int) -> float:
        """Share of these links that ask for one of the first ranks."""
        return min(1.0, sum(self._by_rank[:rows]) / self._links)

    def add_chain(self) -> None:
        """A chain begins."""
        self._chains += 1

    def add_link(self, rank: int) -> None:
        """A later link of a chain asked for a candidate of that rank, counted from 0."""
        self._links += 1
        if rank < len(self._by_rank):
            self._by_rank[rank] += 1


class Speculation:
    """Chooses how many candidates to decode at once; `rows` is a fixed number, None leaves it to the costs."""

    def __init__(self, lane: PolicyLane, prefix: RewardPrefix, rows: int | None) -> None:
        self.statistics = _statistics_of(prefix)
        self._most = lane.rows
        self._rows = rows
        self._costs = _costs_of(lane, prefix) if rows is None and isinstance(lane, Lane) and lane.rows > 1 else None

    def plan(self, tokens: int) -> Plan:
        """For candidates of about that many tokens."""
        if self._rows is not None:
            return Plan(min(self._rows, self._most), scores_ahead=True)
        if self._costs is None:
            return Plan(1, scores_ahead=False)
        alone = Plan(1, scores_ahead=False)
        options = [Plan(rows, ahead) for rows in range(2, self._most + 1) for ahead in (False, True)]
        best = min(options, key=lambda plan: self._seconds(plan, tokens))
        return best if self._seconds(best, tokens) < _WORTHWHILE * self._seconds(alone, tokens) else alone

    def _seconds(self, plan: Plan, tokens: int) -> float:
        """Expected time of a chain, all links of which cost the same but those that are looked up."""
        assert self._costs is not None
        costs, links = self._costs, self.statistics.links
        looked_up = links * self.statistics.asked(plan.rows)
        batches = 1 + links - looked_up
        decoding = (batches + _LEFT * looked_up) * tokens * costs.step(plan.rows)
        if plan.scores_ahead:
            return decoding + batches * costs.score(plan.rows * tokens)
        return decoding + (1 + links) * costs.score(tokens)


def _interpolated(points: tuple[tuple[int, float], ...], x: float) -> float:
    pairs = list(itertools.pairwise(points))
    (left, low), (right, high) = next((pair for pair in pairs if x <= pair[1][0]), pairs[-1])
    return max(points[0][1], low + (high - low) * (x - left) / (right - left))


_statistics: weakref.WeakKeyDictionary[PreTrainedModel, ChainStatistics] = weakref.WeakKeyDictionary()
_ByPolicy = weakref.WeakKeyDictionary[PreTrainedModel, dict[int, Costs]]
_costs: weakref.WeakKeyDictionary[PreTrainedModel, _ByPolicy] = weakref.WeakKeyDictionary()


def _statistics_of(prefix: RewardPrefix) -> ChainStatistics:
    return _statistics.setdefault(prefix.reward_model.model, ChainStatistics())


def _costs_of(lane: Lane, prefix: RewardPrefix) -> Costs:
    """Measured once for a pair of models and a number of threads."""
    by_policy = _costs.setdefault(prefix.reward_model.model, weakref.WeakKeyDictionary())
    known = by_policy.setdefault(lane.model, {})
    threads = torch.get_num_threads()
    if threads not in known:
        known[threads] = _measured(lane, prefix)
    return known[threads]


def _measured(lane: Lane, prefix: RewardPrefix) -> Costs:
    counters, lane.counters = lane.counters, Counters()

    def step(rows: int) -> None:
        for row in range(rows):
            lane.clear(row)
        lane.step(dict.fromkeys(range(rows), lane.token_ids[-1]))

    def score(tokens: int) -> None:
        segment = [lane.token_ids[-1]] * min(4, tokens)
        score_segments([(scored, [segment] * (tokens // len(segment)))], gradient_tokens=1)

    scored = RewardPrefix(prefix.reward_model, Counters())
    scored.extend(prefix.token_ids[-_MEASURED_PREFIX:])
    steps = tuple((rows, _seconds(step, rows)) for rows in _MEASURED_ROWS if rows <= lane.rows)
    scores = tuple((tokens, _seconds(score, tokens)) for tokens in _MEASURED_TOKENS)
    lane.counters = counters
    for row in range(lane.rows):
        lane.clear(row)
    return Costs(steps, scores)


def _seconds(function: Callable[[int], None], size: int) -> float:
    """The shortest of a few runs."""
    for _ in range(_UNTIMED):
        function(size)
    times = []
    for _ in range(_TIMED):
        start = perf_counter()
        function(size)
        times.append(perf_counter() - start)
    return min(times)
