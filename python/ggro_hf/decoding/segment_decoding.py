"""What searches of a segment share: candidates decoded and scored side by side, and the best one committed."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable

import torch

from ggro_hf.decoding.candidates import EndRules, Pass, SegmentSettings, decode
from ggro_hf.decoding.work import Decoding, Score
from ggro_hf.policy_lane import PolicyLane
from ggro_hf.reading import Position
from ggro_hf.results import Counters, Segment
from ggro_hf.rewards import RewardPrefix
from ggro_hf.transfer import to_device
from ggro_kernels import candidate_scores

# The released code scales the current token's score with this, so that candidates compete against zero.
_CURRENT_TOKEN_FACTOR = 1e-10


class SegmentDecoding(ABC):
    """Decodes one segment after another on a policy and a reward prefix that hold the same sequence.

    Least work for a segment's candidates (exact because both models are causal): what precedes the nudged token is
    neither decoded nor scored twice, every candidate costs one reward pass over its own tokens and at most one
    backward, and the winner's keys and values are put back rather than computed.

    What it needs of the models it yields as work.
    """

    def __init__(
        self,
        settings: SegmentSettings,
        rules: EndRules,
        policy: PolicyLane,
        opening: Position,
        prefix: RewardPrefix,
        counters: Counters,
        nudge_tokens: int = 1,
    ) -> None:
        """`opening` is the policy's position after the sequence; gradients are of the first `nudge_tokens` nudged."""
        self.counters = counters
        self._settings = settings
        self._rules = rules
        self._policy = policy
        self._prefix = prefix
        self._nudge_tokens = nudge_tokens
        self._opening: Position | None = opening

    @property
    def complete(self) -> bool:
        """Whether the last segment ended the response, so that no other can follow it."""
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

    @abstractmethod
    def refine(self, offset: int) -> Decoding[Segment]:
        """Search the next segment, replacing tokens at `offset`, and commit the best candidate to both models.

        Raises FloatingPointError where every candidate's reward is NaN.
        """

    def _decode_base(self, offset: int, *, alone: bool) -> Decoding[tuple[Pass, int]]:
        """The candidate that the policy decodes by itself, not scored yet, and how many of its tokens all share.

        Those are now part of the sequence of both models; none where it is `alone`.
        """
        assert self._opening is not None
        base = Pass((), self._opening)
        yield from decode([base], self._policy, self._settings, self._rules, 0)
        # The tokens before the nudged one are the same in all candidates, so they join the constant prefixes.
        shared = offset if not alone and len(base.token_ids) > offset else 0
        if shared:
            self._policy.commit(0, shared)
            with self.counters.phase("reward"):
                self._prefix.extend(base.token_ids[:shared])
        return base, shared

    @staticmethod
    def _candidate(base: Pass, forced: tuple[int, ...], offset: int) -> Pass:
        return Pass(forced, base.positions[offset], base.token_ids[:offset], base.positions[:offset])

    def _score(self, candidates: list[Pass], offset: int, shared: int, last: bool) -> Decoding[None]:
        """Fill in the rewards, and the proposals unless no further candidate could follow."""
        if not candidates:
            return
        end = offset + self._nudge_tokens
        wanted = 0 if last else max(len(candidate.token_ids[offset:end]) for candidate in candidates)
        scores = yield Score(self._prefix, [candidate.token_ids[shared:] for candidate in candidates], wanted)
        for candidate, scored in zip(candidates, scores, strict=True):
            candidate.scored, candidate.reward, candidate.place = True, scored.reward, scored.place
            nudged = candidate.token_ids[offset:end]
            # Others that are scored in the same pass may want gradients.
            if not wanted or scored.gradient is None or not nudged:
                continue
            with self.counters.phase("proposal"):
                self._propose(candidate, scored.gradient[: len(nudged)], nudged, candidate.positions[offset:end])

    def _propose(self, candidate: Pass, gradient: torch.Tensor, nudged: list[int], positions: list[Position]) -> None:
        run: list[int] = []
        for scores, position in zip(self._proposal_scores(gradient, nudged, positions), positions, strict=True):
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

    @staticmethod
    def _better(best: Pass | None, candidate: Pass) -> Pass | None:
        """The candidate where its reward is larger than that of the best so far, else that; NaN never is."""
        wins = not math.isnan(candidate.reward) and (best is None or candidate.reward > best.reward)
        return candidate if wins else best

    def _choose(self, best: Pass | None, passes: list[Pass], offset: int, shared: int) -> Segment:
        """Commit the best of the candidates to both models.

        Raises FloatingPointError where there is none because every candidate's reward is NaN.
        """
        if best is None:
            raise FloatingPointError(
                "the reward model answers NaN for every candidate of a segment; check its weights and its dtype"
            )
        start = len(self._policy.token_ids) - shared
        self._commit(best, shared)
        self._opening = best.boundary
        candidates = tuple(candidate.as_candidate(offset) for candidate in passes)
        return Segment(start, offset, candidates, passes.index(best))

    def _keep_rows(self, candidates: Iterable[Pass | None]) -> None:
        """Copy what the policy's rows have of candidates, before others take the rows."""
        for candidate in candidates:
            if candidate is not None and candidate.row is not None:
                candidate.policy_branch, candidate.row = self._policy.save(candidate.row), None

    def _keep_places(self, candidates: Iterable[Pass | None]) -> None:
        """Copy what the reward's cache has of candidates, before others take the places."""
        for candidate in candidates:
            if candidate is not None and candidate.place is not None:
                candidate.reward_layers, candidate.place = self._prefix.read(candidate.place), None

    def _commit(self, best: Pass, shared: int) -> None:
        """Leave both models with the best candidate as their sequence."""
        segment = best.token_ids[shared:]
        if best.policy_branch is not None:
            self._policy.append(best.policy_branch)
        elif best.row is not None:
            # The policy has not read the last token of a response.
            self._policy.commit(best.row, len(segment) if best.boundary is not None else len(segment) - 1)
        found = best.place or best.reward_layers
        if found is not None:
            self._prefix.commit(segment, best.reward, found)


def is_among(candidate: Pass, passes: list[Pass]) -> bool:
    """Whether an earlier candidate decoded to the same tokens."""
    return any(candidate.token_ids == earlier.token_ids for earlier in passes)


def ranked_proposals(candidate: Pass, tokens: list[int]) -> list[int]:
    """The proposals that the gradient at a candidate likes, best first."""
    order = sorted(range(len(candidate.proposal_scores)), key=lambda index: -candidate.proposal_scores[index])
    return [tokens[index] for index in order]


def _first_maximum(scores: list[float]) -> int | None:
    """Index of the largest score, the first of equals; None where the gradient is NaN."""
    if any(math.isnan(score) for score in scores):
        return None
    return max(range(len(scores)), key=scores.__getitem__)
