"""Processors and the stopping criterion inside `model.generate`, against greedy search and the ARGS decoder."""

import math

import pytest
import torch
from transformers import LogitsProcessor, TemperatureLogitsWarper

from ggro_hf import ARGS, EntropyGate, EntropyStoppingCriteria, RewardGuidedLogitsProcessor, RewardModel
from ggro_hf.rewards import Capabilities, Reward, Scoring
from tests.ggro_hf.small_models import END_OF_TURN, PAD, small_policy, small_reward, small_tokenizer

VOCABULARY = 300
PROMPT = [5, 9, 33, 7, 12]
ROWS = [PROMPT, [44, 45], [7, 8, 9, 10, 11, 12, 13]]
NEW_TOKENS = 20


@pytest.fixture(scope="module")
def policy():
    # Without end-of-sequence, unless a test names one.
    return small_policy(seed=0, vocabulary=VOCABULARY, gain=2.0, eos_token_ids=())


@pytest.fixture(scope="module")
def reward():
    return RewardModel(small_reward(seed=1, vocabulary=VOCABULARY), small_tokenizer())


class SetReward(Reward):
    """How many different tokens a sequence has, modulo 3; counts what it is asked."""

    def __init__(self, reward_of=lambda token_ids: float(len(set(token_ids)) % 3)):
        self.reward_of = reward_of
        self.opened = []
        self.scored_tokens = 0

    @property
    def capabilities(self):
        return Capabilities(reads_ids=True, cached_prefix=True, tree=False, gradient=False, max_tokens=None)

    def open(self, conversation, counters, max_new_tokens):
        self.opened.append((list(conversation.prompt_ids), max_new_tokens))
        return SetScoring(self, list(conversation.prompt_ids))


class SetScoring(Scoring):
    def __init__(self, reward, token_ids):
        self.reward, self.sequences, self.last = reward, [token_ids], None

    def score(self, continuations):
        self.last = [
            [sequence + ids for ids in own] for sequence, own in zip(self.sequences, continuations, strict=True)
        ]
        self.reward.scored_tokens += sum(len(ids) for own in continuations for ids in own)
        return [[self.reward.reward_of(ids) for ids in own] for own in self.last]

    def keep(self, chosen):
        self.sequences = [self.last[sequence][number] for sequence, number in chosen]


def generate(policy, rows, new_tokens=NEW_TOKENS, **options):
    """The new tokens of every row of a left-padded batch."""
    longest = max(map(len, rows))
    ids = torch.tensor([[PAD] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    options = {"do_sample": False, "pad_token_id": PAD} | options
    return policy.generate(ids, attention_mask=mask, max_new_tokens=new_tokens, **options)[:, longest:].tolist()


def guided(reward, **settings):
    settings = {"weight": 4.0, "candidates": 6, "max_new_tokens": NEW_TOKENS, "pad_token_id": PAD} | settings
    return RewardGuidedLogitsProcessor(reward, **settings)


def by_args(policy, reward, row, new_tokens=NEW_TOKENS, eos_token_id=None, **settings):
    decoder = ARGS(reward, **({"weight": 4.0, "candidates": 6} | settings))
    ids = torch.tensor([row])
    output = policy.generate(ids, custom_generate=decoder, max_new_tokens=new_tokens, eos_token_id=eos_token_id)
    return output[0, len(row) :].tolist()


# Reward-guided


@pytest.mark.parametrize("settings", [{"weight": 0.0}, {"candidates": 1}])
def test_no_weight_or_no_choice_is_greedy(policy, reward, settings):
    processor = guided(reward, **settings)
    assert generate(policy, ROWS, logits_processor=[processor]) == generate(policy, ROWS)


@pytest.mark.parametrize("settings", [{}, {"weight": 0.5, "candidates": 20}, {"weight": -3.0}])
def test_greedy_search_gives_the_tokens_of_args(policy, reward, settings):
    (tokens,) = generate(policy, [PROMPT], logits_processor=[guided(reward, **settings)])
    assert tokens == by_args(policy, reward, PROMPT, **settings) != generate(policy, [PROMPT])[0]


def test_only_candidates_have_a_score(policy, reward):
    ids = torch.tensor([PROMPT])
    logits = policy(ids).logits[:, -1].float()
    scores = guided(reward)(ids, logits)
    tokens = logits[0].topk(6).indices
    rewards = torch.tensor([reward.score([*PROMPT, token]) for token in tokens.tolist()])
    assert torch.allclose(scores[0, tokens], logits[0, tokens] + 4.0 * rewards)
    assert (scores > -torch.inf).sum() == 6


def test_rows_of_a_left_padded_batch_are_single_runs(policy, reward):
    batch = generate(policy, ROWS, logits_processor=[guided(reward)])
    assert batch == [by_args(policy, reward, row) for row in ROWS]


def test_rows_that_end_early_are_left_alone(policy, reward):
    (tokens,) = generate(policy, [PROMPT], logits_processor=[guided(reward)])
    eos = tokens[4]
    batch = generate(policy, ROWS, logits_processor=[guided(reward)], eos_token_id=eos)
    assert batch[0] == tokens[:5] + [PAD] * (len(batch[0]) - 5)
    for row, generated in zip(ROWS, batch, strict=True):
        expected = by_args(policy, reward, row, eos_token_id=eos)
        assert generated == expected + [PAD] * (len(generated) - len(expected))


def test_a_finished_row_costs_nothing(policy):
    counting = SetReward()
    processor = guided(counting)
    scores = torch.randn(2, VOCABULARY)
    processor(torch.tensor([[5, 6], [7, 8]]), scores)
    processor(torch.tensor([[5, 6, END_OF_TURN], [7, 8, 9]]), scores)
    scored = counting.scored_tokens
    for padding in ([PAD], [PAD, PAD]):
        rest = [10, 11][: len(padding)]
        out = processor(torch.tensor([[5, 6, END_OF_TURN, *padding], [7, 8, 9, *rest]]), scores)
        assert torch.equal(out[0], scores[0]) and out[1].isinf().any()
    assert len(counting.opened) == 2
    # Six candidates for each of two steps, and tokens chosen that were no candidates.
    assert 12 <= counting.scored_tokens - scored <= 14


def test_generations_in_a_row_with_one_object(policy, reward):
    processor = guided(reward)
    for row in (PROMPT, PROMPT, ROWS[1], PROMPT[:-1], [*PROMPT, 9, 9, 9]):
        for new_tokens in (1, 12):
            (tokens,) = generate(policy, [row], new_tokens, logits_processor=[processor])
            assert tokens == by_args(policy, reward, row, new_tokens)


def test_continuing_a_response_and_going_beyond_its_length(policy, reward):
    processor = guided(reward, max_new_tokens=7)
    (first,) = generate(policy, [PROMPT], 7, logits_processor=[processor])
    (rest,) = generate(policy, [PROMPT + first], 13, logits_processor=[processor])
    assert first + rest == by_args(policy, reward, PROMPT)


def test_each_step_computes_its_candidates_alone(policy):
    counting = SetReward()
    (tokens,) = generate(policy, [PROMPT], logits_processor=[guided(counting)])
    assert counting.opened == [(PROMPT, NEW_TOKENS)]
    assert counting.scored_tokens == 6 * len(tokens) == 6 * NEW_TOKENS
    assert generate(policy, [PROMPT], logits_processor=[guided(counting)]) == [by_args(policy, SetReward(), PROMPT)]


def test_the_counters_have_the_reward_tokens(policy, reward):
    processor = guided(reward)
    generate(policy, [PROMPT], logits_processor=[processor])
    assert processor.counters.reward_forward_tokens == len(PROMPT) + 6 * NEW_TOKENS


def test_reset_forgets_and_an_error_does_too():
    counting = SetReward()
    processor = guided(counting)
    scores = torch.randn(1, VOCABULARY)
    processor(torch.tensor([PROMPT]), scores)
    processor.reset()
    processor(torch.tensor([[*PROMPT, 8]]), scores)
    assert [prompt for prompt, _ in counting.opened] == [PROMPT, [*PROMPT, 8]]
    with pytest.raises(FloatingPointError):
        processor(torch.tensor([[*PROMPT, 8, 9]]), torch.full_like(scores, torch.nan))
    processor(torch.tensor([[*PROMPT, 8, 9]]), scores)
    assert [prompt for prompt, _ in counting.opened][2:] == [[*PROMPT, 8, 9]]


def test_rows_are_found_where_they_went():
    counting = SetReward()
    processor = guided(counting)
    scores = torch.randn(3, VOCABULARY)
    processor(torch.tensor([[5, 6], [7, 8], [9, 10]]), scores)
    # Beams: the third first, the first twice.
    processor(torch.tensor([[9, 10, 4], [5, 6, 4], [5, 6, 8]]), scores)
    assert [prompt for prompt, _ in counting.opened] == [[5, 6], [7, 8], [9, 10], [5, 6, 8]]


def test_beam_search_runs_and_does_not_depend_on_what_is_remembered(policy, reward):
    class Forgetting(RewardGuidedLogitsProcessor):
        def __call__(self, input_ids, scores):
            self.reset()
            return super().__call__(input_ids, scores)

    settings = {"weight": 1.0, "candidates": 6, "max_new_tokens": NEW_TOKENS, "pad_token_id": PAD}
    beams = [
        generate(policy, ROWS, logits_processor=[kind(reward, **settings)], num_beams=3)
        for kind in (RewardGuidedLogitsProcessor, Forgetting)
    ]
    assert beams[0] == beams[1]


def test_sampling_draws_from_the_candidates(policy):
    draws = [generate(policy, [PROMPT], 1, logits_processor=[guided(SetReward())], do_sample=True)[0][0]]
    torch.manual_seed(0)
    for _ in range(40):
        draws += generate(policy, [PROMPT], 1, logits_processor=[guided(SetReward())], do_sample=True)[0]
    likeliest = policy(torch.tensor([PROMPT])).logits[0, -1].topk(6).indices.tolist()
    assert set(draws) <= set(likeliest) and len(set(draws)) > 1


def test_rewards_that_are_nan_never_win(policy):
    odd = SetReward(lambda token_ids: math.nan if token_ids[-1] % 2 else 0.0)
    (tokens,) = generate(policy, [PROMPT], logits_processor=[guided(odd, candidates=40)])
    assert all(token % 2 == 0 for token in tokens)
    with pytest.raises(FloatingPointError, match="NaN for every candidate"):
        generate(policy, [PROMPT], logits_processor=[guided(SetReward(lambda token_ids: math.nan))])


def test_tokens_that_another_processor_forbade_stay_forbidden(policy):
    forbidden = generate(policy, [PROMPT], 1)[0][0]
    counting = SetReward()
    scores = torch.full((1, VOCABULARY), -torch.inf)
    scores[0, :3] = torch.tensor([1.0, 3.0, 2.0])
    out = guided(counting)(torch.tensor([PROMPT]), scores)
    assert counting.scored_tokens == 3 and out[0, 3:].isinf().all() and out[0, :3].isfinite().all()
    bad = generate(policy, [PROMPT], logits_processor=[guided(SetReward())], bad_words_ids=[[forbidden]])
    assert forbidden not in bad[0]


def test_bad_settings(reward):
    with pytest.raises(TypeError, match="reward is a function, but must be"):
        RewardGuidedLogitsProcessor(lambda text: 0.0)
    for settings, message in (
        ({"weight": math.nan}, "weight is nan"),
        ({"weight": math.inf}, "weight is inf"),
        ({"candidates": 0}, "candidates is 0"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            guided(reward, **settings)
    other = small_tokenizer()
    other.add_tokens(["<|another|>"])
    with pytest.raises(ValueError, match="vocabulary"):
        guided(reward, tokenizer=other)


def test_bad_input(policy, reward):
    scores = torch.zeros(1, VOCABULARY)
    with pytest.raises(ValueError, match="candidates is 400, but the vocabulary has 300 tokens"):
        guided(reward, candidates=400)(torch.tensor([PROMPT]), scores)
    with pytest.raises(ValueError, match="row 1 of input_ids has no tokens but padding"):
        guided(reward)(torch.tensor([PROMPT, [PAD] * 5]), scores.expand(2, -1))
    with pytest.raises(FloatingPointError, match="logits hold NaN"):
        guided(reward)(torch.tensor([PROMPT]), torch.full_like(scores, torch.nan))
    with pytest.raises(ValueError, match="context"):
        generate(policy, [PROMPT], logits_processor=[guided(reward, max_new_tokens=600)])


# The gate


class Recording(LogitsProcessor):
    """Forbids the likeliest token and remembers its calls."""

    def __init__(self):
        self.calls = []

    def __call__(self, input_ids, scores):
        self.calls.append(input_ids.shape)
        return scores.scatter(1, scores.argmax(-1, keepdim=True), -torch.inf)


def entropies_of(scores):
    probabilities = scores.double().softmax(-1)
    return torch.special.entr(probabilities).sum(-1)


@torch.no_grad()
def entropies_along(policy, row, tokens):
    """Of the position before each token."""
    return entropies_of(policy(torch.tensor([row + tokens])).logits[0, len(row) - 1 : -1])


@pytest.fixture(scope="module")
def threshold(policy):
    """That a fifth of the greedy tokens reach."""
    tokens = generate(policy, ROWS)
    entropies = [entropies_along(policy, row, own) for row, own in zip(ROWS, tokens, strict=True)]
    return float(torch.cat(entropies).quantile(0.8))


def test_a_closed_gate_changes_nothing_and_asks_nobody(policy):
    inner = Recording()
    gate = EntropyGate(math.inf, inner)
    assert generate(policy, ROWS, logits_processor=[gate]) == generate(policy, ROWS)
    assert inner.calls == []


def test_an_open_gate_is_the_inner_processor(policy, reward):
    gate = EntropyGate(0.0, guided(reward))
    assert generate(policy, ROWS, logits_processor=[gate]) == generate(policy, ROWS, logits_processor=[guided(reward)])


def test_a_gate_opens_by_row():
    torch.manual_seed(0)
    scores = torch.randn(5, VOCABULARY) * torch.tensor([[0.1], [9.0], [0.5], [30.0], [1.0]])
    ids = torch.tensor([PROMPT] * 5)
    inner = Recording()
    entropies = entropies_of(scores)
    gate = EntropyGate(float(entropies.median()) - 1e-3, inner)
    out = gate(ids, scores)
    assert torch.allclose(gate.entropies.double(), entropies, atol=1e-4)
    is_open = entropies >= gate.threshold
    assert is_open.sum() == 3 and inner.calls == [(5, 5)]
    assert torch.equal(out[~is_open], scores[~is_open])
    assert torch.equal(out[is_open], Recording()(ids, scores)[is_open])


def test_the_threshold_itself_opens():
    scores = torch.randn(1, VOCABULARY)
    gate = EntropyGate(0.0)
    gate(torch.tensor([PROMPT]), scores)
    inner = Recording()
    EntropyGate(gate.entropies.item(), inner)(torch.tensor([PROMPT]), scores)
    assert len(inner.calls) == 1


def test_a_gate_in_front_of_the_reward_guides_uncertain_tokens_alone(policy, reward, threshold):
    """The same search written out, everything computed anew."""
    sequence, opened = list(PROMPT), 0
    for _ in range(NEW_TOKENS):
        with torch.no_grad():
            logits = policy(torch.tensor([sequence])).logits[0, -1]
        tokens = logits.topk(6).indices
        if entropies_of(logits) >= threshold:
            opened += 1
            rewards = torch.tensor([reward.score([*sequence, token]) for token in tokens.tolist()])
            sequence.append(int(tokens[(logits[tokens] + 4.0 * rewards).argmax()]))
        else:
            sequence.append(int(tokens[0]))
    assert 0 < opened < NEW_TOKENS
    gate = EntropyGate(threshold, guided(reward))
    assert generate(policy, [PROMPT], logits_processor=[gate]) == [sequence[len(PROMPT) :]]
    counting = SetReward()
    generate(policy, [PROMPT], logits_processor=[EntropyGate(threshold, guided(counting))])
    assert len(counting.opened) == 1


def test_bad_gates():
    with pytest.raises(ValueError, match="threshold is NaN"):
        EntropyGate(math.nan)
    with pytest.raises(FloatingPointError, match="logits hold NaN"):
        EntropyGate(1.0, Recording())(torch.tensor([PROMPT]), torch.full((1, VOCABULARY), torch.nan))
    assert EntropyGate.supports_continuous_batching is RewardGuidedLogitsProcessor.supports_continuous_batching is False


# The criterion


def stop_of(policy, row, tokens, threshold, minimum):
    """Number of new tokens at which a row stops, given what it decodes without stopping."""
    uncertain = (entropies_along(policy, row, tokens) >= threshold).tolist()
    return next((number for number, stops in enumerate(uncertain, 1) if stops and number >= minimum), len(tokens))


@pytest.mark.parametrize("minimum", [1, 4])
def test_rows_stop_at_the_first_uncertain_token(policy, threshold, minimum):
    plain = generate(policy, ROWS)
    gate = EntropyGate(threshold)
    criterion = EntropyStoppingCriteria(gate, min_new_tokens=minimum)
    stopped = generate(policy, ROWS, logits_processor=[gate], stopping_criteria=[criterion], eos_token_id=PAD)
    lengths = [stop_of(policy, row, tokens, threshold, minimum) for row, tokens in zip(ROWS, plain, strict=True)]
    assert len(set(lengths)) > 1 and min(lengths) >= minimum and min(lengths) < NEW_TOKENS
    for tokens, expected, length in zip(stopped, plain, lengths, strict=True):
        assert tokens[:length] == expected[:length] and set(tokens[length:]) <= {PAD}


def test_segments_one_after_another_are_greedy_search(policy, threshold):
    (plain,) = generate(policy, [PROMPT])
    gate = EntropyGate(threshold)
    criterion = EntropyStoppingCriteria(gate, min_new_tokens=3)
    tokens, segments = [], []
    while len(tokens) < NEW_TOKENS:
        options = {"logits_processor": [gate], "stopping_criteria": [criterion]}
        (segment,) = generate(policy, [PROMPT + tokens], NEW_TOKENS - len(tokens), **options)
        segments.append(segment)
        tokens += segment
    assert tokens == plain
    assert len(segments) > 2 and all(len(segment) >= 3 for segment in segments[:-1])
    start = 0
    for segment in segments[:-1]:
        assert len(segment) == stop_of(policy, PROMPT + plain[:start], plain[start:], threshold, 3)
        start += len(segment)


def test_a_criterion_without_its_gate(policy):
    gate = EntropyGate(1.0)
    criterion = EntropyStoppingCriteria(gate)
    with pytest.raises(ValueError, match=r"has not seen this step.*logits_processor=\[gate\]"):
        generate(policy, [PROMPT], stopping_criteria=[criterion])
    generate(policy, ROWS, 3, logits_processor=[gate])
    with pytest.raises(ValueError, match="has not seen this step"):
        generate(policy, [PROMPT], stopping_criteria=[criterion])
    with pytest.raises(ValueError, match="min_new_tokens is 0"):
        EntropyStoppingCriteria(gate, min_new_tokens=0)


def test_the_gate_sees_scores_as_they_are_where_it_stands(policy):
    before, after = EntropyGate(0.0), EntropyGate(0.0)
    generate(policy, [PROMPT], 1, logits_processor=[before, TemperatureLogitsWarper(0.5), after])
    logits = policy(torch.tensor([PROMPT])).logits[:, -1]
    assert torch.allclose(before.entropies.double(), entropies_of(logits), atol=1e-4)
    assert torch.allclose(after.entropies.double(), entropies_of(2 * logits), atol=1e-4)
