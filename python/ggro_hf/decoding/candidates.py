"""Candidates of a segment: what ends one, and how several are decoded side by side."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from ggro_hf.cache import Branch, KeysAndValues
from ggro_hf.decoding.work import Decoding, Step
from ggro_hf.policy_lane import PolicyLane
from ggro_hf.reading import Position
from ggro_hf.results import Candidate

# An entropy stop needs this many decoded tokens, the stopping one included.
_TOKENS_BEFORE_STOP = 4

# Tokens before the last that a stop rule may look at, enough for a stop string spelled letter by letter.
_STOP_CONTEXT = 16


@dataclass(frozen=True, slots=True)
class EndRules:
    """What ends a segment and a response; our own rules and the released ones differ here.

    `stop` says whether the last of a few tokens ends the segment whatever the entropy, `finish_ids` which last tokens
    finish the response.
    """

    finish_ids: frozenset[int]
    stop: Callable[[list[int]], bool]


@dataclass(frozen=True, slots=True)
class SegmentSettings:
    """Where segments end: before a token of that entropy (nats), looked at every n-th token; or at `total` tokens."""

    entropy_threshold: float
    check_every: int
    total: int

    def checked(self, decoded: int) -> bool:
        """Whether the entropy of that many tokens' last may end the segment."""
        return decoded >= _TOKENS_BEFORE_STOP and decoded % self.check_every == 0 and self.entropy_threshold < math.inf


@dataclass(eq=False, slots=True)
class Pass:
    """One decoded candidate, with what it takes to go on from it and to bring it back."""

    forced: tuple[int, ...]
    # What the next token is chosen from, while it is decoded.
    position: Position
    token_ids: list[int] = field(default_factory=list)
    positions: list[Position] = field(default_factory=list)
    complete: bool = False
    finished: bool = False
    # Where the segment ended before a token that the next one opens with.
    boundary: Position | None = None
    boundary_token: int | None = None
    # Where the models have its keys and values: a row of the policy, a place in the reward's cache; or copies of them.
    row: int | None = None
    place: tuple[int, int] | None = None
    policy_branch: Branch | None = None
    reward_layers: KeysAndValues | None = None
    failed: bool = False
    scored: bool = False
    reward: float = math.nan
    proposal_scores: tuple[float, ...] = ()
    next_forced: tuple[int, ...] = ()

    def perplexity(self) -> float:
        """Perplexity of the kept tokens under the policy."""
        steps = zip(self.token_ids, self.positions, strict=True)
        total = sum(position.log_probability(token) for token, position in steps)
        return math.exp(-total / max(1, len(self.token_ids)))

    def choose(self, step: int) -> int:
        """The forced token while there is one that the policy finds likely here, else its own."""
        if step < len(self.forced) and (step == 0 or self.forced[step] in self.position.tokens):
            return self.forced[step]
        return self.position.tokens[0]

    def as_candidate(self, offset: int) -> Candidate:
        """What the trace keeps of it, its token at `offset` being the nudged one."""
        return Candidate(
            token_ids=tuple(self.token_ids),
            entropies=tuple(position.entropy for position in self.positions),
            reward=self.reward,
            finished=self.finished,
            forced_tokens=self.forced,
            boundary_token=self.boundary_token,
            boundary_entropy=None if self.boundary is None else self.boundary.entropy,
            proposals=tuple(self.positions[offset].tokens) if self.proposal_scores else (),
            proposal_scores=self.proposal_scores,
        )


def decode(
    passes: list[Pass],
    policy: PolicyLane,
    settings: SegmentSettings,
    rules: EndRules,
    offset: int,
    asked: int | None = None,
) -> Decoding[None]:
    """Decode candidates side by side until the first `asked` are complete, by default all.

    Their first `offset` tokens are in the sequence already. The others may go on in a later call, as long as they keep
    their rows. Raises FloatingPointError where the reader does for one that is asked for; others have failed.
    """
    wanted = passes[:asked]
    sequence = policy.token_ids
    recent, start = sequence[-_STOP_CONTEXT:], len(sequence) - offset
    taken = {candidate.row for candidate in passes}
    free = (row for row in range(policy.rows) if row not in taken)
    for candidate in passes:
        if candidate.row is None:
            candidate.row = next(free)
            policy.clear(candidate.row)
            _choose_next(candidate, recent, start, offset, settings, rules)
    while not all(candidate.complete for candidate in wanted):
        active = [candidate for candidate in passes if not (candidate.complete or candidate.failed)]
        # The token after the next will be wanted where the next is neither forced nor able to end the segment.
        first = active[0]
        decoded = len(first.token_ids) + 1
        certain = decoded - offset > len(first.forced) and not settings.checked(decoded)
        tokens = {candidate.row: candidate.token_ids[-1] for candidate in active if candidate.row is not None}
        positions = yield Step(tokens, run_ahead=certain and start + decoded < settings.total)
        for candidate, position in zip(active, positions, strict=True):
            if not isinstance(position, FloatingPointError):
                candidate.position = position
                _choose_next(candidate, recent, start, offset, settings, rules)
            elif candidate in wanted:
                raise position
            else:
                candidate.failed = True


def _choose_next(
    candidate: Pass, recent: list[int], start: int, offset: int, settings: SegmentSettings, rules: EndRules
) -> None:
    """Add the next token, which may complete the candidate."""
    tokens, position = candidate.token_ids, candidate.position
    token = candidate.choose(len(tokens) - offset)
    tokens.append(token)
    candidate.positions.append(position)
    at_length = start + len(tokens) >= settings.total
    uncertain = settings.checked(len(tokens)) and position.entropy >= settings.entropy_threshold
    candidate.complete = at_length or uncertain or rules.stop((recent + tokens[offset:])[-_STOP_CONTEXT - 1 :])
    if not candidate.complete:
        return
    candidate.finished = token in rules.finish_ids
    if not candidate.finished and not at_length:
        candidate.boundary, candidate.boundary_token = position, token
        del tokens[-1], candidate.positions[-1]
