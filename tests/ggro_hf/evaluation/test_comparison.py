"""Several methods on the same prompts: the figures against values computed from the generations themselves."""

import json

import pytest
import torch

from ggro_hf import GGRO, BestOfN, Greedy, RewardModel, Sample, generate
from ggro_hf.evaluation import compare, distinct_n, generation_record, summarize
from tests.ggro_hf.small_models import small_policy, small_reward, small_tokenizer

VOCABULARY = 300
PROMPTS = ["The sea", "Another thing", "And then"]
TOKENS = 12


@pytest.fixture(scope="module")
def models():
    tokenizer = small_tokenizer()
    policy = small_policy(seed=0, vocabulary=VOCABULARY, gain=2.0)
    guide, gold = (RewardModel(small_reward(seed=seed, vocabulary=VOCABULARY), tokenizer) for seed in (1, 2))
    return policy, tokenizer, guide, gold


def decoders(guide):
    return {
        "greedy": Greedy(),
        "sample": Sample(seed=3),
        "best-of-4": BestOfN(guide, samples=4, seed=3),
        "ggro": GGRO(guide, entropy_threshold=0.5, refinements=4, candidates=8),
    }


@pytest.fixture(scope="module")
def runs(models):
    policy, tokenizer, guide, gold = models
    return compare(
        policy,
        tokenizer,
        PROMPTS,
        decoders(guide),
        guide=guide,
        gold=gold,
        max_new_tokens=TOKENS,
        progress=False,
    )


def test_every_method_answers_as_it_does_alone(models, runs):
    policy, tokenizer, guide, gold = models
    for run, decoder in zip(runs, decoders(guide).values(), strict=True):
        alone = generate(policy, tokenizer, PROMPTS, decoder, max_new_tokens=TOKENS, progress=False)
        assert [generation.token_ids for generation in run.generations] == [one.token_ids for one in alone]
        for generation, reward, gold_reward in zip(run.generations, run.rewards, run.gold_rewards, strict=True):
            ids = torch.tensor([generation.prompt_ids + generation.token_ids])
            with torch.no_grad():
                assert reward == pytest.approx(float(guide.model(ids).logits), abs=1e-9)
                assert gold_reward == pytest.approx(float(gold.model(ids).logits), abs=1e-9)


def test_rows_have_the_same_names_and_the_figures_of_their_generations(runs):
    rows = [summarize(run, baseline=runs[0]) for run in runs]
    assert len({tuple(row) for row in rows}) == 1
    json.dumps(rows, allow_nan=False)
    for row, run in zip(rows, runs, strict=True):
        assert row["method"] == run.method
        assert row["reward_mean"] == pytest.approx(sum(run.rewards) / len(PROMPTS))
        low, high = row["reward_ci95"]
        assert min(run.rewards) <= low <= row["reward_mean"] <= high <= max(run.rewards)
        gain = sum(run.gold_rewards) / len(PROMPTS) - sum(runs[0].gold_rewards) / len(PROMPTS)
        assert row["gold_gain_mean"] == pytest.approx(gain, abs=1e-12)
        expected = [distinct_n(generation.token_ids, 2) for generation in run.generations]
        assert row["distinct_2"] == pytest.approx(sum(expected) / len(expected))
        tokens = sum(len(generation.token_ids) for generation in run.generations)
        assert row["tokens_per_second"] == pytest.approx(tokens / run.seconds)
        assert row["policy_tokens"] == sum(one.counters.policy_tokens for one in run.generations) / len(PROMPTS)
    assert rows[0]["reward_gain_mean"] == 0.0
    assert rows[0]["reward_gain_ci95"] == [0.0, 0.0]


def test_a_search_raises_the_guiding_reward_and_only_ggro_nudges(runs):
    rows = {run.method: summarize(run, baseline=runs[0]) for run in runs}
    assert rows["ggro"]["reward_mean"] >= rows["greedy"]["reward_mean"]
    assert rows["best-of-4"]["reward_mean"] >= rows["sample"]["reward_mean"]
    assert rows["ggro"]["nudges_mean"] > 0
    assert all(rows[method]["nudges_mean"] == 0 for method in ("greedy", "sample", "best-of-4"))


def test_a_record_is_json_and_tells_the_whole_trace(runs):
    for run in runs:
        for generation in run.generations:
            record = json.loads(json.dumps(generation_record(generation), allow_nan=False))
            assert record["token_ids"] == generation.token_ids
            assert record["nudges"] == generation.trace.nudges
            chosen = [segment["candidates"][segment["chosen_index"]] for segment in record["segments"]]
            if chosen:
                kept_ids = [token for candidate in chosen for token in candidate["token_ids"]]
                assert kept_ids == generation.token_ids
            for segment, kept in zip(record["segments"], generation.trace.segments, strict=True):
                for candidate, original in zip(segment["candidates"], kept.candidates, strict=True):
                    scores = [score for _, score in candidate["proposals"]]
                    assert scores == sorted(scores, reverse=True)
                    if original.proposals:
                        best = max(original.proposal_scores)
                        assert scores[0] == pytest.approx(best, rel=1e-3)
