"""The decoders as objects: the three ways to call one, what they refuse, sampling and best-of-N."""

from time import sleep

import pytest
import torch
from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor, StoppingCriteriaList
from transformers.generation import MaxTimeCriteria
from transformers.generation.streamers import BaseStreamer

import ggro_hf
from ggro_hf import ARGS, CARDS, GGRO, PRESETS, BestOfN, ChunkBeamSearch, Greedy, RewardModel, Sample, generate
from ggro_hf.decoding.base import Request, end_of_sequence_ids, peak_bytes
from tests.ggro_hf.device_cases import DECODERS
from tests.ggro_hf.small_models import PAD, small_policy, small_reward, small_tokenizer

VOCABULARY = 300
PROMPT = [5, 9, 33, 7, 12]


@pytest.fixture(scope="module")
def policy():
    return small_policy(seed=0, vocabulary=VOCABULARY, gain=2.0)


@pytest.fixture(scope="module")
def reward():
    return RewardModel(small_reward(seed=1, vocabulary=VOCABULARY), small_tokenizer())


def all_decoders(reward):
    return {name: make(reward) for name, make in DECODERS.items() if "," not in name}


NAMES = tuple(name for name in DECODERS if "," not in name)
GUIDED = tuple(name for name in NAMES if name not in ("greedy", "sample"))


@pytest.mark.parametrize("name", NAMES)
def test_three_ways_to_call_give_the_same_tokens(policy, reward, name):
    decoder = all_decoders(reward)[name]
    ids = torch.tensor([PROMPT])
    output = decoder(policy, ids, max_new_tokens=20)
    generated = policy.generate(ids, custom_generate=decoder, max_new_tokens=20, pad_token_id=PAD)
    assert torch.equal(generated, output.sequences)
    named = policy.generate(ids, custom_generate=decoder, max_new_tokens=20, return_dict_in_generate=True)
    assert torch.equal(named.sequences, output.sequences)
    assert named.generations[0].trace.entropies == output.generations[0].trace.entropies

    tokenizer = small_tokenizer()
    (generation,) = generate(policy, tokenizer, ["the and"], decoder, max_new_tokens=20, progress=False)
    again = decoder(policy, torch.tensor([generation.prompt_ids]), max_new_tokens=20).generations[0]
    assert generation.token_ids == again.token_ids
    assert generation.text == tokenizer.decode(generation.token_ids, skip_special_tokens=True)
    assert len(generation.trace.entropies) == len(generation.token_ids)


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_a_left_padded_batch_equal_single_runs(policy, reward, name):
    decoder = all_decoders(reward)[name]
    rows = [PROMPT, [44, 45], [7, 8, 9, 10, 11, 12, 13]]
    longest = max(map(len, rows))
    ids = torch.tensor([[PAD] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    output = decoder(policy, ids, attention_mask=mask, max_new_tokens=12)
    for index, row in enumerate(rows):
        single = decoder.respond(Request(policy, row, 12, end_of_sequence_ids(policy), index))
        assert output.generations[index].token_ids == single.token_ids
        width = len(single.token_ids)
        assert output.sequences[index, longest : longest + width].tolist() == single.token_ids
        assert (output.sequences[index, longest + width :] == PAD).all()
    generated = policy.generate(ids, attention_mask=mask, custom_generate=decoder, max_new_tokens=12)
    assert torch.equal(generated, output.sequences)


@pytest.mark.parametrize("name", NAMES)
def test_a_default_device_of_the_caller_does_not_matter(policy, reward, name):
    decoder = all_decoders(reward)[name]
    ids = torch.tensor([PROMPT])
    expected = decoder(policy, ids, max_new_tokens=8).sequences
    # A tensor made without naming its device would hold nothing.
    with torch.device("meta"):
        sequences = decoder(policy, ids, max_new_tokens=8).sequences
    assert torch.equal(sequences, expected)


def test_peak_memory_is_that_of_all_gpus_or_of_the_process(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", [300, 70].__getitem__)
    assert peak_bytes(torch.device("cuda", 1)) == 370
    assert peak_bytes(torch.device("cpu")) > 1 << 24


def test_the_prefill_is_timed_until_its_result_is_read(policy, monkeypatch):
    def read_slowly(*tensors):
        sleep(0.2)
        return list(tensors)

    monkeypatch.setattr("ggro_hf.policy.to_host", read_slowly)
    (generation,) = Greedy()(policy, torch.tensor([PROMPT]), max_new_tokens=1).generations
    assert generation.counters.seconds["prefill"] >= 0.2


def test_greedy_equals_generate(policy):
    ids = torch.tensor([PROMPT])
    expected = policy.generate(ids, do_sample=False, max_new_tokens=40)
    assert torch.equal(Greedy()(policy, ids, max_new_tokens=40).sequences, expected)


def test_sampling_settings_of_a_checkpoint_do_not_get_in_the_way(policy, reward):
    decoder = all_decoders(reward)["ggro"]
    ids = torch.tensor([PROMPT])
    plain = policy.generate(ids, custom_generate=decoder, max_new_tokens=10)
    sampling = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 40}
    assert torch.equal(policy.generate(ids, custom_generate=decoder, max_new_tokens=10, **sampling), plain)


def test_processors_and_criteria_that_would_be_ignored_are_refused(policy):
    ids = torch.tensor([PROMPT])
    with pytest.raises(ValueError, match=r"RepetitionPenaltyLogitsProcessor.*repetition_penalty=1.0"):
        policy.generate(ids, custom_generate=Greedy(), max_new_tokens=5, repetition_penalty=1.2)
    with pytest.raises(ValueError, match="logits_processor holds"):
        processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.2)])
        Greedy()(policy, ids, logits_processor=processors, max_new_tokens=5)
    with pytest.raises(ValueError, match="stopping_criteria holds MaxTimeCriteria"):
        Greedy()(policy, ids, stopping_criteria=StoppingCriteriaList([MaxTimeCriteria(1.0)]), max_new_tokens=5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("max_new_tokens", [0, -3])
def test_max_new_tokens_below_one(policy, reward, name, max_new_tokens):
    with pytest.raises(ValueError, match=f"max_new_tokens is {max_new_tokens}"):
        all_decoders(reward)[name](policy, torch.tensor([PROMPT]), max_new_tokens=max_new_tokens)


@pytest.mark.parametrize("name", NAMES)
def test_empty_prompts(policy, reward, name):
    decoder = all_decoders(reward)[name]
    with pytest.raises(ValueError, match="prompt has no tokens"):
        decoder(policy, torch.empty((1, 0), dtype=torch.long), max_new_tokens=5)
    with pytest.raises(ValueError, match="prompt is empty"):
        generate(policy, small_tokenizer(), [""], decoder, progress=False)


@pytest.mark.parametrize("name", NAMES)
def test_a_prompt_beyond_the_context(policy, reward, name):
    with pytest.raises(ValueError, match="need 522 positions, but the policy's context has 512"):
        all_decoders(reward)[name](policy, torch.tensor([[7] * 502]), max_new_tokens=20)


def test_a_reward_model_with_a_shorter_context(policy):
    reward = RewardModel(small_reward(seed=1, vocabulary=VOCABULARY, max_position_embeddings=16))
    for name in GUIDED:
        decoder = all_decoders(reward)[name]
        with pytest.raises(ValueError, match="the reward model's context has 16"):
            decoder(policy, torch.tensor([PROMPT]), max_new_tokens=20)


def test_malformed_masks_and_ids(policy):
    with pytest.raises(ValueError, match="pad prompts on the left"):
        Greedy()(policy, torch.tensor([[5, 6, PAD]]), attention_mask=torch.tensor([[1, 1, 0]]), max_new_tokens=5)
    with pytest.raises(ValueError, match="attention_mask has shape"):
        Greedy()(policy, torch.tensor([[5, 6]]), attention_mask=torch.tensor([[1]]), max_new_tokens=5)
    with pytest.raises(ValueError, match="input_ids has shape"):
        Greedy()(policy, torch.tensor([5, 6]), max_new_tokens=5)


@pytest.mark.parametrize("name", NAMES)
def test_logits_that_are_nan(reward, name):
    broken = small_policy(seed=0, vocabulary=VOCABULARY)
    broken.lm_head.weight[17, 3] = torch.nan
    with pytest.raises(FloatingPointError, match="policy's logits hold NaN"):
        all_decoders(reward)[name](broken, torch.tensor([PROMPT]), max_new_tokens=5)


@pytest.mark.parametrize("name", GUIDED)
def test_rewards_that_are_nan(policy, name):
    broken = RewardModel(small_reward(seed=1, vocabulary=VOCABULARY))
    broken.model.score.weight[0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match="NaN"):
        all_decoders(broken)[name](policy, torch.tensor([PROMPT]), max_new_tokens=5)


def test_an_error_names_the_row(policy):
    def fails(texts):
        if any("!" in text for text in texts):
            raise RuntimeError("no exclamation marks")
        return [0.0] * len(texts)

    tokenizer = small_tokenizer()
    decoder = BestOfN(ggro_hf.FunctionReward(fails), samples=2)
    with pytest.raises(RuntimeError, match=r"(?s)function.*the text 'Human: the!") as raised:
        generate(policy, tokenizer, ["the", "the!"], decoder, max_new_tokens=3, progress=False)
    assert raised.value.__notes__ == ["while decoding row 1"]
    assert "no exclamation marks" in str(raised.value.__cause__)


def test_a_policy_without_end_of_sequence_or_padding(reward):
    policy = small_policy(seed=0, vocabulary=VOCABULARY)
    policy.generation_config.eos_token_id = policy.config.eos_token_id = None
    policy.generation_config.pad_token_id = policy.config.pad_token_id = None
    for decoder in all_decoders(reward).values():
        generation = decoder(policy, torch.tensor([PROMPT]), max_new_tokens=9).generations[0]
        assert len(generation.token_ids) == 9
        assert generation.finish_reason == "length"


class Recorder(BaseStreamer):
    """Keeps what a streamer is given."""

    def __init__(self):
        self.received, self.ended = [], 0

    def put(self, value):
        self.received.append(value.tolist())

    def end(self):
        self.ended += 1


@pytest.mark.parametrize("name", NAMES)
def test_a_streamer_sees_the_prompt_then_every_token_once(policy, reward, name):
    decoder = all_decoders(reward)[name]
    decoder.streamer = Recorder()
    generation = decoder(policy, torch.tensor([PROMPT]), max_new_tokens=15).generations[0]
    prompt, *parts = decoder.streamer.received
    assert prompt == PROMPT
    assert [token for part in parts for token in part] == generation.token_ids
    assert decoder.streamer.ended == 1


def test_draws_depend_on_seed_and_row_only(policy):
    decoder = Sample(seed=11, temperature=1.3, top_k=50, top_p=0.95)
    alone = decoder.respond(Request(policy, PROMPT, 16, frozenset(), row=2)).token_ids
    together = decoder(policy, torch.tensor([PROMPT] * 3), max_new_tokens=16).generations
    assert together[2].token_ids[: len(alone)] == alone[: len(together[2].token_ids)]
    assert together[0].token_ids != together[1].token_ids
    assert Sample(seed=12)(policy, torch.tensor([PROMPT]), max_new_tokens=16).generations[0].token_ids != (
        Sample(seed=11)(policy, torch.tensor([PROMPT]), max_new_tokens=16).generations[0].token_ids
    )


def test_sampling_follows_the_policys_distribution(policy):
    with torch.no_grad():
        expected = policy(input_ids=torch.tensor([PROMPT])).logits[0, -1].softmax(-1)
    draws = Sample(seed=5)(policy, torch.tensor([PROMPT] * 1000), max_new_tokens=1).sequences[:, -1]
    observed = torch.bincount(draws, minlength=VOCABULARY) / len(draws)
    assert (observed - expected).abs().max() < 5 * (0.25 / len(draws)) ** 0.5


@pytest.mark.parametrize("settings", [{"temperature": -1.0}, {"top_k": 0}, {"top_p": 1.5}])
def test_sampling_settings_out_of_range(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        Sample(**settings)


def test_best_of_n_keeps_the_best_and_one_sample_is_sampling(policy, reward):
    ids = torch.tensor([PROMPT])
    best = BestOfN(reward, samples=6, seed=4)(policy, ids, max_new_tokens=14).generations[0]
    (segment,) = best.trace.segments
    rewards = [candidate.reward for candidate in segment.candidates]
    assert best.reward == max(rewards) == rewards[segment.chosen_index]
    assert len(set(rewards)) > 1
    for candidate in segment.candidates:
        assert candidate.reward == pytest.approx(reward.score([*PROMPT, *candidate.token_ids]), abs=1e-9)
    single = BestOfN(reward, samples=1, seed=4)(policy, ids, max_new_tokens=14).generations[0]
    assert single.token_ids == Sample(seed=4)(policy, ids, max_new_tokens=14).generations[0].token_ids
    assert best.counters.policy_tokens <= len(PROMPT) + 6 * 13
    assert best.counters.reward_forward_tokens == len(PROMPT) + sum(len(c.token_ids) for c in segment.candidates)


@pytest.mark.parametrize(
    "settings",
    [{"refinements": 0}, {"candidates": 0}, {"check_every": 0}, {"nudge_tokens": 0}, {"perplexity_ratio": 0.5}],
)
def test_ggro_settings_out_of_range(reward, settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        GGRO(reward, **settings)


def test_ggro_settings_that_do_not_fit(policy, reward):
    with pytest.raises(ValueError, match="needs tokenizer="):
        GGRO(reward, as_released=True)
    with pytest.raises(ValueError, match="candidates is 301, but the policy's vocabulary has 300"):
        GGRO(reward, candidates=301)(policy, torch.tensor([PROMPT]), max_new_tokens=5)
    with pytest.raises(ValueError, match="samples is 0"):
        BestOfN(reward, samples=0)


def test_more_candidates_than_the_kernel_selects(policy, reward):
    output = GGRO(reward, candidates=VOCABULARY, entropy_threshold=1.0)(
        policy, torch.tensor([PROMPT]), max_new_tokens=8
    )
    proposals = output.generations[0].trace.segments[0].base.proposals
    assert sorted(proposals) == list(range(VOCABULARY))


@pytest.mark.parametrize("name", PRESETS)
def test_presets(reward, name):
    preset = PRESETS[name]
    decoder = getattr(ggro_hf, preset.method).from_preset(name, reward)
    assert preset.source
    for setting, value in preset.settings.items():
        if hasattr(decoder, setting):
            assert getattr(decoder, setting) == value


def test_presets_can_be_changed_and_belong_to_a_method(reward):
    assert GGRO.from_preset("hh-rlhf-3b", reward).refinements == 3
    assert GGRO.from_preset("hh-rlhf-3b", reward, refinements=2).refinements == 2
    args = ARGS.from_preset("args-paper", reward)
    assert (args.weight, args.candidates) == (1.5, 30)
    beams = ChunkBeamSearch.from_preset("tbs-paper", reward)
    assert (beams.width, beams.successors, beams.chunk_length) == (8, 8, 1)
    assert CARDS.from_preset("cards-paper", reward).entropy_threshold == 7.0
    assert BestOfN.from_preset("bon-64", reward).samples == 64
    with pytest.raises(ValueError, match="preset 'hh' is unknown to GGRO; there are hex-phi-8b"):
        GGRO.from_preset("hh", reward)
    with pytest.raises(ValueError, match="preset 'review' is unknown to ARGS; there are args-paper"):
        ARGS.from_preset("review", reward)


def test_the_review_preset_checks_every_fifth_token_and_nudges_up_to_three(policy, reward):
    decoder = GGRO.from_preset("review", reward, entropy_threshold=0.5, perplexity_ratio=None)
    segments = decoder(policy, torch.tensor([PROMPT]), max_new_tokens=40).generations[0].trace.segments
    ends = [segment for segment in segments if segment.chosen.boundary_token is not None]
    assert ends
    for segment in ends:
        assert (len(segment.chosen.token_ids) + 1) % 5 == 0
    forced = [len(c.forced_tokens) for segment in segments for c in segment.candidates]
    assert max(forced) > 1
    assert max(forced) <= 3


def test_the_perplexity_guard_keeps_unlikely_candidates_from_winning(policy, reward):
    ids = torch.tensor([PROMPT])
    settings = {"entropy_threshold": 1.0, "refinements": 6}
    free = GGRO(reward, **settings)(policy, ids, max_new_tokens=24).generations[0]
    guarded = GGRO(reward, perplexity_ratio=1.0, **settings)(policy, ids, max_new_tokens=24).generations[0]
    assert free.trace.nudges > 0
    assert guarded.trace.nudges < free.trace.nudges


def test_rewards_of_the_trace_are_those_of_the_sequence(policy, reward):
    generation = GGRO(reward, entropy_threshold=1.0)(policy, torch.tensor([PROMPT]), max_new_tokens=24).generations[0]
    sequence = list(PROMPT)
    for segment in generation.trace.segments:
        assert segment.start == len(sequence)
        for candidate in segment.candidates:
            assert candidate.reward == pytest.approx(reward.score(sequence + list(candidate.token_ids)), abs=1e-9)
        sequence += segment.chosen.token_ids
    assert sequence == PROMPT + generation.token_ids
    assert generation.reward == pytest.approx(reward.score(sequence), abs=1e-9)
