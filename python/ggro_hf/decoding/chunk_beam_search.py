"""Chunk-level beam search: beams grow by drawn chunks, and the reward keeps the best."""

import itertools
import math
from dataclasses import dataclass, field

import numpy as np
from transformers.generation.streamers import BaseStreamer
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from ggro_hf.decoding.base import Request, finish_reason, open_policy
from ggro_hf.decoding.drawing import Distribution, Warped, uniforms
from ggro_hf.decoding.guided import GuidedDecoder, check_positive, check_some_reward
from ggro_hf.policy_rows import PolicyRows
from ggro_hf.results import Candidate, Counters, Generation, Segment, Trace
from ggro_hf.rewards import Reward


@dataclass(frozen=True, slots=True)
class _Beam:
    """A hypothesis; `segments` are the chunks it is made of, each among its siblings.

    While it has not ended, `place` names its last chunk in the last scoring, and `row` is its row in the policy.
    """

    token_ids: list[int]
    reward: float
    segments: tuple[Segment, ...]
    ended: bool
    place: tuple[int, int]
    row: int


@dataclass(slots=True)
class _Chunk:
    """What one successor of a beam draws; `row` is its row in the policy until it ends."""

    beam: int
    row: int
    token_ids: list[int] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)


class ChunkBeamSearch(GuidedDecoder):
    """Each of `width` beams draws `successors` chunks of at most `chunk_length` tokens; the reward keeps the best.

    Only beams that have not ended draw; one that has is carried along once, with its reward. The search ends when all
    beams have. Ties go to the earlier beam, then to the earlier draw. The first chunks are `width * successors` draws
    from the prompt. Token-level beam search (TBS) is `chunk_length=1`. The policy computes the prompt once and
    `width * successors` tokens at a time (at a chunk's beginning `width`), the reward each chunk once.

    The trace has the best beam's chunks, each among its siblings.

    Args:
        width: beams (W).
        successors: chunks drawn for each beam (K).
        chunk_length: tokens (L).
        temperature, top_k, top_p: of the draws; a temperature of 0 takes the likeliest token.
        as_released: a beam that has ended takes the places of its `successors` equal copies, as in the released code,
            so that one may fill all beams and end the search.

    Raises ValueError for settings out of range; see `GuidedDecoder` for the other arguments.

    Source: Zhou et al., 2024 (weak-to-strong search), with a reward model as in the SP-PRM paper.
    """

    def __init__(
        self,
        reward: Reward,
        *,
        width: int = 8,
        successors: int = 8,
        chunk_length: int = 30,
        temperature: float = 1.0,
        top_k: int | None = 50,
        top_p: float | None = None,
        seed: int = 0,
        as_released: bool = False,
        tokenizer: PreTrainedTokenizerBase | None = None,
        streamer: BaseStreamer | None = None,
    ) -> None:
        super().__init__(reward, tokenizer=tokenizer, streamer=streamer)
        check_positive(width=width, successors=successors, chunk_length=chunk_length)
        self.width = width
        self.successors = successors
        self.chunk_length = chunk_length
        self.reader = Warped(temperature, top_k, top_p)
        self.seed = seed
        self.as_released = as_released

    def _decode(self, request: Request, counters: Counters) -> Generation:
        scoring = self._open_scoring(request, counters)
        policy = open_policy(request, counters, self.reader)
        rows = policy.fork(1)
        position = policy.position
        beams = [_Beam([], math.nan, (), False, (0, 0), 0)]
        for number in itertools.count():
            live = [beam for beam in beams if not beam.ended]
            with counters.phase("decode"):
                chunks = self._draw(request, rows, position, live, number)
            with counters.phase("reward"):
                rewards = scoring.score([[chunk.token_ids for chunk in own] for own in chunks])
            beams = self._select(request, beams, chunks, rewards)
            live = [beam for beam in beams if not beam.ended]
            if not live:
                break
            with counters.phase("reward"):
                scoring.keep([beam.place for beam in live])
            with counters.phase("decode"):
                rows.select([beam.row for beam in live])
                position = self.reader.read(rows.extend([beam.token_ids[-1] for beam in live]))
        best = beams[0]
        trace = Trace()
        for segment in best.segments:
            trace.append(segment)
        self._stream(best.token_ids)
        reason = finish_reason(best.token_ids, request)
        return Generation(request.prompt_ids, best.token_ids, reason, best.reward, trace, counters)

    def _draw(
        self, request: Request, rows: PolicyRows, position: Distribution, live: list[_Beam], number: int
    ) -> list[list[_Chunk]]:
        """The chunks of every beam, drawn side by side from the positions of the beams, which are the policy's rows."""
        successors = self.successors if number else self.width * self.successors
        generators = [uniforms(self.seed, request.row, number, beam) for beam in range(len(live))]
        chunks = [_Chunk(beam, beam) for beam in range(len(live)) for _ in range(successors)]
        position = position.rows([chunk.row for chunk in chunks])
        active = list(range(len(chunks)))
        for room in reversed(range(min(self.chunk_length, request.max_new_tokens - len(live[0].token_ids)))):
            numbers = np.concatenate([generator.random(successors) for generator in generators])
            tokens, entropies = position.draw(numbers[active])
            for index, token, entropy in zip(active, tokens, entropies, strict=True):
                chunks[index].token_ids.append(token)
                chunks[index].entropies.append(entropy)
            if not room:
                break
            active = [index for index in active if chunks[index].token_ids[-1] not in request.eos_ids]
            if not active:
                break
            rows.select([chunks[index].row for index in active])
            for row, index in enumerate(active):
                chunks[index].row = row
            position = self.reader.read(rows.extend([chunks[index].token_ids[-1] for index in active]))
        return [[chunk for chunk in chunks if chunk.beam == beam] for beam in range(len(live))]

    def _select(
        self, request: Request, beams: list[_Beam], chunks: list[list[_Chunk]], rewards: list[list[float]]
    ) -> list[_Beam]:
        """The best of the beams that have ended and of the others' successors, in order."""
        pool: list[_Beam] = []
        scored = zip(itertools.count(), chunks, rewards, strict=False)
        for beam in beams:
            if beam.ended:
                pool += [beam] * (self.successors if self.as_released else 1)
            else:
                pool += self._successors(request, beam, *next(scored))
        check_some_reward([beam.reward for beam in pool])
        # Sorting is stable; NaN goes last.
        pool.sort(key=lambda beam: (math.isnan(beam.reward), -beam.reward))
        return pool[: self.width]

    def _successors(
        self, request: Request, beam: _Beam, sequence: int, chunks: list[_Chunk], rewards: list[float]
    ) -> list[_Beam]:
        siblings = tuple(
            Candidate(tuple(chunk.token_ids), tuple(chunk.entropies), reward, chunk.token_ids[-1] in request.eos_ids)
            for chunk, reward in zip(chunks, rewards, strict=True)
        )
        start = len(request.prompt_ids) + len(beam.token_ids)
        successors = []
        for number, (chunk, candidate) in enumerate(zip(chunks, siblings, strict=True)):
            token_ids = beam.token_ids + chunk.token_ids
            segments = (*beam.segments, Segment(start, 0, siblings, number))
            ended = candidate.finished or len(token_ids) == request.max_new_tokens
            successors.append(_Beam(token_ids, candidate.reward, segments, ended, (sequence, number), chunk.row))
        return successors
