"""Every supported architecture, sliding-window layers included, against HuggingFace and against the transcription."""

from functools import cache
from math import inf

import pytest
import torch
from transformers import PreTrainedModel

from ggro_hf import GGRO, Greedy, RewardModel
from tests.ggro_hf.agreement import Tolerance, assert_agreement, duplicates
from tests.ggro_hf.released import ReleasedGGRO, Result, Settings
from tests.ggro_hf.small_models import END_OF_TURN, FAMILIES, PAD, SLIDING_WINDOW, small_policy, small_reward

VOCABULARY = 97
PROMPT_LENGTH, NEW_TOKENS = 2 * SLIDING_WINDOW + 3, 3 * SLIDING_WINDOW
SEEDS = (1, 2, 3)
# Families differ in how peaked a random model is.
GAIN = {"llama": 3.0, "qwen3": 3.0, "gemma3": 4.0, "mistral": 3.0}
EXACT = Tolerance(reward=1e-10, entropy=1e-9, score=1e-9)

EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES)


@cache
def policy(family: str, seed: int, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    return small_policy(family, seed=seed, vocabulary=VOCABULARY, gain=GAIN[family], dtype=dtype)


@cache
def reward(family: str, seed: int, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    # The reward model may have more rows than the policy: a padding token, say.
    return small_reward(family, seed=seed, vocabulary=VOCABULARY + seed % 2, hidden=16, dtype=dtype)


def prompts(seed: int, rows: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(PAD + 1, VOCABULARY, (rows, PROMPT_LENGTH), generator=generator)


def greedy_of_transformers(model: PreTrainedModel, ids: torch.Tensor) -> list[list[int]]:
    """Generated ids of each row, without padding."""
    rows = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False)[:, ids.shape[1] :].tolist()
    return [row[: row.index(END_OF_TURN) + 1] if END_OF_TURN in row else row for row in rows]


def test_the_models_have_the_layers_that_they_are_meant_to_have():
    assert policy("mistral", 1).config.sliding_window == SLIDING_WINDOW
    for family in ("qwen3", "gemma3"):
        for model in (policy(family, 1), reward(family, 1)):
            assert set(model.config.layer_types) == {"sliding_attention", "full_attention"}
            assert model.config.sliding_window == SLIDING_WINDOW


@EVERY_FAMILY
def test_the_window_matters(family):
    """A token that left the window of every sliding layer changes a purely sliding model's answer no more."""
    model = policy(family, 1)
    ids = prompts(1)
    changed = ids.clone()
    changed[0, 0] = (ids[0, 0] - PAD) % (VOCABULARY - PAD - 1) + PAD + 1
    difference = (model(ids).logits[0, -1] - model(changed).logits[0, -1]).abs().max()
    assert (difference == 0) == (family == "mistral")


@EVERY_FAMILY
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
def test_greedy_equals_generate(family, seed, dtype):
    model, ids = policy(family, seed, dtype), prompts(seed, rows=2)
    output = Greedy()(model, ids, max_new_tokens=NEW_TOKENS)
    assert [generation.token_ids for generation in output.generations] == greedy_of_transformers(model, ids)
    through_generate = model.generate(ids, custom_generate=Greedy(), max_new_tokens=NEW_TOKENS)
    assert torch.equal(through_generate, output.sequences)


@EVERY_FAMILY
@pytest.mark.parametrize("seed", SEEDS)
def test_an_infinite_threshold_without_refinement_equals_generate(family, seed):
    model, ids = policy(family, seed), prompts(seed)
    decoder = GGRO(RewardModel(reward(family, seed)), entropy_threshold=inf, refinements=1)
    (generation,) = decoder(model, ids, max_new_tokens=NEW_TOKENS).generations
    assert [generation.token_ids] == greedy_of_transformers(model, ids)
    assert generation.trace.nudges == 0 and len(generation.trace.segments) == 1


def transcribed(family: str, seed: int, threshold: float) -> Result:
    settings = Settings(
        max_new_tokens=NEW_TOKENS,
        entropy_threshold=threshold,
        refinements=6,
        candidates=10,
        stop_ids=frozenset({END_OF_TURN}),
        finish_ids=frozenset({END_OF_TURN}),
        state="ids",
        insertion_offset=0,
        probability_floor=0.0,
        forcing="id",
    )
    return ReleasedGGRO(policy(family, seed), reward(family, seed), None, settings)(prompts(seed)[0].tolist())


@EVERY_FAMILY
def test_ggro_equals_the_transcription(family):
    results = []
    for seed in SEEDS:
        for threshold in (0.7, 2.0, inf):
            expected = transcribed(family, seed, threshold)
            decoder = GGRO(RewardModel(reward(family, seed)), entropy_threshold=threshold, refinements=6, candidates=10)
            output = decoder(policy(family, seed), prompts(seed), max_new_tokens=NEW_TOKENS)
            (generation,) = output.generations
            assert output.sequences[0].tolist() == expected.ids
            assert generation.prompt_ids + generation.token_ids == expected.ids
            assert_agreement(generation, expected, EXACT)
            results.append(expected)
    assert sum(result.nudges for result in results) >= 10
    assert duplicates(results) >= 3
    assert sum(len(result.segments) > 2 for result in results) >= 3


@EVERY_FAMILY
@pytest.mark.parametrize("seed", SEEDS)
def test_score_equals_the_classifiers_forward(family, seed):
    model = reward(family, seed)
    scored = RewardModel(model)
    for length in (1, 2, SLIDING_WINDOW, SLIDING_WINDOW + 1, PROMPT_LENGTH):
        ids = prompts(seed)[:, :length]
        assert scored.score(ids[0].tolist()) == pytest.approx(model(ids).logits[0, 0].item(), abs=1e-12)
