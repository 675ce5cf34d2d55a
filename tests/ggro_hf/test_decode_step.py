"""Captured decode steps through every method, on the CPU: `Replayed` stands for the CUDA graph."""

import gc
import logging
import re
import weakref

import pytest
import torch
from transformers import GptOssConfig, GptOssForCausalLM

from ggro_hf import GGRO, PREFIX_ATTENTION, Greedy, step_pool
from ggro_hf.decoding.base import Request
from ggro_hf.policy import Policy
from ggro_hf.reading import TopK
from ggro_hf.results import Counters
from tests.ggro_hf.device_cases import (
    CPU,
    DECODERS,
    NEW_TOKENS,
    PROMPT,
    Logits,
    assert_same,
    policy_on,
    request,
    reward_on,
)
from tests.ggro_hf.replayed import Replayed, replaying
from tests.ggro_hf.small_models import FAMILIES, small_policy
from tests.ggro_hf.test_attention import SHAPE, WINDOW, model_with, tokens
from tests.ggro_hf.test_cache import plain_logits

VOCABULARY = SHAPE["vocab_size"]


@pytest.fixture(autouse=True)
def _replaying():
    with replaying():
        yield


class Captures:
    """Counts captures: one of the pass for every capacity, one for every way to read."""

    def __init__(self, monkeypatch):
        self.made = []
        monkeypatch.setitem(step_pool.CAPTURES, "cpu", self._capture)

    def _capture(self, function, device):
        self.made.append(Replayed(function, device))
        return self.made[-1]

    @property
    def replays(self):
        return [captured.replays for captured in self.made]


def idle_steps(model):
    return [slot.step for slot in step_pool._idle.get(model, [])]


def generated(model, prompt, new_tokens):
    ids = torch.tensor([prompt])
    mask = torch.ones_like(ids)
    return model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=new_tokens)[0].tolist()


def assert_captured(model):
    assert step_pool.describe(model) == "a recording of one"
    assert idle_steps(model)


@pytest.mark.parametrize("implementation", ["sdpa", "eager", PREFIX_ATTENTION])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "mistral"])
def test_greedy_equals_generate_past_every_window(family, implementation):
    # Gemma 2 has no sdpa: transformers caps scores in eager attention only.
    own = "eager" if (family, implementation) == ("gemma2", "sdpa") else implementation
    model = model_with(family, own)
    model.generation_config.eos_token_id = None
    for length in (1, 2, WINDOW, 3 * WINDOW):
        prompt = tokens(length)
        expected = generated(model_with(family, "eager"), prompt, 2 * WINDOW)
        generation = Greedy().respond(Request(model, prompt, 2 * WINDOW, frozenset({1})))
        assert prompt + generation.token_ids == expected
    assert_captured(model)
    assert model.config._attn_implementation == own


@pytest.mark.parametrize("name", DECODERS)
def test_every_method_gives_what_ordinary_passes_give(name):
    policy, reward = policy_on(CPU), reward_on(CPU)
    with replaying("no device"):
        step_pool.CAPTURES.pop("cpu")
        expected = DECODERS[name](reward).respond(request(policy, name))
    for _ in range(2):
        assert_same(DECODERS[name](reward).respond(request(policy, name)), expected, 1e-5)
    # Rows decoded together have passes of their own.
    if name in ("greedy", "sample", "ggro, runs of tokens") or name.startswith("args"):
        assert_captured(policy)


def test_a_model_is_captured_once_and_every_way_to_read_once(monkeypatch):
    captures = Captures(monkeypatch)
    policy, reward = policy_on(CPU), reward_on(CPU)
    for name in ("greedy", "ggro", "greedy", "ggro", "sample", "ggro", "sample"):
        decoder = DECODERS[name](reward)
        if isinstance(decoder, GGRO):
            decoder.speculate = 1
        for prompt in (PROMPT, PROMPT[:3]):
            decoder.respond(Request(policy, prompt, 9, frozenset()))
    # The pass, and the readers of greedy, GGRO and sampling.
    assert len(captures.made) == 4
    (step,) = idle_steps(policy)
    # The first replay of the pass was the check against the ordinary one, that of a reader whether it can be replayed.
    assert captures.replays[0] == 1 + step.launches == 1 + sum(replays - 1 for replays in captures.replays[1:])


def test_two_policies_at_once_do_not_share_a_step():
    model = small_policy("qwen3", seed=3, vocabulary=VOCABULARY)
    first, second = (Policy(model, Counters(), Logits(), capacity=50) for _ in range(2))
    for policy, prompt in ((first, tokens(9)), (second, tokens(5))):
        policy.extend(prompt)
    for token in tokens(20):
        for policy in (first, second):
            logits = policy.extend([token])
            torch.testing.assert_close(logits, plain_logits(model, policy.token_ids), rtol=0, atol=1e-9)
    del first, second, policy
    assert len(idle_steps(model)) == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_the_buffers_grow_in_the_middle_of_a_response(family, monkeypatch):
    captures = Captures(monkeypatch)
    monkeypatch.setattr(step_pool, "_SMALLEST_ROOM", 16)
    monkeypatch.setattr("ggro_hf.cache._GROWTH", 16)
    model = small_policy(family, seed=3, vocabulary=VOCABULARY)
    policy = Policy(model, Counters(), Logits(), capacity=8)
    policy.extend(tokens(12))
    for token in tokens(25):
        torch.testing.assert_close(policy.extend([token]), plain_logits(model, policy.token_ids), rtol=0, atol=1e-9)
    # 16, 32 and 64 rows, a pass and a reader each; the last row is never a token's.
    assert len(captures.made) == 6
    assert captures.replays[0] == 1 + 3
    policy.extend(tokens(70))
    for token in tokens(3):
        torch.testing.assert_close(policy.extend([token]), plain_logits(model, policy.token_ids), rtol=0, atol=1e-9)
    assert len(captures.made) == 8


def test_a_prompt_of_the_whole_capacity():
    model = small_policy(seed=3, vocabulary=VOCABULARY)
    for length in (254, 255, 256, 257):
        policy = Policy(model, Counters(), Logits(), capacity=length)
        policy.extend(tokens(length))
        for token in (7, 8):
            torch.testing.assert_close(policy.extend([token]), plain_logits(model, policy.token_ids), rtol=0, atol=1e-9)


@pytest.mark.parametrize("new_tokens", [1, 2, 3])
def test_the_shortest_responses(monkeypatch, new_tokens):
    captures = Captures(monkeypatch)
    policy = policy_on(CPU)
    generation = Greedy().respond(Request(policy, PROMPT, new_tokens, frozenset()))
    assert PROMPT + generation.token_ids == generated(policy, PROMPT, new_tokens)
    assert generation.counters.policy_tokens == len(PROMPT) + new_tokens - 1
    assert len(captures.made) == (0 if new_tokens == 1 else 2)


def test_end_of_sequence_first_and_later():
    policy = policy_on(CPU)
    free = Greedy().respond(Request(policy, PROMPT, NEW_TOKENS, frozenset())).token_ids
    for stop in range(3):
        end = free.index(free[stop])
        generation = Greedy().respond(Request(policy, PROMPT, NEW_TOKENS, frozenset({free[stop]})))
        assert generation.token_ids == free[: end + 1]
        assert generation.finish_reason == "eos"
        # Run ahead of the host, the step after the end was computed too.
        assert generation.counters.policy_tokens == len(PROMPT) + end + (end > 0)


def test_running_ahead_is_dropped_where_another_token_follows():
    model = small_policy("gemma3", seed=3, vocabulary=VOCABULARY)
    policy = Policy(model, Counters(), TopK(5), capacity=100)
    choices = torch.Generator().manual_seed(0)
    position = policy.extend(tokens(9))
    for round_ in range(40):
        follows = bool(torch.rand((), generator=choices) < 0.6)
        position = policy.extend([position.tokens[0 if follows else 1]], run_ahead=round_ % 3 != 0)
        if round_ % 7 == 5:
            length = len(policy.token_ids) - 3
            branch = policy.save(length)
            policy.rewind(length)
            if round_ % 2:
                policy.extend([11, 12])
                policy.rewind(length)
            policy.restore(branch)
        expected = plain_logits(model, policy.token_ids).topk(5)
        assert position.tokens == expected.indices.tolist()
        assert position.logits == pytest.approx(expected.values.tolist(), abs=1e-9)


def test_a_step_ahead_of_another_prefix_is_not_taken_for_this_one():
    model = small_policy(seed=3, vocabulary=VOCABULARY)
    policy = Policy(model, Counters(), TopK(1), capacity=100)
    policy.extend(tokens(9))
    policy.extend([5])
    ahead = policy.extend([6], run_ahead=True).tokens[0]
    policy.rewind(9)
    # As long as before, and the token that was run ahead with comes next.
    policy.extend([8, 9])
    position = policy.extend([ahead])
    expected = plain_logits(model, policy.token_ids).max().item()
    assert position.logits == pytest.approx([expected], abs=1e-9)


def test_a_response_that_failed_leaves_nothing_behind():
    model = policy_on(CPU)
    model.set_attn_implementation("eager")
    expected = Greedy().respond(Request(model, PROMPT, 9, frozenset())).token_ids
    policy = Policy(model, Counters(), TopK(1), capacity=len(PROMPT) + 9)
    policy.extend(PROMPT)
    policy.extend([5])
    with torch.inference_mode():
        for layer in policy._cache.layers:
            # As an overflow would.
            layer.keys.fill_(torch.inf)
            layer.values.fill_(torch.nan)
    with pytest.raises(FloatingPointError):
        policy.extend([6])
    del policy
    assert Greedy().respond(Request(model, PROMPT, 9, frozenset())).token_ids == expected


def change_weights(model):
    model.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(model.model.layers[0].mlp.up_proj.weight * 1.5)


def change_a_flag(model):
    model.model.layers[0].mlp.scale = 2.0


def change_attention(model):
    model.set_attn_implementation("eager")


@pytest.mark.parametrize("change", [change_weights, change_a_flag, change_attention])
def test_a_model_that_was_changed_is_captured_again(monkeypatch, change):
    captures = Captures(monkeypatch)
    model = policy_on(CPU)
    Greedy().respond(Request(model, PROMPT, 9, frozenset()))
    change(model)
    generation = Greedy().respond(Request(model, PROMPT, 9, frozenset()))
    assert len(captures.made) == 4
    assert PROMPT + generation.token_ids == generated(model, PROMPT, 9)
    assert len(idle_steps(model)) == 1


def test_steps_go_with_their_model(monkeypatch):
    captures = Captures(monkeypatch)
    model = small_policy(seed=3, vocabulary=VOCABULARY)
    Greedy().respond(Request(model, tokens(5), 9, frozenset()))
    assert idle_steps(model)
    for captured in captures.made:
        # A CUDA graph does not keep what it captured.
        captured._function = None
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    assert not step_pool._idle


def test_a_bounded_number_of_idle_tokens_is_kept(monkeypatch):
    monkeypatch.setattr(step_pool, "_MOST_IDLE", 10_000)
    model = small_policy(seed=3, vocabulary=VOCABULARY, max_position_embeddings=20_000)
    for capacity in (100, 300, 600, 1200, 2400, 4800):
        policy = Policy(model, Counters(), Logits(), capacity=capacity)
        policy.extend([5])
        policy.extend([6])
        del policy
    assert [step.rows for step in idle_steps(model)] == [256, 512, 1024, 8192]
    for capacity in (0, 255, 256, 4095, 4096, 70_000):
        assert capacity < step_pool._room(capacity) <= max(256, 2 * capacity)


def test_a_default_device_of_the_caller_does_not_matter():
    model = policy_on(CPU)
    with torch.device("meta"):
        generation = Greedy().respond(Request(model, PROMPT, 9, frozenset()))
    assert PROMPT + generation.token_ids == generated(model, PROMPT, 9)
    assert_captured(model)


# Models whose pass is not captured: the ordinary one serves, and says so once.


def hooked(model):
    model.model.layers[1].register_forward_hook(lambda *_: None)


def waiting(model):
    norm = model.model.norm.forward
    model.model.norm.forward = lambda x: norm(x) * float(x.isfinite().all())


def training(model):
    model.train()


UNCAPTURED = {
    hooked: r"module 'model.layers.1' has hooks, which a captured pass would not call",
    waiting: r"WaitsForTheDevice: aten\S+ waits for the device",
    training: r"it is in training mode; call model.eval\(\)",
}


@pytest.mark.parametrize("change", UNCAPTURED, ids=lambda change: change.__name__)
def test_what_cannot_be_captured_decodes_ordinarily(change, caplog):
    model = policy_on(CPU)
    expected = Greedy().respond(Request(model, PROMPT, 9, frozenset()))
    change(model)
    for _ in range(2):
        generation = Greedy().respond(Request(model, PROMPT, 9, frozenset()))
        assert_same(generation, expected, 1e-5)
        assert generation.counters.policy_tokens == len(PROMPT) + 8
    (warning,) = (record for record in caplog.records if record.levelno == logging.WARNING)
    assert warning.getMessage().startswith(
        "LlamaForCausalLM decodes by ordinary forward passes, not as a recording of one:"
    )
    assert re.search(UNCAPTURED[change], step_pool.describe(model))


def test_a_pass_that_gives_other_logits_is_not_used(caplog):
    class Wrong(Replayed):
        def replay(self):
            super().replay()
            if isinstance(self.outputs, torch.Tensor):
                self.outputs.add_(0.1 * torch.arange(len(self.outputs)))

    model = policy_on(CPU)
    expected = generated(model, PROMPT, 9)
    with replaying(capture=Wrong):
        generation = Greedy().respond(Request(model, PROMPT, 9, frozenset()))
        assert "its captured pass gives other logits than its forward" in step_pool.describe(model)
    assert PROMPT + generation.token_ids == expected


def test_experts_that_look_at_their_routing_are_not_captured():
    model = model_with("qwen2_moe", "sdpa")
    model.set_experts_implementation("eager")
    generation = Greedy().respond(Request(model, tokens(9), 9, frozenset()))
    assert "waits for the device" in step_pool.describe(model)
    assert tokens(9) + generation.token_ids == generated(model, tokens(9), 9)


def test_attention_with_sinks_keeps_the_models_own():
    shape = SHAPE | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": WINDOW}
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = GptOssForCausalLM(GptOssConfig(**shape)).eval()
    model.generation_config.eos_token_id = None
    generation = Greedy().respond(Request(model, tokens(9), 20, frozenset()))
    assert tokens(9) + generation.token_ids == generated(model, tokens(9), 20)
    assert_captured(model)
