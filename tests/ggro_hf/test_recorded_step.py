"""Decode steps as a CPU runs them, recorded: the tokens of transformers' own greedy search, and what falls back."""

import ctypes

import pytest
import torch

from ggro_hf import PREFIX_ATTENTION, Greedy, step_pool
from ggro_hf.decoding.base import Request
from tests.ggro_hf.test_attention import WINDOW, model_with, tokens

FAMILIES = ["llama", "qwen3", "gemma2", "mistral"]


def generated(model, prompt, new_tokens):
    ids = torch.tensor([prompt])
    mask = torch.ones_like(ids)
    return model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=new_tokens)[0].tolist()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("implementation", ["sdpa", "eager", PREFIX_ATTENTION])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_generate_past_every_window(family, implementation, dtype):
    # Gemma 2 has no sdpa: transformers caps scores in eager attention only.
    own = "eager" if (family, implementation) == ("gemma2", "sdpa") else implementation
    model = model_with(family, own).to(dtype)
    model.generation_config.eos_token_id = None
    for length in (1, 2, WINDOW, 3 * WINDOW):
        prompt = tokens(length)
        expected = generated(model_with(family, "eager").to(dtype), prompt, 2 * WINDOW)
        for _ in range(2):
            generation = Greedy().respond(Request(model, prompt, 2 * WINDOW, frozenset({1})))
            assert prompt + generation.token_ids == expected
            assert generation.counters.policy_tokens == length + len(generation.token_ids) - 1
    assert step_pool.describe(model) == "a recording of one"
    assert step_pool._idle[model]


def test_what_python_takes_from_a_token_is_found_out():
    model = model_with("llama", "sdpa")
    # As an index that a foreign kernel reads: past the dispatcher.
    scales = {token: 1.0 + token / 8 for token in range(61)}
    norm = model.model.norm.forward
    embedding = model.model.embed_tokens
    seen = []
    look_up = embedding.forward
    embedding.forward = lambda ids: (seen.append(memory_of(ids)), look_up(ids))[1]
    model.model.norm.forward = lambda x: norm(x) * scales[seen[-1]]
    prompt = tokens(9)
    expected = generated(model, prompt, 9)
    assert prompt + Greedy().respond(Request(model, prompt, 9, frozenset())).token_ids == expected
    assert "gives other logits than its forward" in step_pool.describe(model)


def memory_of(ids):
    last = ids.data_ptr() + 8 * (ids.numel() - 1)
    return int(ctypes.c_int64.from_address(last).value)
