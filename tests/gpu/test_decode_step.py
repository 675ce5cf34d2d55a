"""Decode steps captured as CUDA graphs: the tokens of ordinary passes, whatever is done between replays."""

import threading

import pytest
import torch

from ggro_hf import PREFIX_ATTENTION, Greedy, step_pool
from ggro_hf.decoding.base import Request
from ggro_hf.policy import Policy
from ggro_hf.results import Counters
from tests.ggro_hf.device_cases import CPU, DECODERS, PROMPT, Logits, assert_same, policy_on, request, reward_on
from tests.ggro_hf.test_attention import WINDOW, model_with, tokens

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")

GPU = torch.device("cuda", 0)
FAMILIES = ["llama", "qwen3", "gemma2", "mistral"]
TOLERANCE = 1e-4


def captured(model, prompt, new_tokens, eos_ids=frozenset()):
    generation = Greedy().respond(Request(model, prompt, new_tokens, eos_ids))
    if len(generation.token_ids) > 1:
        assert step_pool.describe(model) == "a CUDA graph"
        assert step_pool._idle[model]
    return generation.token_ids


def generated(model, prompt, new_tokens):
    model.generation_config.eos_token_id = None
    ids = torch.tensor([prompt], device=model.device)
    mask = torch.ones_like(ids)
    return model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=new_tokens)[
        0, len(prompt) :
    ].tolist()


def logits_of(model, token_ids):
    with torch.no_grad():
        return model(input_ids=torch.tensor([token_ids], device=GPU), use_cache=False).logits[0, -1].cpu()


@pytest.mark.parametrize("implementation", ["sdpa", "eager", PREFIX_ATTENTION])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_generate_past_every_window(family, implementation):
    own = "eager" if (family, implementation) == ("gemma2", "sdpa") else implementation
    model = model_with(family, own).to(GPU)
    plain = model_with(family, "eager").to(GPU)
    for length in (1, WINDOW, 3 * WINDOW, 300):
        assert captured(model, tokens(length), 2 * WINDOW) == generated(plain, tokens(length), 2 * WINDOW)
    assert model.config._attn_implementation == own


@pytest.mark.parametrize("name", DECODERS)
def test_every_method_twice(name):
    expected = DECODERS[name](reward_on(CPU)).respond(request(policy_on(CPU), name))
    policy, reward = policy_on(GPU), reward_on(GPU)
    first, second = (DECODERS[name](reward).respond(request(policy, name)) for _ in range(2))
    for generation in (first, second):
        assert_same(generation, expected, TOLERANCE)
    # The response that captured has the bits of the one that found it captured.
    assert first.trace.entropies == second.trace.entropies
    assert step_pool.describe(policy) == "a CUDA graph"


@pytest.mark.parametrize("family", FAMILIES)
def test_rewinding_restoring_and_growing(family, monkeypatch):
    monkeypatch.setattr(step_pool, "_SMALLEST_ROOM", 16)
    monkeypatch.setattr("ggro_hf.cache._GROWTH", 16)
    model = model_with(family, "eager" if family == "gemma2" else "sdpa").to(GPU)
    policy = Policy(model, Counters(), Logits(), capacity=8)
    policy.extend(tokens(12))
    for round_, token in enumerate(tokens(60)):
        logits = policy.extend([token], run_ahead=round_ % 3 == 0)
        torch.testing.assert_close(logits, logits_of(model, policy.token_ids), rtol=0, atol=TOLERANCE)
        if round_ % 9 == 8:
            start = len(policy.token_ids) - 5
            branch = policy.save(start)
            policy.rewind(start)
            policy.extend([7, 8])
            policy.rewind(start)
            policy.restore(branch)
    assert step_pool.describe(model) == "a CUDA graph"


def test_prompts_share_a_capture():
    model = policy_on(GPU)
    expected = [generated(policy_on(CPU), prompt, 12) for prompt in (PROMPT, PROMPT[:2], PROMPT[::-1])]
    steps = []
    for prompt, response in zip((PROMPT, PROMPT[:2], PROMPT[::-1]), expected, strict=True):
        assert captured(model, prompt, 12) == response
        steps += [slot.step for slot in step_pool._idle[model]]
    assert len(set(map(id, steps))) == 1


def test_the_random_numbers_of_the_device_stay_as_they_were():
    model = policy_on(GPU)
    torch.cuda.manual_seed(5)
    state = torch.cuda.get_rng_state(GPU)
    captured(model, PROMPT, 12)
    captured(model, PROMPT, 12)
    assert torch.equal(torch.cuda.get_rng_state(GPU), state)
    assert torch.rand(3, device=GPU).isfinite().all()


def test_responses_on_different_streams():
    model = policy_on(GPU)
    expected = generated(policy_on(CPU), PROMPT, 12)
    torch.cuda.synchronize()
    for _ in range(4):
        with torch.cuda.stream(torch.cuda.Stream()):
            assert captured(model, PROMPT, 12) == expected
            # Ends with a step run ahead in flight.
            stopped = captured(model, PROMPT, 12, frozenset(expected[4:5]))
            assert stopped == expected[: expected.index(expected[4]) + 1]


def test_threads_with_a_policy_each():
    models = [policy_on(GPU) for _ in range(2)]
    expected = generated(policy_on(CPU), PROMPT, 12)
    for model in models:
        captured(model, PROMPT, 12)
    answers = {}

    def decode(index):
        for _ in range(5):
            answers.setdefault(index, []).append(Greedy().respond(Request(models[index], PROMPT, 12, frozenset())))

    threads = [threading.Thread(target=decode, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [generation.token_ids for index in range(2) for generation in answers[index]] == [expected] * 10


def test_weights_that_moved_are_captured_again():
    model = policy_on(GPU)
    captured(model, PROMPT, 12)
    model.to(CPU).to(GPU)
    model.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    changed = policy_on(CPU)
    changed.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    assert captured(model, PROMPT, 12) == generated(changed, PROMPT, 12)


def test_experts_that_look_at_their_routing_are_not_captured():
    model = model_with("qwen2_moe", "sdpa").to(GPU)
    model.set_experts_implementation("eager")
    generation = Greedy().respond(Request(model, tokens(9), 9, frozenset()))
    assert "not as a CUDA graph" in step_pool.describe(model)
    assert generation.token_ids == generated(model, tokens(9), 9)
    # The failed attempt leaves the device as it was.
    assert torch.rand(3, device=GPU).isfinite().all()
    assert captured(policy_on(GPU), PROMPT, 5) == generated(policy_on(CPU), PROMPT, 5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_close_as_another_attention_would_be(dtype):
    model = policy_on(GPU, dtype)
    policy = Policy(model, Counters(), Logits(), capacity=60)
    policy.extend(PROMPT)
    for token in range(40, 60):
        logits = policy.extend([token])
        expected = logits_of(model, policy.token_ids)
        assert (logits - expected).abs().max() <= 0.05 * expected.abs().max()
    assert step_pool.describe(model) == "a CUDA graph"


def test_memory_goes_with_the_model():
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    model = policy_on(GPU)
    captured(model, PROMPT, 12)
    del model
    assert torch.cuda.memory_allocated() <= before + (32 << 20)
