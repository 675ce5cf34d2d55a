"""Several responses at once: each is what it would be alone, whatever happens to the others."""

import logging
import re
from dataclasses import replace
from functools import cache
from math import nan

import pytest
import torch
from transformers import Qwen3NextConfig, T5Config, T5ForConditionalGeneration
from transformers.generation.streamers import BaseStreamer

from ggro_hf import ExhaustiveSearch, RewardModel, generate, generate_iter
from ggro_hf.decoding import NoProgressError
from ggro_hf.decoding import batch as batches_of
from ggro_hf.decoding.base import Request
from ggro_hf.lanes import LaneCache
from ggro_hf.policy_lanes import Lane, PolicyLanes, takes_lanes
from ggro_hf.results import Generation
from ggro_hf.rewards import RewardPrefix
from tests.ggro_hf.batches import (
    EOS,
    VOCABULARY,
    assert_all_equal,
    assert_equal,
    decoder,
    new_policy,
    new_reward,
    outcomes,
    policy,
    prompts,
    requests,
    reward,
    watching_steps,
)
from tests.ggro_hf.small_models import (
    END_OF_TEXT,
    END_OF_TURN,
    FAMILIES,
    PAD,
    scripted_policy,
    scripted_reward,
    small_policy,
    small_reward,
    small_tokenizer,
)

MANY = 10_000
SEARCHES = {
    "one token": {},
    "runs of tokens": {"nudge_tokens": 3},
    "every other token": {"check_every": 2, "perplexity_ratio": 1.5},
    "an offset": {"insertion_offset": 3, "refinements": 3},
    "no refinement": {"refinements": 1},
    "one segment": {"entropy_threshold": float("inf"), "refinements": 2},
}


@cache
def alone(name: str = "one token") -> list[Generation]:
    """The rows' single runs."""
    search = decoder(**SEARCHES[name])
    return [search.respond(request) for request in requests()]


def test_the_rows_differ_in_how_they_end_and_are_searched():
    assert {generation.finish_reason for generation in alone()} == {"eos", "length"}
    assert len({len(generation.token_ids) for generation in alone()}) > 4
    assert sum(generation.trace.nudges for generation in alone()) > 4


@pytest.mark.parametrize(("budget", "at_once"), [(1, 1), (2 * (212 + 17), 2), (3 * (212 + 17), 3), (MANY, 7)])
def test_rows_equal_their_single_runs_whatever_the_budget(budget, at_once):
    with watching_steps() as served:
        found = list(decoder().respond_all(iter(requests()), budget))
    assert max(served) == at_once if budget in (1, MANY) else max(served) >= at_once
    assert_all_equal(found, alone())


@pytest.mark.parametrize("name", SEARCHES)
def test_every_search(name):
    assert_all_equal(list(decoder(**SEARCHES[name]).respond_all(requests(), 600)), alone(name))


@pytest.mark.parametrize("family", [*FAMILIES[1:], "gpt2", "opt"])
def test_every_family(family):
    model = policy(family)
    assert takes_lanes(model)
    search = decoder(reward(family), refinements=3)
    own = requests(model)
    with watching_steps() as served:
        found = list(search.respond_all(own, MANY))
    # The response of a single token needs no step.
    assert max(served) == len(own) - 1
    assert_all_equal(found, [search.respond(request) for request in own], 5e-5)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_bf16(family):
    model, scored = policy(family, torch.bfloat16), reward(family, torch.bfloat16)
    found = list(decoder(scored).respond_all(requests(model), MANY))
    for generation, request in zip(found, requests(model), strict=True):
        assert 0 < len(generation.token_ids) <= request.max_new_tokens
        assert generation.reward == generation.reward


@pytest.mark.parametrize("family", ["bloom", "gpt_oss"])
def test_attention_that_does_not_go_with_lanes_falls_back_to_one_by_one(family, caplog):
    model = new_policy(family)
    own = requests(model, rows=3)
    assert not takes_lanes(model)
    with watching_steps() as served:
        found = list(decoder().respond_all(own, MANY))
    assert served == []
    assert "decodes one row at a time" in caplog.text
    assert_all_equal(found, [decoder().respond(request) for request in own])


def test_models_that_cannot_decode_are_refused_as_ever():
    model = T5ForConditionalGeneration(
        T5Config(vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    )
    own = [Request(model, [4, 5], 3, EOS, row) for row in range(2)]
    responses = decoder().respond_all(own, MANY)
    for _ in own:
        with pytest.raises(ValueError, match="no decoder-only language model"):
            next(responses)


# When prompts are taken, and in which order they come back


def test_no_more_prompts_are_taken_than_there_is_room_for_and_one():
    own = [Request(policy(), prompt, 6, EOS, row) for row, prompt in enumerate(prompts(*[10] * 9))]
    taken = 0

    def lazily():
        nonlocal taken
        for request in own:
            taken += 1
            yield request

    finished = 0
    with watching_steps() as served:
        for _ in decoder().respond_all(lazily(), 3 * (16 + 17)):
            finished += 1
            # Those finished out of turn made room for others.
            assert taken <= len(own)
            if finished == 1:
                assert taken < len(own)
    assert max(served) == 3
    assert finished == len(own)


def test_room_is_counted_by_the_longest():
    lengths, news = [10, 10, 40, 10, 10], 6
    own = [Request(policy(), prompt, news, EOS, row) for row, prompt in enumerate(prompts(*lengths))]
    sizes = []
    plain = PolicyLanes.step

    def step(self, works):
        sizes.append(sum(len(lane.token_ids) + self.cache.columns for lane, _ in works))
        return plain(self, works)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PolicyLanes, "step", step)
        found = list(decoder().respond_all(own, 2 * (46 + 17)))
    assert_all_equal(found, [decoder().respond(request) for request in own])
    assert max(sizes) <= 2 * (46 + 17)


def test_candidates_take_room_too():
    search = ExhaustiveSearch(reward(), candidates=5, entropy_threshold=1.0)
    own = [Request(policy(), prompt, 6, EOS, row) for row, prompt in enumerate(prompts(*[10] * 9))]
    # Every lane has five rows of 16 columns, and one that is nobody's.
    with watching_steps() as served:
        found = list(search.respond_all(own, 2 * (16 + 5 * 16 + 1)))
    assert max(served) == 2
    assert_all_equal(found, [search.respond(request) for request in own])


def test_a_long_prompt_leaves_no_large_buffers_behind():
    """Lanes are of the longest prompt's size: after it there must not be as many of them as of short ones."""
    own = [Request(policy(), prompt, 8, EOS, row) for row, prompt in enumerate(prompts(4, 480, *[4] * 30))]
    sizes = []
    plain = PolicyLanes.step

    def step(self, works):
        sizes.append(self.cache.layers[0].prefix_keys[:, 0, :, 0].numel())
        return plain(self, works)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PolicyLanes, "step", step)
        found = list(decoder(refinements=1).respond_all(own, 1024))
    assert len(found) == 32
    # Rounded up to 64 tokens a lane.
    assert max(sizes) <= 85 * 64
    assert len(set(sizes)) > 1


def test_one_prompt_and_none():
    (one,) = decoder().respond_all(requests(rows=1), MANY)
    assert_equal(one, alone()[0])
    assert list(decoder().respond_all([], MANY)) == []


def test_a_streamer_sees_one_response_after_the_other():
    class Streamer(BaseStreamer):
        def __init__(self):
            self.put_ids, self.responses = [], []

        def put(self, value):
            self.put_ids += value.tolist()

        def end(self):
            self.responses.append(self.put_ids)
            self.put_ids = []

    streamer = Streamer()
    own = requests(rows=4)
    found = list(decoder(streamer=streamer).respond_all(own, MANY))
    assert streamer.responses == [generation.prompt_ids + generation.token_ids for generation in found]
    assert_all_equal(found, alone()[:4])


# The ways to call it


def test_custom_generate_with_left_padding():
    own = prompts(3, 9, 1, 6)
    ids = torch.full((4, 9), PAD)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(own):
        ids[row, 9 - len(prompt) :] = torch.tensor(prompt)
        mask[row, 9 - len(prompt) :] = 1
    model = policy()
    single = [decoder()(model, torch.tensor([prompt]), max_new_tokens=14).generations[0] for prompt in own]
    with watching_steps() as served:
        sequences = model.generate(ids, attention_mask=mask, custom_generate=decoder(), max_new_tokens=14)
    assert max(served) == 4
    for row, generation in zip(sequences.tolist(), single, strict=True):
        response = row[9:]
        padding = len(response) - len(generation.token_ids)
        assert response == generation.token_ids + [PAD] * padding
    output = decoder()(model, ids, attention_mask=mask, max_new_tokens=14, max_batch_tokens=40)
    assert torch.equal(output.sequences, sequences)
    assert_all_equal(output.generations, single)


@cache
def text_models():
    tokenizer = small_tokenizer()
    model = small_policy(seed=0, vocabulary=300, gain=2.0, dtype=torch.float32)
    return model, tokenizer, RewardModel(small_reward(seed=1, vocabulary=300, dtype=torch.float32), tokenizer)


TEXTS = ["The sea", "a", "And then there was another thing", "in the end", "on"]


@pytest.mark.parametrize("budget", [1, 60, MANY])
def test_generate_fills_in_the_texts(budget):
    model, tokenizer, scored = text_models()
    search = decoder(scored)
    single = [generate(model, tokenizer, [text], search, max_new_tokens=12, progress=False)[0] for text in TEXTS]
    options = {"max_new_tokens": 12, "max_batch_tokens": budget}
    assert_all_equal(generate(model, tokenizer, TEXTS, search, progress=False, **options), single)
    assert [generation.prompt for generation in single] == TEXTS


def test_what_the_prompts_raise_is_raised_in_its_turn():
    model, tokenizer, scored = text_models()
    search = decoder(scored)
    messages = [{"role": "user", "content": "there is no template"}]
    responses = generate_iter(model, tokenizer, [TEXTS[0], messages, TEXTS[1], ""], search, max_new_tokens=6)
    assert next(responses).prompt == TEXTS[0]
    with pytest.raises(ValueError, match="list of messages"):
        next(responses)
    assert next(responses).prompt == TEXTS[1]

    def breaking():
        yield TEXTS[0]
        raise KeyError("no more")

    responses = generate_iter(model, tokenizer, breaking(), search, max_new_tokens=6)
    assert next(responses).prompt == TEXTS[0]
    with pytest.raises(KeyError, match="no more"):
        next(responses)
    assert list(responses) == []


# What goes wrong with one row


def assert_failed(outcome, kind, message, row):
    assert isinstance(outcome, kind)
    assert message in str(outcome)
    assert outcome.__notes__ == [f"while decoding row {row}"]


BROKEN = 60
"""A token that the models of the next tests answer NaN behind."""


def broken(model):
    model.get_input_embeddings().weight[BROKEN] = nan
    return model


def healthy_but(row, prompt, model):
    """Requests of which one has another prompt."""
    own = [Request(model, one, 8, EOS, index) for index, one in enumerate(prompts(*[12] * 7))]
    own = [Request(model, [t if t != BROKEN else 61 for t in r.prompt_ids], 8, EOS, r.row) for r in own]
    own[row] = Request(model, prompt, 8, EOS, row)
    return own


@pytest.mark.parametrize("budget", [60, MANY])
@pytest.mark.parametrize("row", [0, 3])
def test_nan_logits_of_one_row(row, budget):
    model = broken(new_policy())
    # That the broken token is generated would spoil a healthy row.
    model.get_output_embeddings().weight[BROKEN] = 0.0
    own = healthy_but(row, [5, BROKEN, 6], model)
    single = outcomes(map(decoder().respond, own))
    found = outcomes(decoder().respond_all(own, budget))
    assert len(found) == len(own)
    for number, (one, expected) in enumerate(zip(found, single, strict=True)):
        if number == row:
            assert_failed(one, FloatingPointError, "the policy's logits hold NaN", row)
            assert str(one) == str(expected)
        else:
            assert_equal(one, expected)


@pytest.mark.parametrize("budget", [60, MANY])
def test_nan_logits_in_the_middle_of_a_response(budget, monkeypatch):
    """The lane goes to another prompt, which must not see what is left in it."""
    model = new_policy()
    own = [Request(model, one, 12, EOS, index) for index, one in enumerate(prompts(*[12] * 7))]
    healthy = [decoder().respond(request) for request in own]
    # One that some rows come to generate and others do not.
    rows = {token: [token in g.token_ids[:-1] for g in healthy] for g in healthy for token in g.token_ids}
    in_prompts = {token for request in own for token in request.prompt_ids}
    token = next(t for t, there in rows.items() if any(there) and not all(there) and t not in in_prompts)
    model = new_policy()
    model.get_input_embeddings().weight[token] = nan
    own = [Request(model, request.prompt_ids, 12, EOS, request.row) for request in own]
    single = outcomes(map(decoder().respond, own))
    assert {type(one) for one in single} == {Generation, FloatingPointError}
    found = outcomes(decoder().respond_all(own, budget))
    for row, (one, expected) in enumerate(zip(found, single, strict=True)):
        if isinstance(expected, Exception):
            assert_failed(one, FloatingPointError, "the policy's logits hold NaN", row)
        else:
            assert_equal(one, expected)


@pytest.mark.parametrize("budget", [60, MANY])
def test_nan_rewards_of_one_row(budget):
    scored = RewardModel(broken(new_reward()))
    own = healthy_but(2, [5, BROKEN, 6], policy())
    single = outcomes(map(decoder(scored).respond, own))
    found = outcomes(decoder(scored).respond_all(own, budget))
    for row, (one, expected) in enumerate(zip(found, single, strict=True)):
        if row == 2 or isinstance(expected, Exception):
            assert_failed(one, FloatingPointError, "the reward model answers NaN", row)
        else:
            assert_equal(one, expected)
    assert isinstance(found[3], Generation)


def test_requests_that_cannot_be_served():
    own = requests(rows=6)
    own[0] = Request(policy(), [], 5, EOS, 0)
    own[2] = Request(policy(), prompts(510)[0], 5, EOS, 2)
    own[3] = Request(policy(), [5], 0, EOS, 3)
    found = outcomes(decoder().respond_all(own, 500))
    assert_failed(found[0], ValueError, "prompt has no tokens", 0)
    assert_failed(found[2], ValueError, "need 515 positions", 2)
    assert_failed(found[3], ValueError, "max_new_tokens is 0", 3)
    assert_all_equal([found[1], *found[4:]], [alone()[1], *alone()[4:6]])


def test_a_token_that_a_model_does_not_know_is_the_fault_of_its_row():
    scored = RewardModel(small_reward(seed=2, vocabulary=80, dtype=torch.float32))
    in_prompts = [Request(policy(), [token, 5, 6], 2, EOS, row) for row, token in enumerate((7, 90, 8, 9, 12, 14))]
    in_responses = [Request(policy(), prompt, 12, EOS, row) for row, prompt in enumerate(prompts(*[3] * 12))]
    search = decoder(scored, refinements=1)
    for own in (in_prompts, in_responses):
        single = outcomes(map(search.respond, own))
        assert {Generation, IndexError} == {type(one) for one in single}
        for one, expected in zip(outcomes(search.respond_all(own, MANY)), single, strict=True):
            if isinstance(expected, Generation):
                assert_equal(one, expected)
            else:
                assert_failed(one, IndexError, str(expected), own[single.index(expected)].row)


def test_released_code_that_makes_no_progress_is_the_fault_of_its_row():
    """Two of three prompts lead to an end token other than the tokenizer's, which the released code repeats."""
    tokenizer = small_tokenizer()
    k, m, p, q = tokenizer.convert_tokens_to_ids(["k", "m", "p", "q"])
    logits = -1e-3 * torch.arange(len(tokenizer), dtype=torch.float64).repeat(len(tokenizer), 1)
    for previous, following in ((k, END_OF_TEXT), (m, p), (p, q), (q, END_OF_TURN)):
        logits[previous] = -30.0
        logits[previous, following] = 30.0
    ends = (END_OF_TURN, END_OF_TEXT)
    model = scripted_policy(logits, eos_token_ids=ends)
    scored = RewardModel(scripted_reward(torch.zeros(len(tokenizer), dtype=torch.float64)))
    search = decoder(scored, tokenizer=tokenizer, as_released=True, insertion_offset=0, refinements=1)
    own = [Request(model, [token], 12, frozenset(ends), row) for row, token in enumerate((m, k, p, k, q))]
    single = outcomes(map(search.respond, own))
    assert [type(one) for one in single] == [Generation, NoProgressError, Generation, NoProgressError, Generation]
    for budget in (30, MANY):
        for row, (one, expected) in enumerate(zip(outcomes(search.respond_all(own, budget)), single, strict=True)):
            if isinstance(expected, Exception):
                assert_failed(one, NoProgressError, "the text stays the same", row)
            else:
                assert_equal(one, expected)


def test_a_state_that_cannot_be_rewound_is_refused_in_batches_too():
    model = new_policy()
    model.config = Qwen3NextConfig(num_hidden_layers=2, layer_types=["linear_attention", "full_attention"])
    own = [Request(model, [4, 5], 3, EOS, row) for row in range(2)]
    for row, one in enumerate(outcomes(decoder().respond_all(own, MANY))):
        assert_failed(one, ValueError, "cannot be rewound", row)


@pytest.mark.parametrize("speculate", [3, None])
def test_candidates_decoded_ahead_leave_the_responses_as_they_are(speculate):
    """Only the counters of tokens tell."""
    search = decoder(speculate=speculate)
    for one, expected in zip(search.respond_all(requests(), MANY), alone(), strict=True):
        one.counters = replace(expected.counters, peak_bytes=1)
        assert_equal(one, expected)


def test_rows_before_a_failing_one_are_had_and_a_list_raises():
    own = requests(rows=4)
    own[2] = Request(policy(), [], 5, EOS, 2)
    with pytest.raises(ValueError, match="prompt has no tokens") as caught:
        list(decoder().respond_all(own, MANY))
    assert caught.value.__notes__ == ["while decoding row 2"]
    responses = decoder().respond_all(own, MANY)
    assert_all_equal([next(responses), next(responses)], alone()[:2])


# Short of memory


class Shortage:
    """Raises at given calls of a method, counted from 0."""

    def __init__(self, patch, owner, name, calls, error=None):
        self.calls, self.count = set(calls), 0
        self.error = error or torch.OutOfMemoryError("out of memory")
        plain = getattr(owner, name)

        def method(*args, **kwargs):
            self.count += 1
            if self.count - 1 in self.calls:
                raise type(self.error)(*self.error.args)
            return plain(*args, **kwargs)

        patch.setattr(owner, name, method)


CPU_ALLOCATOR = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if record.name == batches_of.__name__]


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("out"), CPU_ALLOCATOR, MemoryError()], ids=["GPU", "CPU", "C"]
)
@pytest.mark.parametrize(
    ("owner", "name", "calls"),
    [
        (PolicyLanes, "_run", [0]),
        (PolicyLanes, "_run", [5]),
        (PolicyLanes, "_run", [5, 30]),
        (batches_of, "score_segments", [0]),
        (batches_of, "score_segments", [3, 7]),
    ],
    ids=["first step", "a step", "several steps", "first score", "several scores"],
)
def test_nothing_is_lost_when_memory_runs_out(owner, name, calls, error, caplog, monkeypatch):
    with monkeypatch.context() as patch:
        Shortage(patch, owner, name, calls, error)
        with watching_steps() as served, caplog.at_level(logging.WARNING):
            found = list(decoder().respond_all(requests(), MANY))
    assert_all_equal(found, alone())
    messages = warnings_of(caplog)
    pattern = r"out of memory with (\d) responses at once; going on with (\d)"
    numbers = [tuple(map(int, re.fullmatch(pattern, message).groups())) for message in messages]
    assert len(numbers) == len(calls)
    assert all(after == before // 2 for before, after in numbers)
    assert numbers[0][0] >= 7
    assert max(served[-20:]) <= numbers[-1][1]


def equal_rows(rows=6):
    return [Request(policy(), prompt, 8, EOS, row) for row, prompt in enumerate(prompts(*[10] * rows))]


@pytest.mark.parametrize(
    ("owner", "name", "calls"),
    [
        (LaneCache, "__init__", [0]),
        (PolicyLanes, "_run", [2]),
        (batches_of, "score_segments", [1]),
        (RewardPrefix, "extend", [0]),
        (Lane, "move_to", [0]),
        (Lane, "commit", [0]),
    ],
    ids=["buffers", "step", "score", "reward of the prompt", "prefill", "commit"],
)
def test_the_last_response_raises_in_its_turn_and_the_others_go_on(owner, name, calls, monkeypatch):
    own = equal_rows(3)
    single = [decoder().respond(request) for request in own]
    with monkeypatch.context() as patch:
        Shortage(patch, owner, name, calls)
        found = outcomes(decoder().respond_all(own, 1))
    assert_failed(found[0], torch.OutOfMemoryError, "out of memory", 0)
    assert_all_equal(found[1:], single[1:])


@pytest.mark.parametrize(
    ("owner", "name", "calls"),
    [
        (Lane, "move_to", [1]),
        (Lane, "move_to", [4]),
        (RewardPrefix, "extend", [1]),
        (RewardPrefix, "extend", [3, 5]),
        (PolicyLanes, "resize", [0]),
        (PolicyLanes, "resize", [2]),
        (LaneCache, "_allocated", [2]),
        (LaneCache, "_allocated", [3]),
        (LaneCache, "_allocated", [5]),
        # Also while it makes room for half of them.
        (LaneCache, "_allocated", [5, 6]),
        (LaneCache, "_allocated", [5, 7]),
        (Lane, "commit", [0]),
        (Lane, "commit", [1, 3]),
        (RewardPrefix, "commit", [0, 2]),
    ],
    ids=str,
)
def test_memory_runs_out_elsewhere(owner, name, calls, caplog, monkeypatch):
    """While a response is opened, lanes are resized, or a response commits what it has found."""
    own = equal_rows()
    single = [decoder().respond(request) for request in own]
    with monkeypatch.context() as patch:
        shortage = Shortage(patch, owner, name, calls)
        found = outcomes(decoder().respond_all(own, MANY))
    assert shortage.count > max(calls)
    assert_all_equal(found, single)
    assert 1 <= len(warnings_of(caplog)) <= len(calls)


@pytest.mark.parametrize("layer", [0, 1])
def test_memory_runs_out_while_rows_are_widened(layer, caplog, monkeypatch):
    """Some layers are wider then than others."""
    # No entropy ends a segment, so rows outgrow their room.
    search = decoder(entropy_threshold=float("inf"), refinements=2)
    own = [Request(policy(), prompt, 40, frozenset(), row) for row, prompt in enumerate(prompts(6, 9, 3, 12))]
    single = [search.respond(request) for request in own]
    widen = LaneCache.widen

    def short_of_memory(self):
        if shortage.count == 0:
            allocated = self._allocated
            calls = iter([allocated] * layer)

            def failing(*like):
                shortage.count += 1
                return next(calls, failed)(*like)

            self._allocated = failing
            try:
                widen(self)
            finally:
                del self._allocated
        widen(self)

    class shortage:
        count = 0

    def failed(*like):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(LaneCache, "widen", short_of_memory)
    assert_all_equal(list(search.respond_all(own, MANY)), single)
    assert shortage.count == layer + 1
    assert warnings_of(caplog) == ["out of memory with 4 responses at once; going on with 2"]


def test_other_errors_of_a_pass_are_not_taken_for_lack_of_memory(caplog, monkeypatch):
    own = equal_rows(3)
    with monkeypatch.context() as patch:
        Shortage(patch, PolicyLanes, "_run", range(1000), RuntimeError("something else"))
        found = outcomes(decoder().respond_all(own, MANY))
    for row, one in enumerate(found):
        assert_failed(one, RuntimeError, "something else", row)
    assert warnings_of(caplog) == []


def test_rows_that_begin_again_keep_their_place(monkeypatch):
    """Whichever row dies of it, the responses come in order and none is decoded twice to the end."""
    own = requests()
    order = []
    plain = batches_of.completed

    def completed(generation, request):
        order.append(request.row)
        return plain(generation, request)

    with monkeypatch.context() as patch:
        patch.setattr(batches_of, "completed", completed)
        Shortage(patch, Lane, "commit", [0, 9])
        found = list(decoder().respond_all(own, MANY))
    assert sorted(order) == list(range(len(own)))
    assert_all_equal(found, alone())
