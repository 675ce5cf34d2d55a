"""GGRO's inner loop: decode a segment, score it, let the reward's gradient propose a token; commit the best."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ggro_hf.cache import Branch
from ggro_hf.policy import Policy
from ggro_hf.reading import Position
from ggro_hf.results import Candidate, Counters, Segment
from ggro_hf.rewards import RewardPrefix
from ggro_hf.transfer import to_device
from ggro_kernels import candidate_scores

# An entropy stop needs this many decoded tokens, the stopping one included.
_TOKENS_BEFORE_STOP = 4

# Tokens before the last that a stop rule may look at, enough for a stop string spelled letter by letter.
_STOP_CONTEXT = 16

# The released code scales the current token's score with this, so that candidates compete against zero.
_CURRENT_TOKEN_FACTOR = 1e-10


@dataclass(frozen=True, slots=True)
class EndRules:
    """What ends a segment and a response; our own rules and the released ones differ here.

    `stop` says whether the last of a few tokens ends the segment whatever the entropy, `finish_ids` which last tokens
    finish the response.
    """

    finish_ids: frozenset[int]
    stop: Callable[[list[int]], bool]


@dataclass(frozen=True, slots=True)
class SearchSettings:
    """GGRO's numbers, as documented there; `total` is the length of the whole sequence at which decoding ends."""

    entropy_threshold: float
    refinements: int
    check_every: int
    nudge_tokens: int
    perplexity_ratio: float | None
    total: int


@dataclass(eq=False, slots=True)
class _Pass:
    """One decoded candidate, with what it takes to go on from it and to bring it back."""

    token_ids: list[int]
    positions: list[Position]
    finished: bool
    forced: tuple[int, ...]
    # Where the segment ended before a token that the next one opens with.
    boundary: Position | None
    boundary_token: int | None
    reward: float = math.nan
    proposal_scores: tuple[float, ...] = ()
    next_forced: tuple[int, ...] = ()
    policy_branch: Branch | None = None
    reward_branch: Branch | None = None

    def perplexity(self) -> float:
        """Perplexity of the kept tokens under the policy."""
        steps = zip(self.token_ids, self.positions, strict=True)
        total = sum(position.log_probability(token) for token, position in steps)
        return math.exp(-total / max(1, len(self.token_ids)))


class SegmentSearch:
    """Refines one segment after another on a policy and a reward prefix that hold the same sequence.

    Least work for the published result (exact because both models are causal): what precedes the nudged token is
    neither decoded nor scored twice, a proposal that was tried is not decoded again, every candidate costs one reward
    pass over its own tokens and at most one backward, and the winner's keys and values are put back rather than
    computed.
    """

    def __init__(
        self,
        settings: SearchSettings,
        rules: EndRules,
        policy: Policy[Position],
        prefix: RewardPrefix,
        counters: Counters,
    ) -> None:
        self.counters = counters
        self._settings = settings
        self._rules = rules
        self._policy = policy
        self._prefix = prefix
        self._opening: Position | None = policy.position

    @property
    def complete(self) -> bool:
        """Whether the segment refined last ended the response, so that no other can follow it."""
        return self._opening is None

    @property
    def reward(self) -> float:
        """Reward of the sequence that both models hold."""
        return self._prefix.reward

    def reward_of(self, token_ids: list[int]) -> float:
        """Reward of another sequence, read at its last token that is not padding, as classifiers pool."""
        padding = self._prefix.reward_model.model.config.pad_token_id
        end = max((index for index, token in enumerate(token_ids) if token != padding), default=0) + 1
        with self.counters.phase("reward"):
            return self._prefix.move_to(token_ids[:end])

    def move_to(self, token_ids: list[int]) -> None:
        """Make `token_ids` the sequence of both models, recomputing what follows the longest common prefix."""
        if token_ids != self._policy.token_ids or self.complete:
            with self.counters.phase("prefill"):
                self._opening = self._policy.move_to(token_ids)
        with self.counters.phase("reward"):
            self._prefix.move_to(token_ids)

    def refine(self, offset: int) -> Segment:
        """Search the next segment, replacing tokens at `offset`, and commit the best candidate to both models.

        Raises FloatingPointError where every candidate's reward is NaN.
        """
        opening = self._opening
        assert opening is not None
        start = len(self._policy.token_ids)
        base = self._decode(start, opening, [], [], ())
        # The tokens before the nudged one are the same in all candidates, so they join the constant prefix.
        shared = offset if self._settings.refinements > 1 and len(base.token_ids) > offset else 0
        if shared:
            with self.counters.phase("reward"):
                self._prefix.extend(base.token_ids[:shared])

        passes = [base]
        self._score(base, offset, shared, last=self._settings.refinements == 1)
        best = base if self._may_win(base, base) else None
        current = base
        for refinement in range(1, self._settings.refinements):
            if not current.next_forced or _tried(current.next_forced, passes, offset):
                break
            if best is not None and best is current:
                best.policy_branch = self._policy.save(start + offset)
                best.reward_branch = self._prefix.save(best.token_ids[shared:])
            current = self._decode(
                start, base.positions[offset], base.token_ids[:offset], base.positions[:offset], current.next_forced
            )
            if any(current.token_ids == earlier.token_ids for earlier in passes):
                break
            passes.append(current)
            self._score(current, offset, shared, last=refinement + 1 == self._settings.refinements)
            if self._may_win(current, base) and (best is None or current.reward > best.reward):
                best = current

        if best is None:
            raise FloatingPointError(
                "the reward model answers NaN for every candidate of a segment; check its weights and its dtype"
            )
        self._commit(best, start, offset, shared)
        candidates = tuple(_as_candidate(candidate, offset) for candidate in passes)
        self._opening = best.boundary
        return Segment(start, offset, candidates, passes.index(best))

    def _decode(
        self, start: int, position: Position, token_ids: list[int], positions: list[Position], forced: tuple[int, ...]
    ) -> _Pass:
        """Decode one candidate from `position` on, which follows the segment's `token_ids` so far."""
        settings, rules, policy = self._settings, self._rules, self._policy
        token_ids, positions = list(token_ids), list(positions)
        offset = len(token_ids)
        with self.counters.phase("decode"):
            policy.rewind(start + offset)
            while True:
                token = _choose(position, forced, len(token_ids) - offset)
                token_ids.append(token)
                positions.append(position)
                complete = start + len(token_ids) >= settings.total
                if (
                    complete
                    or rules.stop([*policy.token_ids[-_STOP_CONTEXT:], token])
                    or self._uncertain(position, len(token_ids))
                ):
                    break
                # The token after the next will be wanted where the next is neither forced nor able to end the segment.
                decoded = len(token_ids) + 1
                free = decoded - offset > len(forced) and not self._checked(decoded)
                position = policy.extend([token], run_ahead=free and start + decoded < settings.total)
        finished = token in rules.finish_ids
        if finished or complete:
            return _Pass(token_ids, positions, finished, forced, None, None)
        return _Pass(token_ids[:-1], positions[:-1], False, forced, position, token)

    def _uncertain(self, position: Position, decoded: int) -> bool:
        return self._checked(decoded) and position.entropy >= self._settings.entropy_threshold

    def _checked(self, decoded: int) -> bool:
        """Whether the entropy of that many tokens' last may end the segment."""
        settings = self._settings
        return (
            decoded >= _TOKENS_BEFORE_STOP
            and decoded % settings.check_every == 0
            and settings.entropy_threshold < math.inf
        )

    def _score(self, candidate: _Pass, offset: int, shared: int, last: bool) -> None:
        """Fill in the reward, and the proposal unless no further candidate could follow."""
        tokens = candidate.token_ids[shared:]
        nudged = candidate.token_ids[offset : offset + self._settings.nudge_tokens]
        wanted = 0 if last else len(nudged)
        with self.counters.phase("reward" if not wanted else "reward and gradient"):
            scored = self._prefix.score(tokens, gradient_tokens=wanted)
        candidate.reward = scored.reward
        if scored.gradient is None:
            return
        with self.counters.phase("proposal"):
            run: list[int] = []
            positions = candidate.positions[offset : offset + len(nudged)]
            for scores, position in zip(
                self._proposal_scores(scored.gradient, nudged, positions), positions, strict=True
            ):
                winner = _first_maximum(scores)
                # Positions after the first take part only while the gradient likes a token better than staying.
                if winner is None or (run and scores[winner] <= 0):
                    break
                if not run:
                    candidate.proposal_scores = tuple(scores)
                run.append(position.tokens[winner])
            candidate.next_forced = tuple(run)

    def _proposal_scores(
        self, gradient: torch.Tensor, tokens: list[int], positions: list[Position]
    ) -> list[list[float]]:
        """The gradient's score of every proposal at each position, whose current token is that of `tokens`."""
        reward = self._prefix.reward_model
        proposals = [position.tokens for position in positions]
        scores = candidate_scores(gradient, reward.embedding_table, to_device(proposals, gradient.device))
        return [
            [
                score * _CURRENT_TOKEN_FACTOR if proposal == token else score
                for score, proposal in zip(row, candidates, strict=True)
            ]
            for row, candidates, token in zip(
                (scores * reward.embedding_scale).tolist(), proposals, tokens, strict=True
            )
        ]

    def _may_win(self, candidate: _Pass, base: _Pass) -> bool:
        if math.isnan(candidate.reward):
            return False
        ratio = self._settings.perplexity_ratio
        return ratio is None or candidate is base or candidate.perplexity() <= ratio * base.perplexity()

    def _commit(self, best: _Pass, start: int, offset: int, shared: int) -> None:
        """Leave both models with the best candidate as their sequence."""
        if best.policy_branch is not None:
            self._policy.rewind(start + offset)
            self._policy.restore(best.policy_branch)
        segment = best.token_ids[shared:]
        if best.reward_branch is not None:
            self._prefix.restore(best.reward_branch)
        if segment:
            self._prefix.commit(segment, best.reward)


def _choose(position: Position, forced: tuple[int, ...], step: int) -> int:
    """The forced token while there is one that the policy finds likely here, else its own."""
    if step < len(forced) and (step == 0 or forced[step] in position.tokens):
        return forced[step]
    return position.tokens[0]


def _tried(forced: tuple[int, ...], passes: list[_Pass], offset: int) -> bool:
    """Whether these forced tokens must repeat an earlier candidate: prefix and forced tokens determine a segment."""
    return any(
        tuple(earlier.token_ids[offset : offset + len(forced)]) == forced and len(earlier.forced) <= len(forced)
        for earlier in passes
    )


def _first_maximum(scores: list[float]) -> int | None:
    """Index of the largest score, the first of equals; None where the gradient is NaN."""
    if any(math.isnan(score) for score in scores):
        return None
    return max(range(len(scores)), key=scores.__getitem__)


def _as_candidate(candidate: _Pass, offset: int) -> Candidate:
    scored = bool(candidate.proposal_scores)
    return Candidate(
        token_ids=tuple(candidate.token_ids),
        entropies=tuple(position.entropy for position in candidate.positions),
        reward=candidate.reward,
        finished=candidate.finished,
        forced_tokens=candidate.forced,
        boundary_token=candidate.boundary_token,
        boundary_entropy=None if candidate.boundary is None else candidate.boundary.entropy,
        proposals=tuple(candidate.positions[offset].tokens) if scored else (),
        proposal_scores=candidate.proposal_scores,
    )
