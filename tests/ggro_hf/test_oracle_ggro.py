"""Every recorded trace of the released GGRO code is reproduced through the public interface, in fp32."""

import pytest
import torch

from ggro_hf import GGRO, Generation
from ggro_hf.prompts import released_prompt
from tests.ggro_hf.agreement import Tolerance, assert_agreement
from tests.ggro_hf.oracle import NEAR_TIE_MARGIN, SUITES, policy, prompts, reward_model, tokenizer, traces
from tests.ggro_hf.released import Candidate, ReleasedGGRO, Result, Segment, Settings

CASES = {"bpe_trained": 383, "bpe_rand": 159, "rt_rand": 159}
CASES_PER_TEST = 40
CHUNKS = [(suite, start) for suite, cases in CASES.items() for start in range(0, cases, CASES_PER_TEST)]

END_OF_TURN = 2

# Entropies are recorded to 5 digits, scores to 6 significant ones.
# Neighbours inside the top-k may be closer than fp32 rounding, and only the gap at its cut is recorded.
TOLERANCE = Tolerance(reward=1e-4, entropy=2e-4, score=1e-3, ordered_proposals=False)

# Cases in which a margin is so small that another order of summation legitimately gives another token. There are none.
NEAR_TIES: frozenset[str] = frozenset()


def recorded(trace: dict) -> Result:
    """A recorded trace in the form of the reference's result."""
    segments = []
    prefix = trace["prompt_ids"]
    for segment in trace["segments"]:
        start = segment["start"]
        candidates = [
            Candidate(
                # The recorded prefix is known by its length alone: agreement compares what follows it.
                ids=[-1] * start + refinement["tokens"],
                raw_ids=refinement["raw_tokens"],
                entropies=refinement["ent"],
                reward=refinement["reward"],
                finished=refinement["finished"],
                forced=refinement["forced"],
                duplicate=refinement["dup"],
                proposal=refinement["nudge"],
                top_ids=segment["cand_ids"] or [],
            )
            for refinement in segment["refinements"]
        ]
        segments.append(Segment(start, segment["insertion_offset"], prefix, candidates, segment["best_iteration"]))
    result = Result(
        ids=trace["final_ids"],
        generated_ids=trace["final_ids_untokenised"] or trace["final_ids"],
        text=trace["full_text"],
        segments=segments,
        boundaries=trace["segment_boundaries"],
        reward=trace["reward"],
        policy_tokens=0,
        reward_forward_tokens=0,
        reward_backward_tokens=0,
    )
    assert result.nudges == trace["num_nudges"]
    return result


def smallest_margin(trace: dict) -> float:
    refinements = [refinement for segment in trace["segments"] for refinement in segment["refinements"]]
    margins = [
        r[name] for r in refinements for name in ("argmax_margin", "kmargin", "score_margin") if r[name] is not None
    ]
    return min(margins)


def replay(suite: str, trace: dict) -> Generation:
    config = trace["config"]
    decoder = GGRO(
        reward_model(),
        tokenizer=tokenizer(suite),
        entropy_threshold=config["entropy_threshold"],
        refinements=config["num_refinement_steps"],
        candidates=config["nudge_top_k"],
        as_released=True,
        insertion_offset=0 if config["prefill_attack"] else None,
    )
    output = decoder(policy(suite), torch.tensor([trace["prompt_ids"]]), max_new_tokens=config["max_new_tokens"])
    return output.generations[0]


def assert_replayed(suite: str, trace: dict, generation: Generation) -> None:
    expected = recorded(trace)
    assert_agreement(generation, expected, TOLERANCE)
    assert generation.prompt_ids == trace["prompt_ids"]
    assert generation.text == trace["response"]
    generated_ids = generation.prompt_ids + generation.token_ids
    assert generated_ids == expected.generated_ids
    full_text = tokenizer(suite).decode(generated_ids, skip_special_tokens=False)
    assert full_text == expected.text
    assert tokenizer(suite)(full_text, add_special_tokens=False).input_ids == expected.ids
    assert (generation.finish_reason == "eos") == (expected.ids[-1] == END_OF_TURN)
    starts = [segment.start for segment in generation.trace.segments]
    assert starts[1:] == expected.boundaries[:-1]


@pytest.mark.parametrize(("suite", "start"), CHUNKS, ids=[f"{suite}-{start}" for suite, start in CHUNKS])
def test_released_traces_are_reproduced(suite, start):
    differing = {}
    for trace in traces("ggro", suite)[start : start + CASES_PER_TEST]:
        try:
            assert_replayed(suite, trace, replay(suite, trace))
        except AssertionError as error:
            differing[trace["case"]] = str(error)
    for case in differing.keys() & NEAR_TIES:
        assert (
            smallest_margin(next(trace for trace in traces("ggro", suite) if trace["case"] == case)) < NEAR_TIE_MARGIN
        )
    unexplained = {case: message for case, message in differing.items() if case not in NEAR_TIES}
    assert not unexplained, "\n".join(f"{case}: {message}" for case, message in unexplained.items())


def test_every_recorded_case_is_replayed():
    assert sum(len(traces("ggro", suite)) for suite in SUITES) == 701
    assert {suite: len(traces("ggro", suite)) for suite in SUITES} == CASES


@pytest.mark.parametrize("suite", SUITES)
def test_prompts_are_built_as_the_released_code_builds_them(suite):
    seen = set()
    for trace in traces("ggro", suite):
        prefill = trace["config"]["prefill_attack"]
        ids = released_prompt(tokenizer(suite), prompts()[trace["prompt_index"]], prefill_attack=prefill)
        assert ids == trace["prompt_ids"]
        seen.add(prefill)
    assert seen == {False, True}


@pytest.mark.parametrize("suite", SUITES)
def test_the_transcription_reproduces_the_traces_too(suite):
    reward = reward_model().model
    affordable = [t for t in traces("ggro", suite) if len(t["segments"]) <= 12 and t["config"]["nudge_top_k"] <= 25]
    for trace in affordable[:: len(affordable) // 4]:
        config = trace["config"]
        settings = Settings(
            max_new_tokens=config["max_new_tokens"],
            entropy_threshold=config["entropy_threshold"],
            refinements=config["num_refinement_steps"],
            candidates=config["nudge_top_k"],
            stop_ids=frozenset({END_OF_TURN}),
            finish_ids=frozenset({END_OF_TURN}),
            insertion_offset=0 if config["prefill_attack"] else 4,
        )
        result = ReleasedGGRO(policy(suite), reward, tokenizer(suite), settings)(trace["prompt_ids"])
        expected = recorded(trace)
        assert (result.ids, result.generated_ids, result.text) == (expected.ids, expected.generated_ids, expected.text)
        assert (result.boundaries, result.nudges) == (expected.boundaries, expected.nudges)
        assert result.reward == pytest.approx(expected.reward, abs=TOLERANCE.reward)
        for segment, reference in zip(result.segments, expected.segments, strict=True):
            assert segment.best == reference.best
            for candidate, other in zip(segment.candidates, reference.candidates, strict=True):
                assert (candidate.raw_ids, candidate.forced, candidate.proposal, candidate.duplicate) == (
                    other.raw_ids,
                    other.forced,
                    other.proposal,
                    other.duplicate,
                ), trace["case"]
                assert candidate.reward == pytest.approx(other.reward, abs=TOLERANCE.reward)
