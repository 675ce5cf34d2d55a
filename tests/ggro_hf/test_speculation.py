"""Candidates decoded before they are asked for: the response is that of one candidate after the other."""

import dataclasses
import math

import pytest
import torch

from ggro_hf import GGRO, RewardModel
from ggro_hf.decoding.base import Request
from ggro_hf.decoding.speculation import ChainStatistics, Costs, Plan, Speculation
from ggro_hf.policy_lanes import takes_lanes
from ggro_hf.results import Generation
from ggro_hf.rewards import RewardPrefix
from tests.ggro_hf.batches import watching_steps
from tests.ggro_hf.device_cases import assert_same
from tests.ggro_hf.small_models import small_policy, small_reward, small_tokenizer

VOCABULARY, NEW_TOKENS = 300, 24
PROMPT = [72, 105, 84, 121, 110]
FAMILIES = ("llama", "qwen3", "gemma3", "mistral")


def models(family="llama", seed=0):
    policy = small_policy(family, seed=seed, vocabulary=VOCABULARY, gain=2.0, dtype=torch.float32)
    reward = small_reward(family, seed=seed + 1, vocabulary=VOCABULARY, dtype=torch.float32)
    return policy, RewardModel(reward, small_tokenizer())


def respond(policy, reward, **settings) -> Generation:
    decoder = GGRO(reward, **{"entropy_threshold": 1.0, "candidates": 9} | settings)
    return decoder.respond(Request(policy, PROMPT, NEW_TOKENS, frozenset([7])))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("refinements", [3, 8])
def test_the_response_does_not_depend_on_what_is_decoded_ahead(family, refinements):
    policy, reward = models(family)
    assert takes_lanes(policy) and reward.passes is not None
    expected = respond(policy, reward, speculate=1, refinements=refinements)
    assert max(len(segment.candidates) for segment in expected.trace.segments) > 2
    for speculate in (2, 3, 9, 40, None):
        assert_same(respond(policy, reward, speculate=speculate, refinements=refinements), expected, 1e-5)


def test_the_same_where_the_state_is_text():
    policy, reward = models(seed=4)
    settings = {"as_released": True, "tokenizer": small_tokenizer(), "refinements": 5}
    assert_same(
        respond(policy, reward, speculate=6, **settings), respond(policy, reward, speculate=1, **settings), 1e-5
    )


def test_every_link_is_a_hit_or_a_miss_and_the_rest_is_waste():
    policy, reward = models()
    alone, ahead = (respond(policy, reward, speculate=speculate).counters for speculate in (1, 9))
    assert alone.speculation_hits == alone.wasted_policy_tokens == alone.wasted_reward_tokens == 0
    assert ahead.speculation_hits > 0 and ahead.wasted_policy_tokens > 0
    assert ahead.speculation_hits + ahead.speculation_misses == alone.speculation_misses
    assert ahead.policy_tokens - ahead.wasted_policy_tokens == alone.policy_tokens
    assert ahead.reward_forward_tokens - ahead.wasted_reward_tokens == alone.reward_forward_tokens


def test_all_candidates_at_once_miss_once_a_segment():
    policy, reward = models()
    generation = respond(policy, reward, speculate=9)
    nudged = sum(len(segment.candidates) > 1 for segment in generation.trace.segments)
    assert generation.counters.speculation_misses == nudged


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_decoded_ahead_takes_no_steps_of_its_own(family):
    policy, reward = models(family)
    assert takes_lanes(policy)
    alone = respond(policy, reward, speculate=1).counters.policy_tokens - len(PROMPT)
    for speculate in (2, 3, 9):
        with watching_steps() as served:
            generation = respond(policy, reward, speculate=speculate)
        assert generation.counters.speculation_hits > 0
        # Those that are looked up save some.
        assert 0 < len(served) < alone


def test_a_candidate_that_nobody_asks_for_may_be_nan():
    policy, reward = models(seed=2)
    expected = respond(policy, reward, speculate=1)
    asked = {token for segment in expected.trace.segments for c in segment.candidates for token in c.token_ids}
    proposed = {token for segment in expected.trace.segments for c in segment.candidates for token in c.proposals}
    with torch.no_grad():
        policy.get_input_embeddings().weight[sorted(proposed - asked)] = torch.nan
    actual = respond(policy, reward, speculate=9)
    assert_same(actual, expected, 1e-5)


def test_one_that_is_asked_for_fails_as_it_does_alone():
    policy, reward = models(seed=2)
    segment = respond(policy, reward, speculate=1).trace.segments[0]
    with torch.no_grad():
        policy.get_input_embeddings().weight[segment.candidates[2].token_ids[0]] = torch.nan
    for speculate in (1, 9):
        with pytest.raises(FloatingPointError, match="the policy's logits hold NaN"):
            respond(policy, reward, speculate=speculate)


def test_without_lanes_it_is_one_after_the_other(monkeypatch):
    policy, reward = models()
    expected = respond(policy, reward, speculate=1)
    monkeypatch.setattr("ggro_hf.decoding.batch.takes_lanes", lambda model: False)
    generation = respond(policy, reward, speculate=9)
    assert_same(generation, expected, 1e-5)
    assert generation.counters.speculation_hits == 0


@pytest.mark.parametrize("speculate", [0, -1])
def test_a_number_below_one_is_refused(speculate):
    _, reward = models()
    with pytest.raises(ValueError, match=f"speculate is {speculate}, but must be at least 1"):
        GGRO(reward, speculate=speculate)


def speculation(costs: Costs) -> Speculation:
    """One whose costs are given."""
    _, reward = models()
    made = Speculation(_Lane(), RewardPrefix(reward, None), None)
    made._costs, made._most = costs, 8
    return made


class _Lane:
    rows = 8


def test_the_plan_follows_the_costs():
    flat = Costs(((1, 1.0), (8, 1.0)), ((4, 1.0), (32, 1.0)))
    steep = Costs(((1, 1.0), (8, 8.0)), ((4, 1.0), (32, 8.0)))
    # The policy gets rows for nothing, the reward does not.
    mixed = dataclasses.replace(steep, steps=flat.steps)
    assert speculation(flat).plan(4) == Plan(8, scores_ahead=True)
    assert speculation(steep).plan(4) == Plan(1, scores_ahead=False)
    assert speculation(mixed).plan(4) == Plan(8, scores_ahead=False)


def test_chains_are_learned_from():
    statistics = ChainStatistics()
    before, links = statistics.asked(2), statistics.links
    for _ in range(1000):
        statistics.add_chain()
        for _ in range(3):
            statistics.add_link(1)
    assert statistics.asked(2) > 0.9 > before
    assert statistics.links == pytest.approx(3, abs=0.1) and links < 2
    for _ in range(100_000):
        statistics.add_link(20)
    assert statistics.asked(8) < 0.1
    assert not math.isnan(statistics.asked(1))
