"""The same decoding on two devices: models, decoders, and whether two generations agree."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from transformers import PreTrainedModel

from ggro_hf import (
    ARGS,
    CARDS,
    GGRO,
    BestOfN,
    ChunkBeamSearch,
    Decoder,
    ExhaustiveSearch,
    Greedy,
    RejectionSampling,
    RewardModel,
    Sample,
)
from ggro_hf.decoding.base import Request
from ggro_hf.reading import Reader
from ggro_hf.results import Candidate, Generation
from tests.ggro_hf.small_models import END_OF_TURN, small_policy, small_reward, small_tokenizer

VOCABULARY, NEW_TOKENS = 300, 12
PROMPT = [72, 105, 84, 121, 110]
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Logits(Reader[torch.Tensor]):
    """Reads all of them."""

    def on_device(self, logits: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return logits.argmax()[None], logits

    def on_host(self, *tensors: torch.Tensor) -> torch.Tensor:
        return tensors[1]


def policy_on(device: torch.device, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The same policy wherever it is."""
    return small_policy(seed=0, vocabulary=VOCABULARY, gain=2.0, dtype=dtype).to(device)


def reward_on(device: torch.device, dtype: torch.dtype = torch.float32) -> RewardModel:
    """The same reward model wherever it is."""
    return RewardModel(small_reward(seed=1, vocabulary=VOCABULARY, dtype=dtype).to(device), small_tokenizer())


_SEARCH = {"entropy_threshold": 1.0, "refinements": 4, "candidates": 5}

DECODERS: dict[str, Callable[[RewardModel], Decoder]] = {
    "greedy": lambda reward: Greedy(),
    "sample": lambda reward: Sample(seed=3, temperature=1.5, top_k=40, top_p=0.9),
    "best-of-n": lambda reward: BestOfN(reward, samples=3, seed=3),
    "rejection-sampling": lambda reward: RejectionSampling(reward, reward_threshold=1.0, attempts=3, parallel=2),
    "cards": lambda reward: CARDS(reward, reward_threshold=1.0, entropy_threshold=1.5, attempts=3, parallel=2),
    "args": lambda reward: ARGS(reward, candidates=5),
    "args, drawn": lambda reward: ARGS(reward, candidates=5, mode="sample"),
    "cbs": lambda reward: ChunkBeamSearch(reward, width=3, successors=2, chunk_length=4),
    "tbs": lambda reward: ChunkBeamSearch(reward, width=3, successors=2, chunk_length=1, top_k=None),
    "exhaustive": lambda reward: ExhaustiveSearch(reward, candidates=5, entropy_threshold=1.0),
    "exhaustive, pruned": lambda reward: ExhaustiveSearch(reward, candidates=5, prune=2, entropy_threshold=1.0),
    "ggro": lambda reward: GGRO(reward, **_SEARCH),
    "ggro, runs of tokens": lambda reward: GGRO(reward, nudge_tokens=3, perplexity_ratio=2.0, **_SEARCH),
    # More than the kernel selects.
    "ggro, all candidates": lambda reward: GGRO(reward, **_SEARCH | {"candidates": VOCABULARY}),
    "ggro, as released": lambda reward: GGRO(reward, tokenizer=small_tokenizer(), as_released=True, **_SEARCH),
}
"""Every method, GGRO in all its ways to read a position."""


def request(policy: PreTrainedModel, name: str = "") -> Request:
    """The prompt, and how long the response of that method is to be."""
    # Text grows when it is tokenised again, so released behaviour ends early.
    tokens = 4 * NEW_TOKENS if "released" in name else NEW_TOKENS
    return Request(policy, list(PROMPT), tokens, frozenset([END_OF_TURN]))


def assert_same(actual: Generation, expected: Generation, tolerance: float) -> None:
    """The same tokens and choices; entropies, rewards and scores to an absolute tolerance."""
    assert actual.token_ids == expected.token_ids
    assert actual.finish_reason == expected.finish_reason
    assert actual.trace.entropies == pytest.approx(expected.trace.entropies, abs=tolerance)
    assert actual.reward == pytest.approx(expected.reward, abs=tolerance)
    for segment, wanted in zip(actual.trace.segments, expected.trace.segments, strict=True):
        assert segment.chosen_index == wanted.chosen_index
        for candidate, other in zip(segment.candidates, wanted.candidates, strict=True):
            assert candidate.token_ids == other.token_ids
            assert candidate.forced_tokens == other.forced_tokens
            assert candidate.boundary_token == other.boundary_token
            assert candidate.reward == pytest.approx(other.reward, abs=tolerance)
            assert _scores(candidate) == pytest.approx(_scores(other), abs=tolerance)


def _scores(candidate: Candidate) -> dict[int, float]:
    """By token: the order of two that are equally likely but for rounding may differ."""
    return dict(zip(candidate.proposals, candidate.proposal_scores, strict=True))
