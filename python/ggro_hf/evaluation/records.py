"""A generation as plain JSON values: what row files hold and reports are made from."""

import math
from typing import Any

from ggro_hf.results import Candidate, Counters, Generation, Segment

RECORD_FIELDS = (
    "text",
    "token_ids",
    "prompt_ids",
    "reward",
    "finish_reason",
    "nudges",
    "entropies",
    "segments",
    "counters",
)

# Of the proposals of a candidate, a record keeps those that the gradient likes best.
_KEPT_PROPOSALS = 5


def generation_record(generation: Generation) -> dict[str, Any]:
    """The response, its entropies (nats), segments with all candidates, and counters; NaN becomes None."""
    return {
        "text": generation.text,
        "token_ids": list(generation.token_ids),
        "prompt_ids": list(generation.prompt_ids),
        "reward": _finite(generation.reward),
        "finish_reason": generation.finish_reason,
        "nudges": generation.trace.nudges,
        "entropies": [_finite(entropy, digits=4) for entropy in generation.trace.entropies],
        "segments": [_segment_record(segment) for segment in generation.trace.segments],
        "counters": _counters_record(generation.counters),
    }


def _segment_record(segment: Segment) -> dict[str, Any]:
    return {
        "start": segment.start,
        "insertion_offset": segment.insertion_offset,
        "chosen_index": segment.chosen_index,
        "candidates": [_candidate_record(candidate) for candidate in segment.candidates],
    }


def _candidate_record(candidate: Candidate) -> dict[str, Any]:
    scored = sorted(zip(candidate.proposals, candidate.proposal_scores, strict=True), key=lambda pair: -pair[1])
    return {
        "token_ids": list(candidate.token_ids),
        "reward": _finite(candidate.reward),
        "finished": candidate.finished,
        "forced_tokens": list(candidate.forced_tokens),
        "boundary_token": candidate.boundary_token,
        "boundary_entropy": _finite(candidate.boundary_entropy, digits=4),
        "proposals": [[token, float(f"{score:.4g}")] for token, score in scored[:_KEPT_PROPOSALS]],
        "score": _finite(candidate.score),
        "threshold": _finite(candidate.threshold),
    }


def _counters_record(counters: Counters) -> dict[str, Any]:
    return {
        "policy_tokens": counters.policy_tokens,
        "reward_forward_tokens": counters.reward_forward_tokens,
        "reward_backward_tokens": counters.reward_backward_tokens,
        "seconds": {phase: round(seconds, 4) for phase, seconds in counters.seconds.items()},
        "peak_bytes": counters.peak_bytes,
    }


def _finite(value: float | None, digits: int | None = None) -> float | None:
    if value is None or not math.isfinite(value):
        return None
    return value if digits is None else round(value, digits)
