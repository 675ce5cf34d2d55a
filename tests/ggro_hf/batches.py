"""Models, prompts and decoders for several responses at once, and whether one equals its single run."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    OPTForSequenceClassification,
    PreTrainedModel,
)

from ggro_hf import GGRO, RewardModel
from ggro_hf.decoding.base import Request
from ggro_hf.policy_lanes import PolicyLanes, takes_lanes
from ggro_hf.results import Generation
from tests.ggro_hf.small_models import END_OF_TURN, FAMILIES, PAD, small_policy, small_reward

VOCABULARY = 97
LENGTHS = (1, 200, 3, 17, 64, 2, 40, 9)
NEW_TOKENS = (20, 12, 1, 30, 12, 40, 16, 24)
EOS = frozenset({END_OF_TURN, 20, 30, 40, 50})

_SHAPE = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "bos_token_id": 0, "eos_token_id": END_OF_TURN}
_GPT2 = _SHAPE | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512, "initializer_range": 0.2}
_OPT = _SHAPE | {
    "hidden_size": 32,
    "word_embed_proj_dim": 32,
    "ffn_dim": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "init_std": 0.2,
}
OTHERS: dict[str, Callable[[], PreTrainedModel]] = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**_GPT2)),
    "opt": lambda: OPTForCausalLM(OPTConfig(**_OPT)),
    "bloom": lambda: BloomForCausalLM(
        BloomConfig(**_SHAPE, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.2)
    ),
    "gpt_oss": lambda: GptOssForCausalLM(
        GptOssConfig(
            **_SHAPE,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            num_local_experts=2,
            num_experts_per_tok=1,
            max_position_embeddings=512,
            initializer_range=0.2,
        )
    ),
}
_REWARDS: dict[str, Callable[[], PreTrainedModel]] = {
    "gpt2": lambda: GPT2ForSequenceClassification(GPT2Config(**_GPT2, num_labels=1)),
    "opt": lambda: OPTForSequenceClassification(OPTConfig(**_OPT, num_labels=1)),
}


def _seeded(make: Callable[[], PreTrainedModel], seed: int) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make().eval().requires_grad_(False)


def new_policy(family: str = "llama", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A policy that nobody else has."""
    if family in FAMILIES:
        return small_policy(family, seed=1, vocabulary=VOCABULARY, gain=3.0, dtype=dtype)
    return _seeded(OTHERS[family], 1).to(dtype)


def new_reward(family: str = "llama", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A reward model that nobody else has."""
    if family in FAMILIES:
        return small_reward(family, seed=2, vocabulary=VOCABULARY, dtype=dtype)
    return _seeded(_REWARDS[family], 2).to(dtype)


@cache
def policy(family: str = "llama", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The policy of a family."""
    model = new_policy(family, dtype)
    # Now, so that nobody takes the check for steps of a response.
    takes_lanes(model)
    return model


@cache
def reward(family: str = "llama", dtype: torch.dtype = torch.float32) -> RewardModel:
    """The reward model of a family."""
    return RewardModel(new_reward(family, dtype))


def decoder(scored: RewardModel | None = None, **options: object) -> GGRO:
    """GGRO with segments of a few tokens, without candidates decoded ahead: they would count."""
    settings = {"speculate": 1, "entropy_threshold": 1.0, "refinements": 4, "candidates": 8} | options
    return GGRO(reward() if scored is None else scored, **settings)


def prompts(*lengths: int) -> list[list[int]]:
    """Random prompts of these lengths, without special tokens."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(PAD + 1, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


def requests(model: PreTrainedModel | None = None, rows: int = len(LENGTHS)) -> list[Request]:
    """Prompts of very different lengths, with different room for the response."""
    model = policy() if model is None else model
    return [
        Request(model, prompt, new_tokens, EOS, row)
        for row, (prompt, new_tokens) in enumerate(zip(prompts(*LENGTHS), NEW_TOKENS, strict=True))
    ][:rows]


@contextmanager
def watching_steps() -> Iterator[list[int]]:
    """How many lanes each step serves."""
    served: list[int] = []
    plain = PolicyLanes.step
    # Its trial would be counted.
    takes_lanes(policy())

    def step(self, works):
        served.append(len(works))
        return plain(self, works)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PolicyLanes, "step", step)
        yield served


def assert_equal(batch: Generation, single: Generation, tolerance: float = 1e-5) -> None:
    """The same tokens, choices and counters of tokens; entropies, rewards and scores to an absolute tolerance."""
    assert batch.prompt_ids == single.prompt_ids
    assert batch.token_ids == single.token_ids
    assert batch.finish_reason == single.finish_reason
    assert (batch.prompt, batch.text) == (single.prompt, single.text)
    assert batch.reward == pytest.approx(single.reward, abs=tolerance, rel=0)
    for name in ("policy_tokens", "reward_forward_tokens", "reward_backward_tokens"):
        assert getattr(batch.counters, name) == getattr(single.counters, name), name
    assert batch.counters.seconds.keys() == single.counters.seconds.keys()
    assert batch.counters.peak_bytes > 0
    assert batch.trace.entropies == pytest.approx(single.trace.entropies, abs=tolerance, rel=0)
    for segment, expected in zip(batch.trace.segments, single.trace.segments, strict=True):
        assert (segment.start, segment.insertion_offset) == (expected.start, expected.insertion_offset)
        assert segment.chosen_index == expected.chosen_index
        for candidate, other in zip(segment.candidates, expected.candidates, strict=True):
            assert candidate.token_ids == other.token_ids
            assert candidate.forced_tokens == other.forced_tokens
            assert candidate.finished == other.finished
            assert candidate.boundary_token == other.boundary_token
            assert candidate.proposals == other.proposals
            if other.boundary_entropy is not None:
                assert candidate.boundary_entropy == pytest.approx(other.boundary_entropy, abs=tolerance, rel=0)
            for name in ("entropies", "reward", "proposal_scores"):
                assert getattr(candidate, name) == pytest.approx(getattr(other, name), abs=tolerance, rel=0), name


def assert_all_equal(batch: list[Generation], single: list[Generation], tolerance: float = 1e-5) -> None:
    """`assert_equal` of every row, in order."""
    assert len(batch) == len(single)
    for one, expected in zip(batch, single, strict=True):
        assert_equal(one, expected, tolerance)


def outcomes(responses: Iterator[Generation]) -> list[Generation | Exception]:
    """Every response, or what was raised in its turn."""
    found: list[Generation | Exception] = []
    while True:
        try:
            found.append(next(responses))
        except StopIteration:
            return found
        except Exception as error:
            found.append(error)
