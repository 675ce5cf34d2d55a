"""The engine equals a literal transcription of the published algorithm: random models and rigged edge cases, fp64."""

import random
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from math import inf, log

import pytest
import torch

from ggro_hf import GGRO, Generation, NoProgressError, RewardModel
from ggro_hf.results import Counters
from ggro_hf.rewards import RewardPrefix
from tests.ggro_hf.agreement import Tolerance, assert_agreement, duplicates
from tests.ggro_hf.released import ReleasedGGRO, Result, Settings, StateRepeats
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

EXACT = Tolerance(reward=1e-10, entropy=1e-9, score=1e-9)
# As released, the entropy is one of fp32 probabilities whatever the model's dtype.
EXACT_AS_RELEASED = Tolerance(reward=1e-10, entropy=5e-6, score=1e-9)
TOKENIZER = small_tokenizer()
BLOCKS, CASES_PER_BLOCK = 12, 20


@dataclass(frozen=True)
class Case:
    """Everything that a run needs; `released` chooses between the two modes of the library."""

    policy: torch.nn.Module
    reward: torch.nn.Module
    prompt: list[int]
    max_new_tokens: int
    entropy_threshold: float
    refinements: int = 8
    candidates: int = 25
    released: bool = False
    insertion_offset: int | None = None
    tokenizer: object = TOKENIZER

    def expected(self) -> Result:
        """What the transcription gives."""
        stop_ids = frozenset(self.policy.generation_config.eos_token_id)
        offset = self.insertion_offset
        if self.released:
            mode = {
                "state": "text",
                "finish_ids": frozenset({self.tokenizer.eos_token_id}),
                "insertion_offset": 4 if offset is None else offset,
                "probability_floor": 1e-9,
                "forcing": "bias",
            }
        else:
            mode = {
                "state": "ids",
                "finish_ids": stop_ids,
                "insertion_offset": 0 if offset is None else offset,
                "probability_floor": 0.0,
                "forcing": "id",
            }
        settings = Settings(
            max_new_tokens=self.max_new_tokens,
            entropy_threshold=self.entropy_threshold,
            refinements=self.refinements,
            candidates=self.candidates,
            stop_ids=stop_ids,
            **mode,
        )
        return ReleasedGGRO(self.policy, self.reward, self.tokenizer if self.released else None, settings)(self.prompt)

    def generation(self) -> Generation:
        """What the engine gives."""
        decoder = GGRO(
            RewardModel(self.reward),
            tokenizer=self.tokenizer if self.released else None,
            entropy_threshold=self.entropy_threshold,
            refinements=self.refinements,
            candidates=self.candidates,
            as_released=self.released,
            insertion_offset=self.insertion_offset,
        )
        output = decoder(self.policy, torch.tensor([self.prompt]), max_new_tokens=self.max_new_tokens)
        return output.generations[0]

    def agreed(self) -> Result:
        """Run both, compare everything, return the common result."""
        expected, generation = self.expected(), self.generation()
        assert_agreement(generation, expected, EXACT_AS_RELEASED if self.released else EXACT)
        assert generation.prompt_ids == self.prompt
        starts = [segment.start for segment in generation.trace.segments]
        assert starts[1:] == expected.boundaries[:-1]
        assert (generation.finish_reason == "eos") == expected.segments[-1].candidates[
            expected.segments[-1].best
        ].finished
        if self.released:
            self._assert_same_text(generation, expected)
        else:
            assert self.prompt + generation.token_ids == expected.ids
            assert generation.trace.entropies == pytest.approx(
                [entropy for segment in generation.trace.segments for entropy in segment.chosen.entropies], abs=1e-12
            )
            self._assert_least_work(generation)
        return expected

    def _assert_same_text(self, generation: Generation, expected: Result) -> None:
        # No text of these models has an assistant's header, so the response is the whole of it.
        assert generation.text == expected.text.strip()
        # The prompt is part of the text and may be other ids once it is encoded again.
        prompt = expected.segments[0].prefix_ids
        if expected.generated_ids[: len(prompt)] == prompt:
            assert generation.token_ids == expected.generated_ids[len(prompt) :]

    def _assert_least_work(self, generation: Generation) -> None:
        """No token goes through a model that the output does not need."""
        candidates = [candidate for segment in generation.trace.segments for candidate in segment.candidates]
        kept = sum(len(candidate.token_ids) for candidate in candidates)
        decoded = kept + sum(candidate.boundary_token is not None for candidate in candidates)
        counters = generation.counters
        assert counters.policy_tokens - counters.wasted_policy_tokens <= len(self.prompt) + decoded
        assert counters.reward_forward_tokens - counters.wasted_reward_tokens <= len(self.prompt) + kept
        assert counters.reward_backward_tokens - counters.wasted_reward_tokens <= kept


PRINTABLE = TOKENIZER.convert_tokens_to_ids([*"abcdefghijklmnopqrstuvwxyz.,'", "Ġ", "th", "an", "er", "Ġthe"])


def retokenised_length(ids: list[int]) -> int:
    return len(TOKENIZER(TOKENIZER.decode(ids), add_special_tokens=False).input_ids)


def random_case(seed: int) -> Case:
    """Two cases in five have the state as text; thresholds cover the range of the model's entropies."""
    draw = random.Random(seed)
    released = seed % 5 in (1, 3)
    vocabulary = len(TOKENIZER) if released else draw.randrange(60, 301)
    shape = {"hidden": draw.choice([16, 24, 32]), "layers": draw.choice([1, 2, 3])}
    eos_token_ids = draw.choice([(END_OF_TURN,), (END_OF_TURN,), (END_OF_TURN, END_OF_TEXT), (END_OF_TURN, 17, 40)])
    policy = small_policy(
        seed=seed, vocabulary=vocabulary, gain=draw.choice([1.5, 3.0, 5.0]), eos_token_ids=eos_token_ids, **shape
    )
    reward = small_reward(
        seed=seed + 1, vocabulary=vocabulary, hidden=draw.choice([16, 24]), layers=draw.choice([1, 2])
    )
    max_new_tokens = draw.choice([1, 3, 4, 5, 9, 16, 24, 32])
    prompt = [draw.randrange(PAD + 1, vocabulary) for _ in range(draw.randrange(1, 24))]
    if released:
        while retokenised_length(prompt) >= len(prompt) + max_new_tokens:
            prompt = [draw.choice(PRINTABLE) for _ in prompt]
    return Case(
        policy=policy,
        reward=reward,
        prompt=prompt,
        max_new_tokens=max_new_tokens,
        entropy_threshold=draw.choice([0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, inf]),
        refinements=draw.choice([1, 2, 3, 5, 8]),
        candidates=draw.choice([1, 2, 5, 25, 25, 60]),
        released=released,
        insertion_offset=draw.choice([None, None, 0, 1, 4]) if not released else draw.choice([None, None, 0]),
    )


@cache
def agreed_block(block: int) -> list[tuple[Case, Result | None]]:
    """Cases with their common results; none where both say that there is no progress."""
    agreed: list[tuple[Case, Result | None]] = []
    for seed in range(block * CASES_PER_BLOCK, (block + 1) * CASES_PER_BLOCK):
        case = random_case(seed)
        try:
            expected = case.expected()
        except StateRepeats:
            with pytest.raises(NoProgressError):
                case.generation()
            agreed.append((case, None))
            continue
        try:
            case.agreed()
        except Exception as error:
            raise AssertionError(f"random case {seed}: {error}") from error
        agreed.append((case, expected))
    return agreed


@pytest.mark.parametrize("block", range(BLOCKS))
def test_random_cases_agree(block):
    assert len(agreed_block(block)) == CASES_PER_BLOCK


def test_random_cases_reach_what_they_are_meant_to_reach():
    runs = [run for block in range(BLOCKS) for run in agreed_block(block)]
    results = [(case, result) for case, result in runs if result is not None]
    segments = [(case, segment) for case, result in results for segment in result.segments]
    assert len(runs) >= 200
    assert len({case.policy.config.vocab_size for case, _ in runs}) > 50
    assert sum(result.nudges for _, result in results) > 100
    assert duplicates(result for _, result in results) > 100
    assert sum(len(segment.candidates) == case.refinements for case, segment in segments) > 100
    assert any(c.finished for _, segment in segments for c in segment.candidates)
    assert any(len(c.ids) - s.start <= s.insertion_offset and c.duplicate for _, s in segments for c in s.candidates)
    retokenised = [r for _, r in results if r.text is not None and r.ids != r.generated_ids]
    assert len(retokenised) > 10
    # With its id forced, the current token always is one of the policy's likeliest.
    for _, segment in segments:
        for candidate in segment.candidates:
            if candidate.top_ids:
                assert candidate.ids[segment.start + segment.insertion_offset] in candidate.top_ids


def test_the_cost_of_the_released_code_changes_no_output():
    policy, reward = small_policy(seed=3, vocabulary=VOCABULARY, gain=3.0), small_reward(seed=4, vocabulary=VOCABULARY)
    end = frozenset({END_OF_TURN})
    plain, costly = (
        ReleasedGGRO(policy, reward, TOKENIZER, Settings(24, 1.5, 4, stop_ids=end, finish_ids=end, released_cost=cost))(
            [K, M, P]
        )
        for cost in (False, True)
    )
    assert (costly.ids, costly.boundaries, costly.nudges) == (plain.ids, plain.boundaries, plain.nudges)
    assert costly.nudges > 0 and costly.reward == pytest.approx(plain.reward, abs=1e-10)
    passes = [(segment.start, candidate) for segment in costly.segments for candidate in segment.candidates]
    # Each pass encodes its prefix once and then one token a step; reward passes come in pairs, duplicates included.
    assert costly.policy_tokens == sum(start + len(candidate.raw_ids) - 1 for start, candidate in passes)
    assert costly.reward_forward_tokens == 2 * sum(len(candidate.ids) for _, candidate in passes)
    assert costly.reward_backward_tokens == sum(len(c.ids) for _, c in passes if not c.duplicate)


# Edge cases. A scripted policy reads its last token alone; these letters never merge with their neighbours.
K, M, P, Q, U, V = TOKENIZER.convert_tokens_to_ids(["k", "m", "p", "q", "u", "v"])
LETTERS = [K, M, P, Q, U, V]
VOCABULARY = len(TOKENIZER)


def script(*sure: tuple[int, int], unsure: dict[int, list[int]] | None = None) -> torch.Tensor:
    """Logits `[V, V]`: after the first of a `sure` pair the second is almost certain; `unsure` rows rank the ids given.

    Unsure rows, and all others, spread over the whole vocabulary, the lowest ids a little ahead.
    """
    table = -1e-3 * torch.arange(VOCABULARY, dtype=torch.float64).repeat(VOCABULARY, 1)
    for previous, following in sure:
        table[previous] = -30.0
        table[previous, following] = 30.0
    for previous, order in (unsure or {}).items():
        for rank, token in enumerate(order):
            table[previous, token] = 1.0 - 0.1 * rank
    return table


def worth(**values: float) -> torch.Tensor:
    """A value for each letter; every other token is worth `other`."""
    names = {"k": K, "m": M, "p": P, "q": Q, "u": U, "v": V, "eot": END_OF_TURN, "end": END_OF_TEXT}
    table = torch.full((VOCABULARY,), values.pop("other", 0.0), dtype=torch.float64)
    for name, value in values.items():
        table[names[name]] = value
    return table


def edge_case(logits, values, *, eos=(END_OF_TURN,), **settings) -> Case:
    settings = {"prompt": [K], "max_new_tokens": 12, "entropy_threshold": 2.0, **settings}
    return Case(scripted_policy(logits, eos_token_ids=eos), scripted_reward(values), **settings)


BOTH_MODES = pytest.mark.parametrize(
    "mode", [{}, {"released": True, "insertion_offset": 0}], ids=["default", "released"]
)


@pytest.mark.parametrize("mode", [{"released": True}, {"insertion_offset": 4}], ids=["released", "default"])
def test_a_candidate_that_ends_before_the_offset_is_repeated(mode):
    cycle = script(unsure={K: [M, P], M: [P, Q], P: [Q, U], Q: [U, V], U: [V, K], V: [K, M]})
    result = edge_case(cycle, worth(q=1.0, v=2.0), entropy_threshold=0.0, **mode).agreed()
    first = result.segments[0]
    assert first.insertion_offset == 4
    assert [len(c.ids) - first.start for c in first.candidates] == [3, 3]
    assert first.candidates[1].duplicate and first.candidates[1].forced is None and first.candidates[0].proposal is None


@BOTH_MODES
def test_end_of_turn_may_be_nudged_to(mode):
    logits = script((M, P), (P, Q), (Q, U), (U, V), (V, M), unsure={K: [M, END_OF_TURN]})
    result = edge_case(logits, worth(eot=5.0, other=-1.0), **mode).agreed()
    first = result.segments[0]
    assert first.candidates[0].ids[first.start] == M
    assert first.candidates[1].forced == END_OF_TURN and first.candidates[1].ids == [K, END_OF_TURN]
    assert first.best == 1 and result.ids == [K, END_OF_TURN]


@BOTH_MODES
def test_end_of_turn_at_a_high_entropy_position_ends_the_response(mode):
    logits = script((K, M), (M, P), (P, Q), unsure={Q: [END_OF_TURN, U]})
    result = edge_case(logits, worth(q=1.0), refinements=1, **mode).agreed()
    (candidate,) = result.segments[0].candidates
    assert candidate.finished and candidate.entropies[-1] > 2.0 and len(candidate.entropies) == 4
    assert result.ids == [K, M, P, Q, END_OF_TURN]


STOPS = (END_OF_TURN, END_OF_TEXT)


@pytest.mark.parametrize(
    ("logits", "values", "refinements"),
    [
        (script((K, END_OF_TEXT)), worth(), 1),
        (script((K, M), (M, P), (P, END_OF_TEXT)), worth(), 1),
        (
            script((M, P), (P, Q), (Q, U), (U, V), (V, M), unsure={K: [M, END_OF_TEXT]}),
            worth(k=9.0, end=5.0, other=-5.0),
            3,
        ),
    ],
    ids=["first", "mid-segment", "by a nudge"],
)
def test_another_end_token_makes_the_released_code_loop_and_ends_the_default(logits, values, refinements):
    case = edge_case(logits, values, eos=STOPS, refinements=refinements)
    released = edge_case(logits, values, eos=STOPS, refinements=refinements, released=True, insertion_offset=0)
    with pytest.raises(StateRepeats):
        released.expected()
    with pytest.raises(NoProgressError):
        released.generation()
    result = case.agreed()
    assert result.ids[-1] == END_OF_TEXT and result.segments[-1].candidates[result.segments[-1].best].finished


def test_a_first_segment_without_progress_loses_the_users_end_of_turn():
    logits = script((END_OF_TURN, END_OF_TEXT), (K, M), (M, P), (P, END_OF_TURN))
    result = edge_case(logits, worth(), eos=STOPS, prompt=[P, Q, K, END_OF_TURN], released=True).agreed()
    assert result.segments[0].candidates[0].ids == [P, Q, K, END_OF_TURN]
    assert result.segments[1].prefix_ids == [P, Q, K]
    assert result.ids == [P, Q, K, M, P, END_OF_TURN]


@BOTH_MODES
@pytest.mark.parametrize(
    ("max_new_tokens", "kept"), [(1, [1]), (3, [3]), (4, [4]), (5, [3, 2]), (7, [3, 4]), (8, [3, 3, 2])]
)
def test_the_last_token_is_kept_at_the_full_length(mode, max_new_tokens, kept):
    logits = script(unsure={K: [M], M: [P], P: [Q], Q: [U], U: [V], V: [K]})
    result = edge_case(
        logits, worth(), max_new_tokens=max_new_tokens, entropy_threshold=0.0, refinements=1, **mode
    ).agreed()
    assert [len(segment.candidates[0].ids) - segment.start for segment in result.segments] == kept
    assert len(result.ids) == 1 + max_new_tokens
    if kept[-1] == 4:
        assert result.segments[-1].candidates[0].entropies[-1] > 2.0


@BOTH_MODES
def test_a_threshold_that_is_never_reached_gives_one_segment(mode):
    logits = script(unsure={K: [M], M: [P], P: [Q], Q: [U], U: [V], V: [K]})
    result = edge_case(logits, worth(u=1.0, v=1.0), entropy_threshold=inf, refinements=3, **mode).agreed()
    assert len(result.segments) == 1 and len(result.segments[0].candidates) == 3
    assert edge_case(logits, worth(), entropy_threshold=log(VOCABULARY) + 0.1, **mode).agreed().boundaries == [13]


@BOTH_MODES
def test_one_refinement_is_greedy_decoding(mode):
    policy = small_policy(seed=5, vocabulary=VOCABULARY, gain=2.0)
    case = Case(policy, small_reward(seed=6, vocabulary=VOCABULARY), [K, M, P], 20, 2.0, refinements=1, **mode)
    result = case.agreed()
    assert len(result.segments) > 2 and result.nudges == 0
    if not case.released:
        greedy = policy.generate(torch.tensor([case.prompt]), max_new_tokens=20, do_sample=False)[0]
        assert result.ids == greedy.tolist()


@BOTH_MODES
def test_only_negative_scores_end_the_segment(mode):
    logits = script((M, P), (P, Q), (Q, M), unsure={K: [M, U, V]})
    result = edge_case(logits, worth(m=-1.0, u=-2.0, v=-3.0), candidates=3, prompt=[Q, K], **mode).agreed()
    base, repeated = result.segments[0].candidates
    assert base.top_ids == [M, U, V] and max(base.top_scores[1:]) < -0.1
    assert base.proposal == M
    assert repeated.duplicate and repeated.forced == M


@BOTH_MODES
def test_one_candidate_proposes_the_current_token(mode):
    case = Case(
        small_policy(seed=8, vocabulary=VOCABULARY),
        small_reward(seed=9, vocabulary=VOCABULARY),
        [K, M],
        12,
        1.0,
        candidates=1,
        **mode,
    )
    result = case.agreed()
    assert result.nudges == 0 and all([c.duplicate for c in s.candidates] == [False, True] for s in result.segments)


@BOTH_MODES
def test_ties_go_to_the_lowest_id(mode):
    logits = script((K, M), (M, P), (P, Q), (Q, U), (U, V), (V, K))
    logits[K] = -5.0
    logits[K, LETTERS] = 2.0
    values = worth(other=-2.0, u=4.0, v=4.0, q=4.0)
    result = edge_case(logits, values, candidates=5, refinements=2, prompt=[M, K], **mode).agreed()
    base, nudged = result.segments[0].candidates
    assert base.ids[2] == min(LETTERS)
    # Six letters share the first place, five fit.
    assert base.top_ids == sorted(LETTERS)[:5]
    best = [token for token, score in zip(base.top_ids, base.top_scores, strict=True) if score == max(base.top_scores)]
    assert len(best) >= 2 and nudged.forced == min(best)


def test_the_released_final_reward_skips_padding_that_the_policy_wrote():
    logits = script((K, M), (M, PAD), (PAD, PAD))
    case = edge_case(
        logits, worth(m=2.0, other=-3.0), max_new_tokens=3, refinements=1, released=True, insertion_offset=0
    )
    result = case.agreed()
    assert result.ids == [K, M, PAD, PAD]
    assert abs(result.reward - result.segments[-1].candidates[0].reward) > 1.0


def test_a_stop_string_spelled_by_ordinary_tokens_stops_the_released_code():
    spelled = TOKENIZER.convert_tokens_to_ids(list("<|eot_id|>"))
    logits = script(*pairwise(spelled[2:]), (spelled[-1], K))
    settings = {"prompt": [K, *spelled[:3]], "max_new_tokens": 9, "refinements": 1}
    released = edge_case(logits, worth(), released=True, insertion_offset=0, **settings)
    with pytest.raises(StateRepeats):
        released.expected()
    with pytest.raises(NoProgressError):
        released.generation()
    assert edge_case(logits, worth(), **settings).agreed().ids[:11] == [K, *spelled]


def test_text_state_closes_spaces_in_the_prompt_and_the_default_does_not():
    tokenizer = small_tokenizer(clean_up_tokenization_spaces=True)
    prompt = tokenizer("one , two . it 's the end", add_special_tokens=False).input_ids
    models = small_policy(seed=21, vocabulary=VOCABULARY, gain=3.0), small_reward(seed=22, vocabulary=VOCABULARY)
    released = Case(*models, prompt, 12, 1.5, released=True, tokenizer=tokenizer).agreed()
    assert len(released.segments[0].prefix_ids) < len(prompt)
    assert released.text.startswith("one, two. it's the end")
    default = Case(*models, prompt, 12, 1.5).agreed()
    assert default.ids[: len(prompt)] == prompt
    unclean = Case(*models, prompt, 12, 1.5, released=True).agreed()
    assert unclean.segments[0].prefix_ids == prompt


def test_text_state_breaks_a_character_that_a_boundary_splits_and_the_default_does_not():
    first_byte, second_byte = TOKENIZER.convert_tokens_to_ids(["Ã", "©"])
    # Three tokens a segment: the boundary falls between the two bytes of "é".
    logits = script((second_byte, K), unsure={K: [M], M: [P], P: [first_byte], first_byte: [second_byte]})
    settings = {"max_new_tokens": 8, "entropy_threshold": 1.0, "refinements": 1, "prompt": [K]}
    released = edge_case(logits, worth(), released=True, insertion_offset=0, **settings).agreed()
    assert released.segments[0].candidates[0].ids == [K, M, P, first_byte]
    assert released.segments[1].prefix_ids[:3] == [K, M, P] and len(released.segments[1].prefix_ids) == 6
    assert "\ufffd" in released.text and "é" not in released.text
    default = edge_case(logits, worth(), **settings).agreed()
    assert default.segments[1].prefix_ids == [K, M, P, first_byte]
    assert TOKENIZER.decode(default.ids).startswith("kmpék")


def test_a_prompt_that_leaves_no_room_once_tokenised_again_is_refused():
    (first_byte,) = TOKENIZER.convert_tokens_to_ids(["Ã"])
    prompt = [first_byte] * 4
    assert retokenised_length(prompt) == 12
    case = Case(
        small_policy(seed=1, vocabulary=VOCABULARY),
        small_reward(seed=2, vocabulary=VOCABULARY),
        prompt,
        8,
        1.0,
        released=True,
    )
    with pytest.raises(ValueError, match="max_new_tokens"):
        case.generation()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("prefix_length", [1, 3, 17])
def test_the_gradient_after_a_cached_prefix_is_the_gradient_of_the_one_hot_leaf(family, prefix_length):
    vocabulary = 61
    model = small_reward(family, seed=31, vocabulary=vocabulary)
    ids = torch.randint(
        PAD + 1, vocabulary, (prefix_length + 12,), generator=torch.Generator().manual_seed(prefix_length)
    )
    table = model.get_input_embeddings()(torch.arange(vocabulary))
    leaf = torch.nn.functional.one_hot(ids, vocabulary).double().requires_grad_(True)
    reward = model(inputs_embeds=(leaf @ table)[None]).logits[0, 0]
    (expected,) = torch.autograd.grad(reward, leaf)

    prefix = RewardPrefix(RewardModel(model), Counters())
    prefix.extend(ids[:prefix_length].tolist())
    segment = ids[prefix_length:].tolist()
    scored = prefix.score(segment, gradient_tokens=len(segment))
    assert scored.reward == pytest.approx(reward.item(), abs=1e-12)
    torch.testing.assert_close(scored.gradient @ table.T, expected[prefix_length:], rtol=0, atol=1e-12)
    assert expected[prefix_length:].abs().amax(-1).min() > 1e-6
