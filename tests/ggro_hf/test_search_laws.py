"""What must hold between the searches: limits in which one is another, parallel draws, ties, beams that have ended."""

from dataclasses import replace
from functools import cache
from itertools import product
from math import inf, nan

import pytest
import torch

from ggro_hf import ARGS, CARDS, BestOfN, ChunkBeamSearch, Greedy, RejectionSampling, RewardModel, Sample
from ggro_hf.decoding.base import Decoder, Request
from ggro_hf.results import Generation, Segment
from tests.ggro_hf.rule_reward import RuleReward
from tests.ggro_hf.small_models import FAMILIES, PAD, scripted_policy, small_policy, small_reward

VOCABULARY = 300
PROMPTS = ([72, 105, 84, 121, 110], [9], list(range(40, 62)))
EOS = frozenset({1, 2, 77})
SEEDS = range(4)


@cache
def policy(family: str = "llama"):
    return small_policy(family, seed=0, vocabulary=VOCABULARY, gain=2.0)


@cache
def reward(family: str = "llama") -> RewardModel:
    return RewardModel(small_reward(family, seed=1, vocabulary=VOCABULARY))


def respond(decoder: Decoder, prompt: list[int], row: int = 0, max_new_tokens: int = 14) -> Generation:
    return decoder.respond(Request(policy(), list(prompt), max_new_tokens, EOS, row))


def nothing(response: tuple[int, ...]) -> float:
    return 0.0


@pytest.mark.parametrize("prompt", PROMPTS, ids=len)
@pytest.mark.parametrize(
    "decoder",
    [
        lambda: ARGS(reward(), weight=0.0),
        lambda: ARGS(reward(), candidates=1, weight=50.0),
        lambda: ARGS(reward(), candidates=1, mode="sample"),
        lambda: ARGS(reward(), weight=0.0, mode="sample", temperature=1e-6),
        lambda: ChunkBeamSearch(reward(), width=1, successors=1, chunk_length=5, temperature=0.0),
        lambda: ChunkBeamSearch(reward(), width=1, successors=1, chunk_length=1, top_k=1),
        lambda: ChunkBeamSearch(reward(), width=3, successors=2, chunk_length=4, temperature=0.0),
        lambda: BestOfN(reward(), samples=3, temperature=0.0),
        lambda: BestOfN(reward(), samples=2, top_p=1e-9),
        lambda: CARDS(reward(), reward_threshold=0.0, top_k=1, entropy_threshold=1.0),
        lambda: RejectionSampling(reward(), reward_threshold=0.0, top_k=1),
    ],
    ids=[
        "ARGS, w=0",
        "ARGS, k=1",
        "ARGS drawn, k=1",
        "ARGS drawn, cold",
        "CBS, one beam",
        "TBS, top-1",
        "CBS, beams that are all the same",
        "best of equal",
        "best-of-N, smallest nucleus",
        "CARDS, top-1",
        "rejection sampling, top-1",
    ],
)
def test_what_has_no_choice_is_greedy(decoder, prompt):
    assert respond(decoder(), prompt).token_ids == respond(Greedy(), prompt).token_ids


@pytest.mark.parametrize("prompt", PROMPTS, ids=len)
@pytest.mark.parametrize("settings", [{"top_k": 40}, {"temperature": 1.4, "top_k": None}], ids=str)
def test_what_takes_the_first_draw_is_sampling(prompt, settings):
    settings = {"temperature": 0.7} | settings
    free = {"reward_threshold": -inf, **settings}
    for row, seed in enumerate(SEEDS):
        expected = respond(Sample(seed=seed, **settings), prompt, row).token_ids
        whole = CARDS(reward(), entropy_threshold=inf, seed=seed, **free)
        drawn = [
            respond(BestOfN(reward(), samples=1, seed=seed, **settings), prompt, row),
            respond(RejectionSampling(reward(), seed=seed, **free), prompt, row),
            respond(whole, prompt, row),
        ]
        assert [generation.token_ids for generation in drawn] == [expected] * 3
        segments = respond(CARDS(reward(), entropy_threshold=1.0, seed=seed, **free), prompt, row).trace.segments
        assert len(segments) > 1 or prompt == PROMPTS[1]
        assert all(segment.chosen_index == 0 and len(segment.candidates) == 1 for segment in segments)


def segments_of(generation: Generation) -> list[Segment]:
    """With rewards rounded: how many candidates are scored together moves their last bits."""
    return [
        replace(
            segment,
            candidates=tuple(
                replace(
                    candidate,
                    entropies=tuple(round(entropy, 9) for entropy in candidate.entropies),
                    boundary_entropy=candidate.boundary_entropy and round(candidate.boundary_entropy, 9),
                    reward=round(candidate.reward, 9),
                    threshold=candidate.threshold and round(candidate.threshold, 9),
                )
                for candidate in segment.candidates
            ),
        )
        for segment in generation.trace.segments
    ]


@pytest.mark.parametrize(
    "decoder",
    [
        lambda **settings: CARDS(reward(), reward_threshold=1.5, entropy_threshold=1.5, attempts=9, **settings),
        lambda **settings: CARDS(reward(), reward_threshold=0.5, acceptance="hard", attempts=6, **settings),
        lambda **settings: RejectionSampling(reward(), reward_threshold=1.5, attempts=9, **settings),
        lambda **settings: BestOfN(reward(), samples=11, temperature=0.3, **settings),
    ],
    ids=["CARDS", "CARDS, hard", "rejection sampling", "best-of-N"],
)
def test_parallel_draws_equal_draws_one_after_another(decoder):
    tried = 0
    for seed, prompt in product(SEEDS[:2], PROMPTS[:2]):
        expected = respond(decoder(parallel=1, seed=seed), prompt, 2)
        for parallel in (2, 3, 7, 30):
            actual = respond(decoder(parallel=parallel, seed=seed), prompt, 2)
            assert actual.token_ids == expected.token_ids
            assert segments_of(actual) == segments_of(expected)
            assert actual.reward == pytest.approx(expected.reward, abs=1e-9)
        tried = max(tried, *(len(segment.candidates) for segment in expected.trace.segments))
    assert tried >= 4


DRAWING = {
    "ARGS": lambda: ARGS(reward(), mode="sample", temperature=3.0),
    "CBS": lambda: ChunkBeamSearch(reward(), width=2, successors=2, chunk_length=3),
    "CARDS": lambda: CARDS(reward(), reward_threshold=1.0, entropy_threshold=1.5, attempts=3),
    "rejection sampling": lambda: RejectionSampling(reward(), reward_threshold=1.0, attempts=3),
    "best-of-N": lambda: BestOfN(reward(), samples=3),
}


@pytest.mark.parametrize("name", DRAWING)
def test_a_row_is_the_same_in_any_batch_with_any_padding(name):
    decoder = DRAWING[name]()
    batch = [PROMPTS[0], PROMPTS[1], PROMPTS[0]]
    for width in (5, 9):
        ids = torch.tensor([[PAD] * (width - len(row)) + row for row in batch])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in batch])
        generations = decoder(policy(), ids, attention_mask=mask, max_new_tokens=9).generations
        eos_ids = frozenset(policy().generation_config.eos_token_id)
        for row, prompt in enumerate(batch):
            alone = decoder.respond(Request(policy(), prompt, 9, eos_ids, row))
            assert generations[row].token_ids == alone.token_ids
            assert segments_of(generations[row]) == segments_of(alone)
    # Rows with the same prompt draw differently.
    assert generations[0].token_ids != generations[2].token_ids


def test_a_beam_that_has_ended_takes_one_place():
    """Released behaviour ends the search with the first beam that ends well; a better one needs two more chunks."""
    end, good, other = 1, 2, 3
    logits = torch.full((6, 6), -30.0, dtype=torch.float64)
    logits[:, [end, good, other]] = torch.tensor([-1.0, 0.0, 0.0], dtype=torch.float64)

    def rule(response: tuple[int, ...]) -> float:
        if response[-1] == end:
            return (5.0, 0.0, 10.0 * response.count(good))[min(len(response), 3) - 1]
        return 1.0 if good in response else 0.5

    model, settings = scripted_policy(logits), {"width": 3, "successors": 3, "chunk_length": 1, "top_k": None}
    request = Request(model, [4], 8, frozenset({end}))
    compared = 0
    for seed in range(12):
        ours = ChunkBeamSearch(RuleReward(rule), seed=seed, **settings).respond(request)
        if sum(candidate.finished for candidate in ours.trace.segments[0].candidates) not in (1, 2):
            continue
        released = ChunkBeamSearch(RuleReward(rule), as_released=True, seed=seed, **settings).respond(request)
        assert released.token_ids == [end] and released.reward == 5.0
        assert ours.reward >= 10.0 and ours.token_ids[-1] == end
        compared += 1
    assert compared >= 3


def test_the_search_ends_as_soon_as_all_beams_have():
    calls = []
    logits = torch.full((6, 6), -30.0, dtype=torch.float64)
    logits[:, 1] = 30.0

    def rule(response: tuple[int, ...]) -> float:
        calls.append(response)
        return 1.0

    decoder = ChunkBeamSearch(RuleReward(rule), width=2, successors=2, chunk_length=4)
    generation = decoder.respond(Request(scripted_policy(logits), [4], 12, frozenset({1})))
    assert generation.token_ids == [1] and generation.finish_reason == "eos"
    # One round, and the policy computed nothing but the prompt.
    assert len(calls) == 4
    assert generation.counters.policy_tokens == 1


@pytest.mark.parametrize("place", [0, 1, 2, 3])
def test_an_end_anywhere_in_a_chunk(place):
    """The chain 4 -> 5 -> 6 -> ... ends with a token at that place of the second chunk of four."""
    vocabulary, end = 14, 5 + 4 + place
    logits = torch.full((vocabulary, vocabulary), -30.0, dtype=torch.float64)
    for token in range(vocabulary - 1):
        logits[token, token + 1] = 30.0
    decoder = ChunkBeamSearch(RuleReward(len), width=2, successors=2, chunk_length=4)
    generation = decoder.respond(Request(scripted_policy(logits), [4], 30, frozenset({end})))
    assert generation.token_ids == list(range(5, end + 1))
    assert [len(segment.chosen.token_ids) for segment in generation.trace.segments] == [4, place + 1]
    assert generation.trace.segments[-1].chosen.finished
    # The two chunks are in two passes for each of their tokens, but for the last; two beams begin the second.
    assert generation.counters.policy_tokens == 1 + 4 * 3 + 2 + 4 * place


@pytest.mark.parametrize("settings", [{"width": 50, "successors": 1}, {"width": 7, "successors": 5}], ids=str)
@pytest.mark.parametrize("chunk_length", [3, 100])
def test_equal_rewards_leave_the_first_draws_of_the_first_beam(settings, chunk_length):
    decoder = ChunkBeamSearch(RuleReward(nothing), chunk_length=chunk_length, seed=3, **settings)
    generation = respond(decoder, PROMPTS[0])
    assert all(segment.chosen_index == 0 for segment in generation.trace.segments)
    assert len(generation.trace.segments[0].candidates) == settings["width"] * settings["successors"]


def test_equal_rewards_take_the_first_everywhere():
    best = respond(BestOfN(RuleReward(nothing), samples=5, seed=1), PROMPTS[0])
    assert best.trace.segments[0].chosen_index == 0
    # Nothing reaches the threshold, so the best of all is taken.
    hard = CARDS(RuleReward(nothing), reward_threshold=9.0, alpha=1.0, acceptance="hard", attempts=4, seed=1)
    for segment in respond(hard, PROMPTS[0]).trace.segments:
        assert segment.chosen_index == 0 and len(segment.candidates) == 5
    assert respond(ARGS(RuleReward(nothing)), PROMPTS[0]).token_ids == respond(Greedy(), PROMPTS[0]).token_ids


SEARCHES = {
    "ARGS": lambda reward: ARGS(reward, candidates=30),
    "ARGS, drawn": lambda reward: ARGS(reward, candidates=30, mode="sample"),
    "CBS": lambda reward: ChunkBeamSearch(reward, width=2, successors=8, chunk_length=3, temperature=3.0),
    "TBS": lambda reward: ChunkBeamSearch(reward, width=3, successors=8, chunk_length=1, temperature=3.0),
    "CARDS": lambda reward: CARDS(reward, reward_threshold=2.0, attempts=9, max_segment=3, temperature=3.0),
    "rejection sampling": lambda reward: RejectionSampling(reward, reward_threshold=2.0, temperature=3.0),
    "best-of-N": lambda reward: BestOfN(reward, samples=20, temperature=3.0),
}


@pytest.mark.parametrize("name", SEARCHES)
@pytest.mark.parametrize("seed", SEEDS)
def test_a_nan_reward_never_wins(name, seed):
    def rule(response: tuple[int, ...]) -> float:
        return nan if sum(response) % 2 else (sum(response) % 7) / 7

    generation = SEARCHES[name](RuleReward(lambda response: rule(response) if response else 0.0)).respond(
        Request(policy(), PROMPTS[seed % 3], 7, frozenset(), seed)
    )
    assert generation.reward == generation.reward
    assert sum(generation.token_ids) % 2 == 0


@pytest.mark.parametrize("name", SEARCHES)
def test_only_nan_rewards_are_an_error(name):
    with pytest.raises(FloatingPointError, match="the reward is NaN for every candidate"):
        respond(SEARCHES[name](RuleReward(lambda response: nan if response else 0.0)), PROMPTS[0])


@pytest.mark.parametrize("name", SEARCHES)
@pytest.mark.parametrize("value", [inf, -inf])
def test_infinite_rewards_decide(name, value):
    def rule(response: tuple[int, ...]) -> float:
        return value if response and response[-1] % 2 else 0.0

    decoder = SEARCHES[name](RuleReward(rule))
    if isinstance(decoder, CARDS | RejectionSampling):
        # Out of reach for a finite reward.
        decoder.reward_threshold = 1e4
    generation = decoder.respond(Request(policy(), PROMPTS[0], 5, frozenset()))
    # Never are the last tokens of all candidates odd, nor all even.
    assert generation.token_ids[-1] % 2 == (value > 0)
    everywhere = SEARCHES[name](RuleReward(lambda response: value))
    assert len(everywhere.respond(Request(policy(), PROMPTS[0], 5, frozenset())).token_ids) == 5


@pytest.mark.parametrize("family", FAMILIES)
def test_rewards_are_those_of_the_sequence(family):
    """Of every candidate of every search, by a forward over all of it."""
    scored = reward(family)
    for make in SEARCHES.values():
        generation = make(scored).respond(Request(policy(family), PROMPTS[2], 7, EOS))
        sequence = list(generation.prompt_ids)
        for segment in generation.trace.segments:
            assert segment.start == len(sequence)
            for candidate in {candidate.token_ids: candidate for candidate in segment.candidates}.values():
                assert candidate.reward == pytest.approx(scored.score(sequence + list(candidate.token_ids)), abs=1e-9)
            sequence += segment.chosen.token_ids
        assert sequence == generation.prompt_ids + generation.token_ids
        assert generation.reward == pytest.approx(scored.score(sequence), abs=1e-9)


@pytest.mark.parametrize("parallel", [1, 4])
def test_nothing_is_computed_for_a_response_that_has_ended(parallel):
    """Of candidates that are all rejected none is computed again, unless the next segment has to go on from it."""
    settings = {"reward_threshold": 99.0, "attempts": 3, "parallel": parallel, "temperature": 1.5, "top_k": None}
    for decoder in (RejectionSampling(reward(), **settings), CARDS(reward(), max_segment=5, **settings)):
        generation = respond(decoder, PROMPTS[0])
        segments = generation.trace.segments
        scored = sum(len(candidate.token_ids) for segment in segments for candidate in segment.candidates)
        again = sum(len(segment.chosen.token_ids) for segment in segments[:-1])
        assert {len(segment.candidates) for segment in segments} == {4}
        assert generation.counters.reward_forward_tokens == len(PROMPTS[0]) + scored + again


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda r: ARGS(r, weight=nan), "weight is nan"),
        (lambda r: ARGS(r, weight=inf), "weight is inf"),
        (lambda r: ARGS(r, candidates=0), "candidates is 0"),
        (lambda r: ARGS(r, mode="topk"), "mode is 'topk'"),
        (lambda r: ARGS(r, temperature=0.0), "temperature is 0.0"),
        (lambda r: ChunkBeamSearch(r, width=0), "width is 0"),
        (lambda r: ChunkBeamSearch(r, successors=-1), "successors is -1"),
        (lambda r: ChunkBeamSearch(r, chunk_length=0), "chunk_length is 0"),
        (lambda r: ChunkBeamSearch(r, temperature=-1.0), "temperature"),
        (lambda r: ChunkBeamSearch(r, temperature=nan), "temperature"),
        (lambda r: ChunkBeamSearch(r, top_k=0), "top_k"),
        (lambda r: ChunkBeamSearch(r, top_p=1.1), "top_p"),
        (lambda r: CARDS(r, reward_threshold=nan), "reward_threshold is nan"),
        (lambda r: CARDS(r, reward_threshold=inf), "reward_threshold is inf"),
        (lambda r: CARDS(r, reward_threshold=1.0, entropy_threshold=nan), "entropy_threshold is NaN"),
        (lambda r: CARDS(r, reward_threshold=1.0, alpha=1.5), "alpha is 1.5"),
        (lambda r: CARDS(r, reward_threshold=1.0, alpha=nan), "alpha is nan"),
        (lambda r: CARDS(r, reward_threshold=1.0, temperature=0.0), "temperature is 0.0"),
        (lambda r: CARDS(r, reward_threshold=1.0, max_segment=0), "max_segment is 0"),
        (lambda r: CARDS(r, reward_threshold=1.0, attempts=-1), "attempts is -1"),
        (lambda r: CARDS(r, reward_threshold=1.0, parallel=0), "parallel is 0"),
        (lambda r: CARDS(r, reward_threshold=1.0, acceptance="firm"), "acceptance is 'firm'"),
        (lambda r: RejectionSampling(r, reward_threshold=inf), "reward_threshold is inf"),
        (lambda r: RejectionSampling(r, reward_threshold=1.0, temperature=nan), "temperature"),
        (lambda r: BestOfN(r, samples=0), "samples is 0"),
        (lambda r: BestOfN(r, parallel=0), "parallel is 0"),
        (lambda r: BestOfN(r, temperature=inf), "temperature"),
        (lambda r: BestOfN(r, top_p=nan), "top_p"),
    ],
)
def test_impossible_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make(RuleReward(nothing))


def test_a_model_is_no_reward():
    with pytest.raises(TypeError, match=r"reward is a LlamaForSequenceClassification.*RewardModel"):
        ARGS(reward().model)
