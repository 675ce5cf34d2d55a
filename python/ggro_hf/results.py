"""What a decoder returns: sequences, and for every response its trace and its counters."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter
from typing import Literal

import torch

FinishReason = Literal["eos", "length"]


@dataclass(frozen=True, slots=True)
class Candidate:
    """One decoded continuation of a segment, and its reward.

    `entropies` (nats) belong to `token_ids`, one each. `boundary_token` is the token at which decoding stopped
    without keeping it (the high-entropy token that opens the next segment), `boundary_entropy` its entropy.
    `forced_tokens` are the tokens that replaced the policy's own from the insertion offset on; the candidate before
    any intervention has none. `proposals` and `proposal_scores` are the policy's likeliest tokens at the insertion
    offset and the gradient's score of each; they are empty where no further candidate could follow. `score` is what
    the choice was made by where that is not the reward, `threshold` the reward that was wanted of the candidate.
    """

    token_ids: tuple[int, ...]
    entropies: tuple[float, ...]
    reward: float
    finished: bool
    forced_tokens: tuple[int, ...] = ()
    boundary_token: int | None = None
    boundary_entropy: float | None = None
    proposals: tuple[int, ...] = ()
    proposal_scores: tuple[float, ...] = ()
    score: float | None = None
    threshold: float | None = None


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of the response chosen among `candidates`; `start` counts the tokens of the sequence before it."""

    start: int
    insertion_offset: int
    candidates: tuple[Candidate, ...]
    chosen_index: int

    @property
    def chosen(self) -> Candidate:
        """The candidate that became part of the response."""
        return self.candidates[self.chosen_index]

    @property
    def base(self) -> Candidate:
        """The candidate that the policy decodes by itself."""
        return self.candidates[0]

    @property
    def nudged(self) -> bool:
        """Whether the chosen candidate carries an intervention (a sample of best-of-N carries none)."""
        return bool(self.chosen.forced_tokens)


@dataclass(slots=True)
class Trace:
    """How a response came about: the entropy (nats) of every decoded token, and segments if the method has any.

    Entropies match the response's `token_ids` one to one, except where released behaviour tokenises its text again.
    """

    entropies: list[float] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)

    def append(self, segment: Segment) -> None:
        """Add a segment, its chosen candidate's entropies with it."""
        self.segments.append(segment)
        self.entropies += segment.chosen.entropies

    @property
    def nudges(self) -> int:
        """Number of segments in which an intervention was kept."""
        return sum(segment.nudged for segment in self.segments)


@dataclass(slots=True)
class Counters:
    """Work done for one response, counted the same way for every method.

    Tokens are tokens that went through a forward (or backward) pass, a step that ran ahead for nothing included; the
    passes with which a step is captured, once a model, count in the time only. `seconds` maps a phase to its wall time,
    to which a GPU's work belongs: every phase ends with its result on the host. `peak_bytes` is the peak memory of the
    GPUs (where the policy is on a CPU: of the process) when the response was finished.

    Where candidates are decoded before they are asked for, `speculation_hits` counts those asked for later,
    `speculation_misses` the batches that were decoded because one was lacking, and `wasted_policy_tokens` and
    `wasted_reward_tokens` what the models have read of candidates that nobody asked for.
    """

    policy_tokens: int = 0
    reward_forward_tokens: int = 0
    reward_backward_tokens: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    peak_bytes: int = 0
    speculation_hits: int = 0
    speculation_misses: int = 0
    wasted_policy_tokens: int = 0
    wasted_reward_tokens: int = 0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the wall time of the body to `seconds[name]`."""
        start = perf_counter()
        try:
            yield
        finally:
            self.add_seconds(name, perf_counter() - start)

    def add_seconds(self, phase: str, seconds: float) -> None:
        """Add to the wall time of a phase."""
        self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds


@dataclass(slots=True)
class Generation:
    """One response: `token_ids` follow `prompt_ids`; `reward` is that of the decoder's reward model, if it has one.

    `text` is the response without special tokens; released behaviour gives the whole conversation where the policy
    never opens the assistant's turn, as the released code does.
    """

    prompt_ids: list[int]
    token_ids: list[int]
    finish_reason: FinishReason
    reward: float | None
    trace: Trace
    counters: Counters
    prompt: str | None = None
    text: str | None = None


@dataclass(slots=True)
class DecoderOutput:
    """Result of calling a decoder on a batch: `sequences[B, L]` (prompt, response, padding) and a generation a row."""

    sequences: torch.Tensor
    generations: list[Generation]
