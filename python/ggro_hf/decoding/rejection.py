"""Draw continuations until the reward of one is accepted."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from ggro_hf.decoding.base import Request
from ggro_hf.decoding.drafts import Draft, DraftRules, draw_drafts
from ggro_hf.decoding.drawing import ACCEPTING, Distribution, Warped, uniforms
from ggro_hf.decoding.guided import check_positive, check_some_reward, check_temperature
from ggro_hf.policy import Policy
from ggro_hf.results import Candidate, Counters, Segment
from ggro_hf.rewards import Scoring


@dataclass(frozen=True, slots=True)
class Acceptance:
    """When a candidate is good enough: with probability `min(1, exp((reward - threshold) / temperature))`, or where
    the reward reaches the threshold if `hard`; after `attempts` rejections the best is, one more draw included.

    Raises ValueError for settings out of range.
    """

    temperature: float
    attempts: int
    hard: bool
    parallel: int
    seed: int

    def __post_init__(self) -> None:
        check_positive(parallel=self.parallel)
        if self.attempts < 0:
            raise ValueError(f"attempts is {self.attempts}, but must be at least 0")
        check_temperature(self.temperature)

    def accepts(self, reward: float, threshold: float, number: float) -> bool:
        """`number` is drawn from [0, 1)."""
        if self.hard or reward >= threshold:
            return reward >= threshold
        return number < math.exp((reward - threshold) / self.temperature)


@dataclass(slots=True)
class RejectionSearch:
    """Searches one segment after another on a policy and a scoring that hold the same sequence."""

    request: Request
    acceptance: Acceptance
    reader: Warped
    policy: Policy[Distribution]
    scoring: Scoring
    counters: Counters

    def next(
        self, number: int, start: int, rules: DraftRules, threshold: Callable[[int], float]
    ) -> tuple[Draft, Segment]:
        """The accepted draft of segment `number`, which follows `start` tokens of the response.

        `threshold` maps the tokens of the response, the candidate's included, to the reward wanted. The policy stays
        where it is; the scoring goes on from the draft, unless the response ends with it. Raises FloatingPointError
        where the rewards of all candidates are NaN.
        """
        candidates: list[Candidate] = []
        best: Draft | None = None
        best_number = 0
        # Computed in another pass, the same tokens may be rewarded a rounding apart.
        known: dict[tuple[int, ...], float] = {}
        attempts = self.acceptance.attempts
        # A candidate behind the accepted one is work for nothing: more are drawn together the more were rejected.
        while len(candidates) <= attempts:
            first = len(candidates)
            together = min(first + 1, self.acceptance.parallel, attempts + 1 - first)
            drafts, rewards = self._draw(number, range(first, first + together), start, rules)
            for place, (draft, computed) in enumerate(zip(drafts, rewards, strict=True)):
                reward = known.setdefault(tuple(draft.token_ids), computed)
                wanted = threshold(start + len(draft.token_ids))
                candidates.append(self._candidate(draft, reward, wanted))
                if reward == reward and (best is None or reward > candidates[best_number].reward):
                    best, best_number = draft, first + place
                if first + place < attempts and self._accepts(number, first + place, reward, wanted):
                    with self.counters.phase("reward"):
                        self.scoring.keep([(0, place)])
                    return draft, self._segment(start, candidates, first + place)
        check_some_reward([candidate.reward for candidate in candidates])
        assert best is not None
        if best.token_ids[-1] not in self.request.eos_ids and start + len(best.token_ids) < self.request.max_new_tokens:
            with self.counters.phase("reward"):
                self.scoring.score([[best.token_ids]])
                self.scoring.keep([(0, 0)])
        return best, self._segment(start, candidates, best_number)

    def _draw(self, number: int, attempts: range, start: int, rules: DraftRules) -> tuple[list[Draft], list[float]]:
        seed, row = self.acceptance.seed, self.request.row
        numbers = [uniforms(seed, row, number, attempt) for attempt in attempts]
        # Whole responses are not continued.
        keep = rules.entropy_threshold < math.inf or start + rules.max_tokens < self.request.max_new_tokens
        with self.counters.phase("decode"):
            drafts = draw_drafts(self.policy, self.reader, numbers, rules, keep=keep)
        with self.counters.phase("reward"):
            (rewards,) = self.scoring.score([[draft.token_ids for draft in drafts]])
        return drafts, rewards

    def _accepts(self, number: int, attempt: int, reward: float, wanted: float) -> bool:
        generator = uniforms(self.acceptance.seed, self.request.row, number, attempt, purpose=ACCEPTING)
        return self.acceptance.accepts(reward, wanted, generator.random())

    def _candidate(self, draft: Draft, reward: float, wanted: float) -> Candidate:
        return Candidate(
            tuple(draft.token_ids),
            tuple(draft.entropies),
            reward,
            draft.token_ids[-1] in self.request.eos_ids,
            boundary_entropy=draft.boundary_entropy,
            threshold=wanted,
        )

    def _segment(self, start: int, candidates: list[Candidate], chosen: int) -> Segment:
        return Segment(len(self.request.prompt_ids) + start, 0, tuple(candidates), chosen)


def check_reward_threshold(value: float) -> None:
    """Raise ValueError for a threshold that is no number or that nothing could reach."""
    if math.isnan(value) or value == math.inf:
        raise ValueError(f"reward_threshold is {value}, but must be a number below infinity, in the reward's units")
