"""Theorem 1 of the SP-PRM paper: a score-consistent reward leads every granularity to the best response.

Consistent means that the order of two responses' rewards is that of their prefixes at every length. The toy has so few
responses that all can be looked at.
"""

from itertools import pairwise, product

import numpy as np
import pytest
import torch

from ggro_hf import ARGS, BestOfN, ChunkBeamSearch
from ggro_hf.decoding.base import Request
from tests.ggro_hf.rule_reward import RuleReward
from tests.ggro_hf.small_models import scripted_policy

VOCABULARY, LENGTH, PROMPT = 4, 4, [2]
RESPONSES = list(product(range(VOCABULARY), repeat=LENGTH))
# Draws so many that all continuations are among them but for odds of one in a million.
SEARCHES = {
    "ARGS": lambda reward: ARGS(reward, weight=1e6, candidates=VOCABULARY),
    "ARGS, drawn": lambda reward: ARGS(reward, weight=1e6, candidates=VOCABULARY, mode="sample"),
    "TBS, one beam": lambda reward: ChunkBeamSearch(reward, width=1, successors=120, chunk_length=1),
    "TBS": lambda reward: ChunkBeamSearch(reward, width=3, successors=120, chunk_length=1),
    "CBS": lambda reward: ChunkBeamSearch(reward, width=2, successors=500, chunk_length=2),
    "CBS, uneven chunks": lambda reward: ChunkBeamSearch(reward, width=1, successors=2500, chunk_length=3),
    "best-of-N": lambda reward: BestOfN(reward, samples=12_000),
}


@pytest.fixture(scope="module")
def policy():
    # Never far from uniform.
    return scripted_policy(0.2 * torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(1)))


def consistent_rewards(seed: int) -> dict[tuple[int, ...], float]:
    """Of all prefixes: every node has its children in a random order; no later token outweighs an earlier one."""
    random = np.random.default_rng(seed)
    rewards = {(): 0.0}
    for length in range(1, LENGTH + 1):
        for prefix in product(range(VOCABULARY), repeat=length - 1):
            ranks = random.permutation(VOCABULARY)
            for token in range(VOCABULARY):
                rewards[(*prefix, token)] = rewards[prefix] + float(ranks[token]) * 10.0**-length
    return rewards


def inconsistent_rewards(seed: int) -> dict[tuple[int, ...], float]:
    """The same for whole responses; of two prefixes the one that leads to less is preferred."""
    consistent = consistent_rewards(seed)
    return {prefix: reward if len(prefix) == LENGTH else -reward for prefix, reward in consistent.items()}


def is_consistent(rewards: dict[tuple[int, ...], float]) -> bool:
    ordered = sorted(RESPONSES, key=rewards.__getitem__)
    return all(
        rewards[worse[:length]] <= rewards[better[:length]]
        for worse, better in pairwise(ordered)
        for length in range(1, LENGTH)
    )


@pytest.mark.parametrize("name", SEARCHES)
def test_every_granularity_reaches_the_optimum(policy, name):
    for seed in range(3):
        rewards = consistent_rewards(seed)
        assert is_consistent(rewards)
        best = max(RESPONSES, key=rewards.__getitem__)
        request = Request(policy, PROMPT, LENGTH, frozenset(), seed)
        generation = SEARCHES[name](RuleReward(rewards.__getitem__)).respond(request)
        assert tuple(generation.token_ids) == best
        assert generation.reward == rewards[best]


@pytest.mark.parametrize("name", SEARCHES)
def test_without_consistency_only_whole_responses_do(policy, name):
    rewards = inconsistent_rewards(0)
    assert not is_consistent(rewards)
    best = max(RESPONSES, key=rewards.__getitem__)
    generation = SEARCHES[name](RuleReward(rewards.__getitem__)).respond(Request(policy, PROMPT, LENGTH, frozenset()))
    assert (tuple(generation.token_ids) == best) == (name == "best-of-N")
