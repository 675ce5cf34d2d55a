"""GGRO's inner loop: decode a segment, score it, let the reward's gradient propose a token; commit the best."""

from collections.abc import Iterable
from dataclasses import dataclass

from ggro_hf.decoding.candidates import EndRules, Pass, SegmentSettings, decode
from ggro_hf.decoding.segment_decoding import SegmentDecoding, is_among, ranked_proposals
from ggro_hf.decoding.speculation import Plan, Speculation
from ggro_hf.decoding.work import Decoding
from ggro_hf.policy_lane import PolicyLane
from ggro_hf.reading import Position
from ggro_hf.results import Counters, Segment
from ggro_hf.rewards import RewardPrefix


@dataclass(frozen=True, slots=True)
class SearchSettings(SegmentSettings):
    """GGRO's numbers, as documented there; `total` is the length of the whole sequence at which decoding ends."""

    refinements: int
    nudge_tokens: int
    perplexity_ratio: float | None


class SegmentSearch(SegmentDecoding):
    """Refines one segment after another on a policy and a reward prefix that hold the same sequence.

    A proposal that was tried is not decoded again. Candidates that are likely to be asked for may be decoded and scored
    beside one that is; the chain then looks them up.
    """

    _settings: SearchSettings

    def __init__(
        self,
        settings: SearchSettings,
        rules: EndRules,
        policy: PolicyLane,
        opening: Position,
        prefix: RewardPrefix,
        counters: Counters,
        speculation: Speculation,
    ) -> None:
        """`opening` is the policy's position after the sequence."""
        super().__init__(settings, rules, policy, opening, prefix, counters, settings.nudge_tokens)
        self._speculation = speculation
        # Of the last batch: its plan, and the ranking that it was made by.
        self._plan = Plan(1, scores_ahead=False)
        self._ranking: list[int] = []

    def refine(self, offset: int) -> Decoding[Segment]:
        refinements = self._settings.refinements
        base, shared = yield from self._decode_base(offset, alone=refinements == 1)
        yield from self._score([base], offset, shared, last=refinements == 1)

        passes, best, current = [base], self._better(None, base), base
        # Those not asked for so far: complete or not, scored or not.
        known: dict[tuple[int, ...], Pass] = {}
        for refinement in range(1, refinements):
            if not current.next_forced or _tried(current.next_forced, passes, offset):
                break
            last = refinement + 1 == refinements
            self._observe(current, first=refinement == 1)
            asked = known.pop(current.next_forced, None)
            if asked is None:
                self.counters.speculation_misses += 1
                asked = self._candidate(base, current.next_forced, offset)
            else:
                self.counters.speculation_hits += 1
            batch = [asked]
            if not asked.complete:
                batch += self._beside(base, current, passes, known, offset)
                self._keep_rows([*(one for one in known.values() if one.complete), best])
                yield from decode(batch, self._policy, self._settings, self._rules, offset, asked=1)
                # One that failed is decoded again if it is asked for, and then it fails.
                known.update((one.forced, one) for one in batch[1:])
                known = {forced: one for forced, one in known.items() if not one.failed}
            current = batch[0]
            if is_among(current, passes):
                break
            others = [one for one in batch[1:] if one.complete] if self._plan.scores_ahead else []
            unscored = [one for one in (current, *others) if not one.scored and not is_among(one, passes)]
            if unscored:
                self._keep_places([*known.values(), best])
                yield from self._score(unscored, offset, shared, last)
            if last:
                current.proposal_scores = ()
            passes.append(current)
            best = self._better_likely(best, current, base)

        self._count_waste(known.values(), offset)
        return self._choose(best, passes, offset, shared)

    def _beside(
        self, base: Pass, current: Pass, tried: list[Pass], known: dict[tuple[int, ...], Pass], offset: int
    ) -> list[Pass]:
        """What to decode beside the candidate that `current` asks for: what the chain may come to ask for."""
        begun = [candidate for candidate in known.values() if not candidate.complete]
        # A run of forced tokens is not ranked, and the last refinement asks for nothing more.
        if self._settings.nudge_tokens > 1 or len(tried) + 1 >= self._settings.refinements:
            others = []
        else:
            self._plan = self._speculation.plan(len(base.token_ids) - offset)
            ranked = ranked_proposals(current, base.positions[offset].tokens)
            taken = {candidate.token_ids[offset] for candidate in (*tried, *known.values())}
            self._ranking = [token for token in ranked if token not in taken]
            new = [
                self._candidate(base, (token,), offset) for token in self._ranking if (token,) != current.next_forced
            ]
            others = [*begun, *new][: self._plan.rows - 1]
        # Their rows are for others now.
        forgotten = [candidate for candidate in begun if candidate not in others]
        for candidate in forgotten:
            del known[candidate.forced]
        self._count_waste(forgotten, offset)
        return others

    def _observe(self, current: Pass, *, first: bool) -> None:
        """Learn from what the chain asks for; the first link is the best of its ranking by definition."""
        if first:
            self._speculation.statistics.add_chain()
        elif current.next_forced[0] in self._ranking:
            self._speculation.statistics.add_link(self._ranking.index(current.next_forced[0]))

    def _count_waste(self, candidates: Iterable[Pass], offset: int) -> None:
        for candidate in candidates:
            tokens = len(candidate.token_ids) - offset
            # The policy has not read the last token of a response.
            self.counters.wasted_policy_tokens += tokens if candidate.boundary is not None else tokens - 1
            self.counters.wasted_reward_tokens += tokens if candidate.scored else 0

    def _better_likely(self, best: Pass | None, candidate: Pass, base: Pass) -> Pass | None:
        """`_better` for a candidate that the policy finds likely enough to win, else the best so far."""
        ratio = self._settings.perplexity_ratio
        likely = ratio is None or candidate is base or candidate.perplexity() <= ratio * base.perplexity()
        return self._better(best, candidate) if likely else best


def _tried(forced: tuple[int, ...], passes: list[Pass], offset: int) -> bool:
    """Whether these forced tokens must repeat an earlier candidate: prefix and forced tokens determine a segment."""
    return any(
        tuple(earlier.token_ids[offset : offset + len(forced)]) == forced and len(earlier.forced) <= len(forced)
        for earlier in passes
    )
