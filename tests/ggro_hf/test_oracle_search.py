"""Every recorded trace of the released ARGS and CARDS code is reproduced through the public interface, in fp32.

Where the released code draws, its draws are put in the place of ours: what is compared is everything they lead to.
"""

import pytest

from ggro_hf import ARGS, CARDS
from ggro_hf.decoding import args, drawing, rejection
from ggro_hf.decoding.base import Request
from tests.ggro_hf.oracle import SUITES, policy, reward_model, traces

EVERY_SUITE = pytest.mark.parametrize("suite", SUITES)
REWARD_TOLERANCE = 1e-4
ENTROPY_TOLERANCE = 2e-4


def request(suite, trace):
    # The released code knows no end of sequence.
    return Request(policy(suite), trace["prompt_ids"], trace["config"]["max_new_token"], frozenset())


@EVERY_SUITE
@pytest.mark.parametrize("candidates", [1, 5, 10, 30])
def test_args(suite, candidates, monkeypatch):
    cases = [trace for trace in traces("args", suite) if trace["config"]["topk"] == candidates]
    for trace in cases:
        config = trace["config"]
        draws = config["method"] == "topk"
        if draws:
            ranks = iter([step["chosen_rank"] for step in trace["steps"]])
            monkeypatch.setattr(args, "draw_by_score", lambda scores, temperature, number, ranks=ranks: next(ranks))
        decoder = ARGS(
            reward_model(),
            weight=config["weight"],
            candidates=candidates,
            mode="sample" if draws else "greedy",
            as_released=True,
        )
        generation = decoder.respond(request(suite, trace))
        assert generation.token_ids == trace["new_ids"]
        for segment, step in zip(generation.trace.segments, trace["steps"], strict=True):
            assert segment.chosen.token_ids == (step["chosen"],)
            if "rewards" in step:
                recorded = dict(zip(step["cand_ids"], step["rewards"], strict=True))
                rewards = {candidate.token_ids[0]: candidate.reward for candidate in segment.candidates}
                assert rewards == pytest.approx(recorded, abs=REWARD_TOLERANCE)


class RecordedDraws:
    """Stands in for the decoder's random numbers: the tokens and acceptance numbers of the candidates, in order."""

    def __init__(self, candidates: list[dict]) -> None:
        self._candidates = iter(candidates)
        self._tokens = iter(())
        self._acceptance = 0.0

    def uniforms(self, seed, row, *draw, purpose=drawing.DRAWING):
        if purpose == drawing.DRAWING:
            candidate = next(self._candidates)
            self._tokens = iter(candidate["tokens"])
            self._acceptance = candidate["u"]
        return self

    def random(self):
        return self._acceptance

    def draw(self, distribution, numbers):
        # At a boundary the decoder has drawn a token that it does not use.
        return [next(self._tokens, -1)], distribution.entropy.tolist()


@EVERY_SUITE
def test_cards(suite, monkeypatch):
    compared = best_of_all = 0
    for trace in traces("cards", suite):
        config = trace["config"]
        draws = RecordedDraws(trace["candidates"])
        monkeypatch.setattr(rejection, "uniforms", draws.uniforms)
        monkeypatch.setattr(drawing.Distribution, "draw", lambda self, numbers, draws=draws: draws.draw(self, numbers))
        decoder = CARDS(
            reward_model(),
            reward_threshold=config["reward_threshold"],
            entropy_threshold=config["entropy_threshold"],
            alpha=config["alpha"],
            temperature=config["beta"],
            top_k=config["topk"],
            acceptance=config["option"],
            parallel=1,
            as_released=True,
        )
        generation = decoder.respond(request(suite, trace))
        decoded = [(segment.start, c) for segment in generation.trace.segments for c in segment.candidates]
        assert generation.token_ids == trace["new_ids"]
        for (start, candidate), recorded in zip(decoded, trace["candidates"], strict=True):
            assert (start, list(candidate.token_ids)) == (recorded["start"], recorded["tokens"])
            # The longest segments end without a boundary.
            boundary = [candidate.boundary_entropy] * (len(candidate.token_ids) < decoder.max_segment)
            entropies = [*candidate.entropies[4:], *boundary]
            assert entropies == pytest.approx(recorded["ent"], abs=ENTROPY_TOLERANCE)
            assert candidate.reward == pytest.approx(recorded["reward"], abs=REWARD_TOLERANCE)
            assert candidate.threshold == pytest.approx(recorded["threshold"], abs=REWARD_TOLERANCE)
            compared += 1
        best_of_all += sum(len(segment.candidates) == 21 for segment in generation.trace.segments)
    assert compared > 300
    assert best_of_all


def test_every_recorded_case_is_replayed():
    assert sum(len(traces("args", suite)) for suite in SUITES) == 273
    assert {trace["config"]["topk"] for suite in SUITES for trace in traces("args", suite)} == {1, 5, 10, 30}
    assert sum(len(traces("cards", suite)) for suite in SUITES) == 96
