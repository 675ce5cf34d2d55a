"""The searches at their edges: tiny vocabularies and responses, odd sets of ends, large numbers, other dtypes."""

from functools import cache
from math import isfinite

import pytest
import torch

from ggro_hf import ARGS, CARDS, BestOfN, ChunkBeamSearch, Decoder, Greedy, RejectionSampling, RewardModel, Sample
from ggro_hf.decoding.base import Request
from ggro_hf.decoding.drawing import Warped
from tests.ggro_hf.rule_reward import RuleReward
from tests.ggro_hf.small_models import FAMILIES, PAD, small_policy, small_reward

PROMPT = [5, 9, 4, 7, 6]
SEARCHES = {
    "ARGS": lambda reward: ARGS(reward, candidates=5),
    "ARGS, drawn": lambda reward: ARGS(reward, candidates=5, mode="sample"),
    "CBS": lambda reward: ChunkBeamSearch(reward, width=2, successors=3, chunk_length=4),
    "TBS": lambda reward: ChunkBeamSearch(reward, width=2, successors=3, chunk_length=1, top_k=300),
    "CARDS": lambda reward: CARDS(reward, reward_threshold=1.0, entropy_threshold=1.0, attempts=3, max_segment=5),
    "rejection sampling": lambda reward: RejectionSampling(reward, reward_threshold=1.0, attempts=3, top_k=300),
    "best-of-N": lambda reward: BestOfN(reward, samples=3, top_k=300, top_p=0.9),
}
EVERY_SEARCH = pytest.mark.parametrize("name", SEARCHES)


@cache
def policy(vocabulary: int = 12, dtype: torch.dtype = torch.float64, family: str = "llama"):
    return small_policy(family, seed=1, vocabulary=vocabulary, gain=1.5, dtype=dtype)


@cache
def reward(vocabulary: int = 12, dtype: torch.dtype = torch.float64, family: str = "llama", **shape: int):
    return RewardModel(small_reward(family, seed=2, vocabulary=vocabulary, dtype=dtype, **shape))


def assert_sound(generation, scored: RewardModel, tolerance: float = 1e-9) -> None:
    """Every reward is that of a separate forward, the trace makes up the response, and the best stayed."""
    sequence = list(generation.prompt_ids)
    for segment in generation.trace.segments:
        for candidate in segment.candidates:
            plain = scored.score(sequence + list(candidate.token_ids))
            assert candidate.reward == pytest.approx(plain, abs=tolerance * max(1.0, abs(plain)))
        sequence += segment.chosen.token_ids
    assert sequence[len(generation.prompt_ids) :] == generation.token_ids
    assert len(generation.trace.entropies) == len(generation.token_ids)


@EVERY_SEARCH
@pytest.mark.parametrize("max_new_tokens", [1, 2, 6])
@pytest.mark.parametrize("prompt", [[4], PROMPT], ids=["one token", "five tokens"])
def test_fewer_tokens_in_the_vocabulary_than_top_k(name, max_new_tokens, prompt):
    generation = SEARCHES[name](reward()).respond(Request(policy(), prompt, max_new_tokens, frozenset()))
    assert len(generation.token_ids) == max_new_tokens
    assert_sound(generation, reward())


@EVERY_SEARCH
@pytest.mark.parametrize("eos_ids", [range(12), (2, 3, 5, 7)], ids=["all", "several"])
def test_ends_everywhere(name, eos_ids):
    generation = SEARCHES[name](reward()).respond(Request(policy(), PROMPT, 9, frozenset(eos_ids)))
    assert [token in eos_ids for token in generation.token_ids[:-1]] == [False] * (len(generation.token_ids) - 1)
    assert generation.finish_reason == ("eos" if generation.token_ids[-1] in eos_ids else "length")
    if len(eos_ids) == 12:
        assert len(generation.token_ids) == 1
    assert_sound(generation, reward())


@pytest.mark.parametrize("as_released", [False, True])
def test_released_args_goes_on_behind_an_end(as_released):
    decoder = ARGS(reward(), candidates=5, as_released=as_released)
    generation = decoder.respond(Request(policy(), PROMPT, 9, frozenset(range(12))))
    assert len(generation.token_ids) == (9 if as_released else 1)
    assert generation.finish_reason == ("length" if as_released else "eos")


@pytest.mark.parametrize("layers", [1, 4])
@EVERY_SEARCH
def test_a_reward_model_of_another_depth(name, layers):
    scored = reward(layers=layers)
    generation = SEARCHES[name](scored).respond(Request(policy(), PROMPT, 7, frozenset({3})))
    assert_sound(generation, scored)


@pytest.mark.parametrize("weight", [1e300, -1e300, 1e-300])
@pytest.mark.parametrize("mode", ["greedy", "sample"])
def test_huge_and_tiny_weights(weight, mode):
    decoder = ARGS(reward(), weight=weight, candidates=12, mode=mode)
    for segment in decoder.respond(Request(policy(), PROMPT, 5, frozenset())).trace.segments:
        rewards = [candidate.reward for candidate in segment.candidates]
        if weight > 1:
            assert segment.chosen.reward == max(rewards)
        elif weight < -1:
            assert segment.chosen.reward == min(rewards)
        elif mode == "greedy":
            assert segment.chosen_index == 0


def test_more_candidates_than_the_kernel_selects():
    model, scored = policy(400), reward(400)
    generation = ARGS(scored, candidates=400, weight=10.0).respond(Request(model, PROMPT, 3, frozenset()))
    for segment in generation.trace.segments:
        assert sorted(candidate.token_ids[0] for candidate in segment.candidates) == list(range(400))
        scores = [candidate.score for candidate in segment.candidates]
        assert segment.chosen.score == max(scores)
    assert_sound(generation, scored)
    with pytest.raises(ValueError, match="candidates is 401, but the policy's vocabulary has 400 tokens"):
        ARGS(scored, candidates=401).respond(Request(model, PROMPT, 3, frozenset()))


@pytest.mark.parametrize("top_k", [1, 3, 256, 257, 300, 400, 500])
def test_equal_logits_at_the_cut_leave_the_lowest_ids(top_k):
    """As many equal logits as coarse dtypes have."""
    logits = torch.randint(0, 8, (3, 400), generator=torch.Generator().manual_seed(0)).float()
    distribution = Warped(temperature=2.0, top_k=top_k).read(logits)
    for row, values in enumerate(logits.tolist()):
        wanted = sorted(range(400), key=lambda token: (-values[token], token))[:top_k]
        tokens = range(400) if distribution.tokens is None else distribution.tokens[row].tolist()
        kept = {
            token: share
            for token, share in zip(tokens, distribution.probabilities[row].tolist(), strict=True)
            if share > 0
        }
        assert sorted(kept) == sorted(wanted)
        weights = (logits[row, wanted] / 2.0).softmax(0).tolist()
        assert kept == pytest.approx(dict(zip(wanted, weights, strict=True)), abs=1e-6)


@pytest.mark.parametrize("top_k", [257, 300, None])
def test_a_wide_cut_draws_as_a_narrow_one(top_k):
    """Behind a cut that keeps everything likely lies nothing: draws are those of top-k 256, but for their order."""
    model = policy(400)
    model_logits = model(torch.tensor([PROMPT])).logits[0, -1]
    distribution = Warped(temperature=0.7, top_k=top_k).read(model_logits[None])
    place = distribution.probabilities[0].argmax()
    token = place.item() if distribution.tokens is None else distribution.tokens[0, place].item()
    assert token == model_logits.argmax().item()


@EVERY_SEARCH
@pytest.mark.parametrize("family", FAMILIES)
def test_bf16(name, family):
    """Rewards are near those of separate forwards, as near as the dtype allows."""
    model, scored = policy(300, torch.bfloat16, family), reward(300, torch.bfloat16, family)
    generation = SEARCHES[name](scored).respond(Request(model, PROMPT, 12, frozenset({3})))
    assert generation.token_ids and isfinite(generation.reward)
    assert_sound(generation, scored, tolerance=0.1)


def test_bf16_greedy_and_sampling():
    model = policy(300, torch.bfloat16)
    request = Request(model, PROMPT, 12, frozenset())
    assert len(Greedy().respond(request).token_ids) == 12
    assert len(Sample(top_k=300).respond(request).token_ids) == 12


@pytest.mark.parametrize("name", ["CBS", "TBS", "CARDS", "rejection sampling", "best-of-N"])
def test_numbers_at_the_ends_of_their_range(name, monkeypatch):
    """0, and the largest double below 1, lead to tokens that can be drawn."""
    import numpy as np

    decoder: Decoder = SEARCHES[name](RuleReward(lambda response: 0.0))
    for number in (0.0, np.nextafter(1.0, 0.0)):

        class Constant:
            def __init__(self, *args, **kwargs):
                pass

            def random(self, size=None, number=number):
                return number if size is None else np.full(size, number)

        for module in ("chunk_beam_search", "rejection", "best_of_n"):
            monkeypatch.setattr(f"ggro_hf.decoding.{module}.uniforms", Constant)
        generation = decoder.respond(Request(policy(), PROMPT, 4, frozenset()))
        assert len(generation.token_ids) == 4
        assert all(0 <= token < 12 for token in generation.token_ids)


@EVERY_SEARCH
def test_a_reward_model_with_fewer_tokens_than_the_policy(name):
    """Works for the tokens that it knows, and names the first that it does not."""
    with pytest.raises(ValueError, match=r"token \d+ is none of the 8 that the reward model has embeddings for"):
        SEARCHES[name](reward(8)).respond(Request(policy(), [4, 5], 9, frozenset()))
    with pytest.raises(ValueError, match="token 9 is none of the 8"):
        SEARCHES[name](reward(8)).respond(Request(policy(), [4, 9], 1, frozenset()))
    generation = SEARCHES[name](reward(12)).respond(Request(policy(8), [5, 4], 6, frozenset()))
    assert_sound(generation, reward(12))


@EVERY_SEARCH
def test_a_prompt_of_padding_alone(name):
    """Ids are ids: without a mask nothing is padding."""
    generation = SEARCHES[name](reward()).respond(Request(policy(), [PAD, PAD], 4, frozenset()))
    assert len(generation.token_ids) == 4
    assert_sound(generation, reward())
