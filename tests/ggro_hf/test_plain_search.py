"""Chunk-level beam search and CARDS against slow transcriptions, fed with the same random numbers, in fp64."""

from functools import cache
from math import inf

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from ggro_hf import CARDS, ChunkBeamSearch, Generation, RejectionSampling, RewardModel
from ggro_hf.decoding.base import Request
from tests.ggro_hf.plain_search import Found, PlainPolicy, plain_cards, plain_chunk_beam_search
from tests.ggro_hf.small_models import FAMILIES, PAD, SLIDING_WINDOW, small_policy, small_reward

VOCABULARY = 48
EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES)
SEEDS = range(12)


@cache
def policy(family: str) -> PreTrainedModel:
    return small_policy(family, seed=2, vocabulary=VOCABULARY, gain=2.0, hidden=16)


@cache
def reward(family: str) -> RewardModel:
    # Not the policy's family, and not its number of layers.
    other = FAMILIES[(FAMILIES.index(family) + 1) % len(FAMILIES)]
    return RewardModel(small_reward(other, seed=3, vocabulary=VOCABULARY, hidden=16, layers=3))


def plain_reward(family: str):
    model = reward(family).model

    @torch.no_grad()
    def rewarding(token_ids: list[int]) -> float:
        # The classifier's own pooling skips padding ids, which a response may well have.
        hidden = model.base_model(torch.tensor([token_ids]), use_cache=False).last_hidden_state
        return model.score(hidden[0, -1]).item()

    return rewarding


def assert_found(generation: Generation, found: Found) -> None:
    assert generation.token_ids == found.token_ids
    assert generation.reward == pytest.approx(found.reward, abs=1e-9)
    for segment, choice in zip(generation.trace.segments, found.choices, strict=True):
        assert [list(candidate.token_ids) for candidate in segment.candidates] == choice.candidates
        assert [candidate.reward for candidate in segment.candidates] == pytest.approx(choice.rewards, abs=1e-9)
        assert segment.chosen_index == choice.chosen


def drawn_case(seed: int) -> tuple[np.random.Generator, list[int], int, frozenset[int], int]:
    """A source of settings, a prompt, its response's length, the ids that end it, and a row."""
    random = np.random.default_rng(seed)
    prompt = random.integers(PAD + 1, VOCABULARY, random.choice([1, 4, 2 * SLIDING_WINDOW + 1])).tolist()
    eos_ids = frozenset(random.integers(0, VOCABULARY, random.choice([0, 2, 8])).tolist())
    return random, prompt, int(random.choice([1, 5, 11])), eos_ids, int(random.integers(0, 3))


@EVERY_FAMILY
def test_chunk_beam_search(family):
    lost = ended_early = rounds = 0
    for seed in SEEDS:
        random, prompt, max_new_tokens, eos_ids, row = drawn_case(seed)
        drawing = {
            "temperature": float(random.choice([0.7, 1.0, 1.6])),
            "top_k": None if random.random() < 0.3 else int(random.choice([1, 5, 20, 3 * VOCABULARY])),
            "top_p": None if random.random() < 0.5 else 0.8,
        }
        search = {
            "width": int(random.choice([1, 2, 4])),
            "successors": int(random.choice([1, 2, 3])),
            "chunk_length": int(random.choice([1, 2, 4, 30])),
            "seed": seed,
            "as_released": bool(random.random() < 0.3),
        }
        found = plain_chunk_beam_search(
            PlainPolicy(policy(family), **drawing),
            plain_reward(family),
            prompt,
            max_new_tokens=max_new_tokens,
            eos_ids=eos_ids,
            row=row,
            **search,
        )
        request = Request(policy(family), prompt, max_new_tokens, eos_ids, row)
        assert_found(ChunkBeamSearch(reward(family), **drawing, **search).respond(request), found)
        lost += any(choice.chosen for choice in found.choices)
        ended_early += len(found.token_ids) < max_new_tokens
        rounds += len(found.choices)
    assert lost >= 3 and ended_early >= 1 and rounds > 2 * len(SEEDS)


@EVERY_FAMILY
def test_cards(family):
    rejected = exhausted = stopped = 0
    for seed in SEEDS:
        random, prompt, max_new_tokens, eos_ids, row = drawn_case(seed)
        temperature = float(random.choice([0.7, 1.3]))
        top_k = None if random.random() < 0.3 else int(random.choice([3, 20]))
        search = {
            "reward_threshold": float(random.choice([-1.0, 0.5, 3.0])),
            "entropy_threshold": float(random.choice([0.5, 1.5, 2.5, inf])),
            "alpha": float(random.choice([0.0, 0.5, 1.0])),
            "max_segment": int(random.choice([1, 5, 64])),
            "attempts": int(random.choice([0, 1, 4])),
            "seed": seed,
        }
        hard = bool(random.random() < 0.3)
        found = plain_cards(
            PlainPolicy(policy(family), temperature, top_k),
            plain_reward(family),
            prompt,
            max_new_tokens=max_new_tokens,
            eos_ids=eos_ids,
            hard=hard,
            row=row,
            **search,
        )
        decoder = CARDS(
            reward(family),
            temperature=temperature,
            top_k=top_k,
            acceptance="hard" if hard else "soft",
            parallel=int(random.integers(1, 4)),
            **search,
        )
        assert_found(decoder.respond(Request(policy(family), prompt, max_new_tokens, eos_ids, row)), found)
        lengths = [len(choice.candidates) for choice in found.choices]
        rejected += sum(length > 1 for length in lengths)
        exhausted += sum(length == search["attempts"] + 1 > 1 for length in lengths)
        stopped += sum(
            4 <= len(choice.candidates[choice.chosen]) < search["max_segment"] for choice in found.choices[:-1]
        )
    assert rejected >= 3 and exhausted >= 1 and stopped >= 1


@EVERY_FAMILY
def test_rejection_sampling_is_cards_in_one_segment_with_one_threshold(family):
    for seed in SEEDS:
        _, prompt, max_new_tokens, eos_ids, row = drawn_case(seed)
        found = plain_cards(
            PlainPolicy(policy(family), 0.9, 30),
            plain_reward(family),
            prompt,
            max_new_tokens=max_new_tokens,
            eos_ids=eos_ids,
            reward_threshold=1.0,
            entropy_threshold=inf,
            alpha=1.0,
            max_segment=max_new_tokens,
            attempts=3,
            hard=False,
            seed=seed,
            row=row,
        )
        decoder = RejectionSampling(
            reward(family), reward_threshold=1.0, temperature=0.9, top_k=30, attempts=3, parallel=2, seed=seed
        )
        assert_found(decoder.respond(Request(policy(family), prompt, max_new_tokens, eos_ids, row)), found)
