"""Exhaustive search at every segment's first token: all of the policy's likeliest tokens there are tried."""

from transformers.generation.streamers import BaseStreamer
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from ggro_hf.decoding.base import Request
from ggro_hf.decoding.candidates import EndRules, Pass, SegmentSettings, decode
from ggro_hf.decoding.guided import check_positive
from ggro_hf.decoding.segment_decoding import SegmentDecoding, ranked_proposals
from ggro_hf.decoding.segments import SegmentDecoder
from ggro_hf.decoding.work import Decoding
from ggro_hf.policy_lane import PolicyLane
from ggro_hf.reading import Position
from ggro_hf.results import Counters, Segment
from ggro_hf.rewards import RewardModel, RewardPrefix

# Rows of a forward pass: beyond these a pass takes longer the more it has.
_MOST_ROWS = 32

# Tokens that the reward model scores together: each sees the others as keys that a mask hides.
_SCORED_TOGETHER = 256


class ExhaustiveSearch(SegmentDecoder):
    """Greedy decoding in segments that end before a high-entropy token, each begun with the best of many tokens.

    At every boundary the segment is decoded and scored with each of the policy's `candidates` likeliest tokens in its
    first place (at `insertion_offset` in the first segment), side by side, and the one with the largest reward becomes
    part of the response, of equals the one whose token is likelier. The candidates are those of GGRO, which tries a few
    of them that the reward's gradient proposes: unpruned, a segment from the same prefix is never rewarded less here,
    but the whole response may be. A method of this library, not a published one.

    Args:
        reward: reward model that reads the policy's token ids.
        tokenizer: the policy's; checks that the vocabularies agree.
        entropy_threshold: nats at which a token ends the segment before it.
        candidates: number of likeliest tokens that compete for a position.
        check_every: only every n-th token of a segment may end it.
        prune: how many tokens are tried besides the policy's own: those that the reward's gradient at its segment, one
            backward pass, likes best. `None` tries all. On the embedded models 8 of 24 get 85 % of the gain of all, and
            2 to 8 end with responses at least as good at a fraction of the work (`benchmarks/pareto.py`).
        insertion_offset: offset of the first segment's replaced token.

    Raises ValueError for settings out of range; see `Decoder` for the ways to call it.
    """

    def __init__(
        self,
        reward: RewardModel,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        entropy_threshold: float = 1.5,
        candidates: int = 25,
        check_every: int = 1,
        prune: int | None = None,
        insertion_offset: int = 0,
        streamer: BaseStreamer | None = None,
    ) -> None:
        super().__init__(
            reward,
            tokenizer=tokenizer,
            entropy_threshold=entropy_threshold,
            candidates=candidates,
            check_every=check_every,
            insertion_offset=insertion_offset,
            streamer=streamer,
        )
        if prune is not None:
            check_positive(prune=prune)
        if insertion_offset < 0:
            raise ValueError(f"insertion_offset is {insertion_offset}, but must be at least 0")
        self.prune = prune

    def _rows(self, *, alone: bool) -> int:
        return min(self.candidates, self.prune or self.candidates, _MOST_ROWS)

    def _open_search(
        self, request: Request, lane: PolicyLane, opening: Position, counters: Counters, rules: EndRules
    ) -> "_Search":
        settings = SegmentSettings(self.entropy_threshold, self.check_every, request.total)
        prefix = self._open_prefix(request, counters)
        prune = self.prune if self.prune is not None and self.prune < self.candidates - 1 else None
        return _Search(settings, rules, lane, opening, prefix, counters, prune)


class _Search(SegmentDecoding):
    """Tries every token, or those that the gradient at the policy's own candidate likes best."""

    def __init__(
        self,
        settings: SegmentSettings,
        rules: EndRules,
        policy: PolicyLane,
        opening: Position,
        prefix: RewardPrefix,
        counters: Counters,
        prune: int | None,
    ) -> None:
        super().__init__(settings, rules, policy, opening, prefix, counters)
        self._prune = prune

    def refine(self, offset: int) -> Decoding[Segment]:
        assert self._opening is not None
        opening = self._opening
        if offset == 0 and self._prune is None:
            base, shared, best = Pass((), opening), 0, None
            passes = [base, *(Pass((token,), opening) for token in opening.tokens[1:])]
            yield from self._decode_in_turn(passes, passes, offset)
            unscored = passes
        else:
            base, shared = yield from self._decode_base(offset, alone=False)
            yield from self._score([base], offset, shared, last=self._prune is None)
            best = self._better(None, base)
            unscored = [self._candidate(base, (token,), offset) for token in self._promising(base, offset)]
            passes = [base, *unscored]
            yield from self._decode_in_turn(unscored, passes, offset)
        best = yield from self._score_in_turn(unscored, best, offset, shared)
        return self._choose(best, passes, offset, shared)

    def _promising(self, base: Pass, offset: int) -> list[int]:
        """The tokens to try in place of the policy's own, the likelier first."""
        if len(base.token_ids) <= offset:
            return []
        own, *others = base.positions[offset].tokens
        if self._prune is None:
            return others
        # Without a gradient (it is NaN) the likeliest are as good as any.
        ranked = ranked_proposals(base, [own, *others]) or others
        chosen = [token for token in ranked if token != own][: self._prune]
        return [token for token in others if token in chosen]

    def _decode_in_turn(self, undecoded: list[Pass], passes: list[Pass], offset: int) -> Decoding[None]:
        """Decode candidates, as many side by side as the policy has rows."""
        for first in range(0, len(undecoded), self._policy.rows):
            self._keep_rows(passes)
            batch = undecoded[first : first + self._policy.rows]
            yield from decode(batch, self._policy, self._settings, self._rules, offset)

    def _score_in_turn(
        self, unscored: list[Pass], best: Pass | None, offset: int, shared: int
    ) -> Decoding[Pass | None]:
        """Score candidates, a few side by side whatever rows the policy has; return the best so far."""
        for group in _groups(unscored, shared):
            self._keep_places([best])
            yield from self._score(group, offset, shared, last=True)
            for candidate in group:
                best = self._better(best, candidate)
        return best


def _groups(passes: list[Pass], shared: int) -> list[list[Pass]]:
    """The candidates in order, divided so that a group has few tokens after the shared ones, or one candidate."""
    groups: list[list[Pass]] = []
    room = 0
    for candidate in passes:
        tokens = len(candidate.token_ids) - shared
        if tokens > room:
            groups.append([])
            room = max(tokens, _SCORED_TOGETHER)
        groups[-1].append(candidate)
        room -= tokens
    return groups
