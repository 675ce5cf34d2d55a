"""The baselines of guided search compute what they are said to: against greedy search and sampling that is obvious."""

import pytest
import torch

from benchmarks.baselines import args, best_of_n, cards, chunk_beam_search
from benchmarks.baselines.common import rewards_of
from tests.ggro_hf.small_models import small_policy, small_reward

VOCABULARY = 120
PROMPT = [5, 9, 33, 7, 12]
NEW_TOKENS = 14
LIKELIEST = {"temperature": 0.7, "top_k": 1}


@pytest.fixture(scope="module")
def models():
    policy = small_policy(seed=0, vocabulary=VOCABULARY, gain=2.0)
    policy.generation_config.eos_token_id = None
    return policy, small_reward(seed=1, vocabulary=VOCABULARY)


@pytest.fixture(scope="module")
def greedy(models):
    ids = torch.tensor([PROMPT])
    return models[0].generate(ids, do_sample=False, max_new_tokens=NEW_TOKENS)[0, len(PROMPT) :].tolist()


def run(method, models, **settings):
    return method.decode(*models, PROMPT, NEW_TOKENS, **settings)


@torch.no_grad()
def args_without_caches(models, weight, candidates):
    policy, reward = models
    sequence = list(PROMPT)
    for _ in range(NEW_TOKENS):
        values, tokens = policy(torch.tensor([sequence])).logits[0, -1].topk(candidates)
        rewards = torch.stack([reward(torch.tensor([[*sequence, token]])).logits[0, 0] for token in tokens.tolist()])
        sequence.append(int(tokens[(values + weight * rewards).argmax()]))
    return sequence[len(PROMPT) :]


@pytest.mark.parametrize("rows", [6, 3, 1])
def test_args(models, greedy, rows):
    guided = run(args, models, weight=4.0, candidates=6, rows=rows)
    assert guided == args_without_caches(models, 4.0, 6) != greedy
    assert run(args, models, weight=0.0, candidates=6, rows=rows) == greedy


def test_one_beam_of_the_likeliest_token_is_greedy(models, greedy):
    for chunk_length in (1, 5, 100):
        beam = {"width": 1, "successors": 1, "chunk_length": chunk_length}
        assert run(chunk_beam_search, models, **beam, **LIKELIEST, seed=0) == greedy


def test_every_way_of_sampling_whole_responses_finds_the_largest_reward(models):
    beams = {"width": 1, "successors": 12, "chunk_length": NEW_TOKENS, "temperature": 1.0, "top_k": 50}
    best = run(chunk_beam_search, models, **beams, seed=3)
    generator = torch.Generator().manual_seed(3)
    rows = torch.tensor([PROMPT] * 12)
    with torch.no_grad():
        for _ in range(NEW_TOKENS):
            logits = models[0](rows).logits[:, -1]
            kept = logits.masked_fill(logits < logits.topk(50).values[:, -1:], -torch.inf)
            rows = torch.cat([rows, torch.multinomial(kept.softmax(-1), 1, generator=generator)], dim=1)
        assert best == rows[rewards_of(models[1], rows).argmax(), len(PROMPT) :].tolist()


def test_the_best_of_n_has_the_largest_reward(models, greedy):
    assert run(best_of_n, models, samples=1, **LIKELIEST, seed=0) == greedy
    few, many = (run(best_of_n, models, samples=n, temperature=1.0, top_k=50, seed=0) for n in (1, 32))
    with torch.no_grad():
        rewards = rewards_of(models[1], torch.tensor([PROMPT + few, PROMPT + many]))
    assert rewards[1] > rewards[0]


def test_cards(models, greedy):
    segments = {"entropy_threshold": 2.0, "alpha": 0.5, "max_segment": 6}
    accepting = {"reward_threshold": -1e9, "attempts": 20, "seed": 0}
    tokens, candidates = run(cards, models, **accepting, **segments, **LIKELIEST)
    assert tokens == greedy and 3 <= candidates <= NEW_TOKENS
    refusing = {"reward_threshold": 1e9, "attempts": 3, "seed": 0}
    whole = {"entropy_threshold": float("inf"), "alpha": 1.0, "max_segment": NEW_TOKENS}
    tokens, candidates = run(cards, models, **refusing, **whole, temperature=1.0, top_k=50)
    assert len(tokens) == NEW_TOKENS and candidates == 4
