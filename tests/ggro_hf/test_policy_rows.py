"""Rows that share a prefix against separate forwards of the plain model."""

from functools import cache

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from ggro_hf import policy_rows
from ggro_hf.cache import Branch
from ggro_hf.decoding.drafts import DraftRules, continue_from, draw_drafts
from ggro_hf.decoding.drawing import Warped, uniforms
from ggro_hf.policy import Policy
from ggro_hf.results import Counters
from tests.ggro_hf.device_cases import Logits
from tests.ggro_hf.small_models import FAMILIES, SLIDING_WINDOW, small_policy

VOCABULARY = 61
EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES)
EITHER_WAY = pytest.mark.parametrize("shares", [True, False], ids=["shared", "joined"])


@cache
def policy_model(family: str = "llama", dtype: torch.dtype = torch.float64, **shape: int) -> PreTrainedModel:
    return small_policy(family, seed=6, vocabulary=VOCABULARY, dtype=dtype, **shape)


@torch.no_grad()
def plain_logits(model: PreTrainedModel, token_ids: list[int]) -> torch.Tensor:
    """Logits [V] after a sequence, from one forward without a cache."""
    return model(input_ids=torch.tensor([token_ids]), use_cache=False).logits[0, -1]


def assert_rows(logits: torch.Tensor, model: PreTrainedModel, sequences: list[list[int]]) -> None:
    expected = torch.stack([plain_logits(model, sequence) for sequence in sequences])
    tolerance = 1e-9 if model.dtype is torch.float64 else 5e-6
    torch.testing.assert_close(logits, expected, rtol=0, atol=tolerance * max(1.0, expected.abs().max().item()))


def open_policy(model: PreTrainedModel, prompt: list[int], counters: Counters) -> Policy[torch.Tensor]:
    policy = Policy(model, counters, Logits())
    policy.extend(list(prompt))
    return policy


@EVERY_FAMILY
@EITHER_WAY
@pytest.mark.parametrize("prompt_length", [1, 5, 2 * SLIDING_WINDOW + 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
def test_rows_that_fork_and_end_equal_separate_forwards(family, shares, prompt_length, dtype, monkeypatch):
    model = policy_model(family, dtype)
    monkeypatch.setitem(policy_rows._shares, model, shares)
    random = np.random.default_rng(prompt_length)
    prompt = random.integers(0, VOCABULARY, prompt_length).tolist()
    counters = Counters()
    policy = open_policy(model, prompt, counters)
    rows, sequences, counted = policy.fork(3), [prompt] * 3, prompt_length
    for _ in range(SLIDING_WINDOW + 4):
        if random.random() < 0.6:
            chosen = random.integers(0, len(sequences), random.integers(1, 6)).tolist()
            rows.select(chosen)
            sequences = [sequences[row] for row in chosen]
        tokens = random.integers(0, VOCABULARY, len(sequences)).tolist()
        sequences = [[*sequence, token] for sequence, token in zip(sequences, tokens, strict=True)]
        logits = rows.extend(tokens)
        counted += len(tokens)
        assert_rows(logits, model, sequences)
    assert counters.policy_tokens == counted
    # The policy stayed where it was, and can go on from any row.
    row = int(random.integers(len(sequences)))
    policy.restore(Branch(sequences[row][prompt_length:], rows.read(row)))
    assert_rows(policy.extend([7])[None], model, [[*sequences[row], 7]])
    assert_rows(policy.move_to([*prompt, 9])[None], model, [[*prompt, 9]])


@EITHER_WAY
@pytest.mark.parametrize("key_heads", [1, 4], ids=["MQA", "MHA"])
def test_other_numbers_of_key_heads(key_heads, shares, monkeypatch):
    model = policy_model(num_key_value_heads=key_heads)
    monkeypatch.setitem(policy_rows._shares, model, shares)
    rows = open_policy(model, [5, 6, 7], Counters()).fork(2)
    assert_rows(rows.extend([8, 9]), model, [[5, 6, 7, 8], [5, 6, 7, 9]])
    assert_rows(rows.extend([10, 11]), model, [[5, 6, 7, 8, 10], [5, 6, 7, 9, 11]])


@EITHER_WAY
@EVERY_FAMILY
def test_rows_grow_past_the_room_they_begin_with(family, shares, monkeypatch, poisoned_empty):
    model = policy_model(family)
    monkeypatch.setitem(policy_rows._shares, model, shares)
    random = np.random.default_rng(1)
    rows, sequences = open_policy(model, [5, 6, 7], Counters()).fork(2), [[5, 6, 7], [5, 6, 7]]
    for step in range(70):
        tokens = random.integers(0, VOCABULARY, 2).tolist()
        sequences = [[*sequence, token] for sequence, token in zip(sequences, tokens, strict=True)]
        logits = rows.extend(tokens)
        if step in (31, 32, 33, 64, 65, 69):
            assert_rows(logits, model, sequences)


@EVERY_FAMILY
def test_every_family_shares_the_prefix(family):
    assert policy_rows._shares_prefix(small_policy(family, seed=1, vocabulary=VOCABULARY, dtype=torch.float32))


def test_attention_that_does_not_see_the_shared_prefix_is_noticed(monkeypatch, caplog):
    model = small_policy(seed=1, vocabulary=VOCABULARY)
    plain = type(model.model).forward

    def deaf(self, *args, shared_prefix=None, **kwargs):
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(type(model.model), "forward", deaf)
    rows = open_policy(model, [5, 6, 7], Counters()).fork(2)
    assert "decodes rows with a copy of the prefix for each: its logits are off by" in caplog.text
    assert_rows(rows.extend([8, 9]), model, [[5, 6, 7, 8], [5, 6, 7, 9]])


def test_attention_that_refuses_ours_falls_back(monkeypatch, caplog):
    model = small_policy(seed=1, vocabulary=VOCABULARY)
    for layer in model.model.layers:
        monkeypatch.setattr(layer.self_attn, "is_causal", False)
    model.set_attn_implementation("eager")
    rows = open_policy(model, [5, 6, 7], Counters()).fork(2)
    assert model.config._attn_implementation == "eager"
    logits = rows.extend([8, 9])
    expected = torch.stack([plain_logits(model, [5, 6, 7, token]) for token in (8, 9)])
    torch.testing.assert_close(logits, expected, rtol=0, atol=5e-6)


@EVERY_FAMILY
@EITHER_WAY
def test_a_draft_becomes_part_of_the_policy(family, shares, monkeypatch):
    model = policy_model(family)
    monkeypatch.setitem(policy_rows._shares, model, shares)
    reader = Warped(temperature=1.5, top_k=20)
    policy = Policy(model, Counters(), reader)
    policy.extend([5, 6, 7, 8, 9])
    stopped = 0
    for segment in range(6):
        numbers = [uniforms(3, 0, segment, attempt) for attempt in range(4)]
        drafts = draw_drafts(policy, reader, numbers, DraftRules(frozenset({1, 2}), 9, 1.5), keep=True)
        draft = drafts[segment % 4]
        before = list(policy.token_ids)
        continue_from(policy, draft)
        stopped += draft.boundary is not None
        assert policy.token_ids == before + draft.token_ids
        expected = reader.read(plain_logits(model, policy.token_ids)[None])
        torch.testing.assert_close(policy.position.probabilities, expected.probabilities, rtol=0, atol=1e-6)
        torch.testing.assert_close(policy.position.entropy, expected.entropy, rtol=0, atol=1e-6)
        assert policy.position.tokens.tolist() == expected.tokens.tolist()
    assert stopped
