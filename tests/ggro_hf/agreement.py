"""Does a decoder's generation agree with what the reference, or a recorded trace, says?"""

from collections.abc import Iterable
from dataclasses import dataclass

import pytest

from ggro_hf.results import Candidate as Proposed
from ggro_hf.results import Generation
from tests.ggro_hf.released import Candidate, Result


@dataclass(frozen=True)
class Tolerance:
    """Absolute tolerances; token ids are compared exactly."""

    reward: float
    entropy: float
    score: float
    ordered_proposals: bool = True


def assert_agreement(generation: Generation, expected: Result, tolerance: Tolerance) -> None:
    """Every segment, every candidate that is no duplicate, and the nudges; the final ids are left to the caller."""
    segments = generation.trace.segments
    assert [segment.start for segment in segments] == [segment.start for segment in expected.segments]
    for index, (segment, reference) in enumerate(zip(segments, expected.segments, strict=True)):
        where = f"segment {index}"
        assert segment.insertion_offset == reference.insertion_offset, where
        # The reference generates a duplicate before it recognises it.
        distinct = [candidate for candidate in reference.candidates if not candidate.duplicate]
        kept = [list(candidate.token_ids) for candidate in segment.candidates]
        assert kept == [candidate.ids[reference.start :] for candidate in distinct], where
        assert segment.chosen_index == reference.best, where
        for number, (candidate, recorded) in enumerate(zip(segment.candidates, distinct, strict=True)):
            here = f"{where}, candidate {number}"
            assert candidate.reward == pytest.approx(recorded.reward, abs=tolerance.reward, rel=0), here
            assert candidate.finished == recorded.finished, here
            assert candidate.forced_tokens == (() if recorded.forced is None else (recorded.forced,)), here
            _assert_same_boundary(candidate, recorded, tolerance, here)
            _assert_same_proposals(candidate, recorded, tolerance, here)
    assert generation.trace.nudges == expected.nudges
    assert generation.reward == pytest.approx(expected.reward, abs=tolerance.reward, rel=0)


def _assert_same_boundary(candidate: Proposed, recorded: Candidate, tolerance: Tolerance, here: str) -> None:
    kept = len(candidate.token_ids)
    entropies = recorded.entropies
    assert candidate.entropies == pytest.approx(entropies[:kept], abs=tolerance.entropy, rel=0), here
    if kept == len(recorded.raw_ids):
        assert candidate.boundary_token is None, here
    else:
        assert candidate.boundary_token == recorded.raw_ids[-1], here
        assert candidate.boundary_entropy == pytest.approx(entropies[-1], abs=tolerance.entropy, rel=0), here


def _assert_same_proposals(candidate: Proposed, recorded: Candidate, tolerance: Tolerance, here: str) -> None:
    # A decoder does not look for a successor where none can follow.
    if not candidate.proposals or not recorded.top_ids:
        return
    if tolerance.ordered_proposals:
        assert list(candidate.proposals) == recorded.top_ids, here
    else:
        assert set(candidate.proposals) == set(recorded.top_ids), here
    if recorded.top_scores:
        scores = dict(zip(recorded.top_ids, recorded.top_scores, strict=True))
        expected = [scores[token] for token in candidate.proposals]
        assert candidate.proposal_scores == pytest.approx(expected, abs=tolerance.score, rel=0), here
    proposed = candidate.proposals[candidate.proposal_scores.index(max(candidate.proposal_scores))]
    assert proposed == recorded.proposal, here


def duplicates(results: Iterable[Result]) -> int:
    """Number of passes that repeated a candidate."""
    return sum(c.duplicate for result in results for segment in result.segments for c in segment.candidates)
