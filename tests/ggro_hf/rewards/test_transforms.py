"""Transformed rewards and weighted sums, on rewards whose numbers are known."""

import math

import pytest

from ggro_hf.results import Counters
from ggro_hf.rewards.base import Capabilities, Conversation, Reward, Scoring
from ggro_hf.rewards.transforms import Transformed, WeightedSum

CONVERSATION = Conversation(prompt_ids=[1, 2])


class Polynomial(Reward):
    """sum_i token_i * base^i over the response: sequences, continuations and their order all matter."""

    def __init__(self, base, *, max_tokens=None, tree=True):
        self.base, self.max_tokens, self.tree = base, max_tokens, tree
        self.tokenizers = []

    @property
    def capabilities(self):
        return Capabilities(True, True, self.tree, True, self.max_tokens)

    def open(self, conversation, counters, max_new_tokens):
        counters.reward_forward_tokens += max_new_tokens
        return PolynomialScoring(self)

    def check_tokenizer(self, policy_tokenizer):
        self.tokenizers.append(policy_tokenizer)

    def __call__(self, tokens):
        return float(sum(token * self.base**place for place, token in enumerate(tokens)))


class PolynomialScoring(Scoring):
    def __init__(self, reward):
        self.reward, self.sequences, self.scored = reward, [[]], []

    def score(self, continuations):
        self.scored = [
            [sequence + tokens for tokens in of_sequence]
            for sequence, of_sequence in zip(self.sequences, continuations, strict=True)
        ]
        return [[self.reward(tokens) for tokens in of_sequence] for of_sequence in self.scored]

    def keep(self, chosen):
        self.sequences = [self.scored[sequence][number] for sequence, number in chosen]


class NotANumber(Polynomial):
    def __call__(self, tokens):
        return math.nan


def test_scale_and_center_over_several_sequences():
    scoring = Transformed(Polynomial(2), scale=-0.5, center=3.0).open(CONVERSATION, Counters(), 8)
    assert scoring.score([[[5], [], [1, 2]]]) == [[-1.0, 1.5, -1.0]]
    scoring.keep([(0, 2), (0, 0)])
    assert scoring.score([[[], [1]], [[3]]]) == [[-1.0, -3.0], [-4.0]]


@pytest.mark.parametrize(
    ("clip", "expected"),
    [
        ((-1.0, 2.0), [2.0, -1.0, 1.0]),
        ((-math.inf, 2.0), [2.0, -4.0, 1.0]),
        ((-1.0, math.inf), [6.0, -1.0, 1.0]),
        ((1.5, 1.5), [1.5, 1.5, 1.5]),
    ],
)
def test_clip_comes_last(clip, expected):
    scoring = Transformed(Polynomial(2), scale=2.0, center=2.0, clip=clip).open(CONVERSATION, Counters(), 8)
    assert scoring.score([[[5], [], [2, 0]]])[0][:2] == expected[:2]
    assert Transformed(Polynomial(2), scale=2.0, center=2.0, clip=clip)(2.5) == expected[2]


@pytest.mark.parametrize("clip", [None, (-1.0, 1.0), (-math.inf, math.inf)])
def test_nan_stays_nan(clip):
    assert math.isnan(Transformed(NotANumber(2), clip=clip).score_response(CONVERSATION, [1]))
    assert math.isnan(WeightedSum([(0.0, NotANumber(2)), (1.0, Polynomial(2))]).score_response(CONVERSATION, [1]))


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_refused(number):
    with pytest.raises(ValueError, match="scale is"):
        Transformed(Polynomial(2), scale=number)
    with pytest.raises(ValueError, match="center is"):
        Transformed(Polynomial(2), center=number)
    with pytest.raises(ValueError, match="weight of term 1 is"):
        WeightedSum([(1.0, Polynomial(2)), (number, Polynomial(3))])


@pytest.mark.parametrize("clip", [(1.0, -1.0), (math.nan, 1.0), (0.0, math.nan)])
def test_bounds_that_are_not_in_order_are_refused(clip):
    with pytest.raises(ValueError, match=r"clip is .*\(low, high\)"):
        Transformed(Polynomial(2), clip=clip)


def test_an_empty_sum_is_refused():
    with pytest.raises(ValueError, match="terms are empty"):
        WeightedSum([])


def test_a_weighted_sum_over_several_sequences():
    counters = Counters()
    scoring = WeightedSum([(2.0, Polynomial(2)), (-1.0, Polynomial(10)), (0.5, Polynomial(1))]).open(
        CONVERSATION, counters, 8
    )
    assert counters.reward_forward_tokens == 24

    def by_hand(*tokens):
        powers = [sum(token * base**place for place, token in enumerate(tokens)) for base in (2, 10, 1)]
        return 2 * powers[0] - powers[1] + 0.5 * powers[2]

    assert scoring.score([[[], [3], [4, 5]]]) == [[0.0, by_hand(3), by_hand(4, 5)]]
    scoring.keep([(0, 2), (0, 1), (0, 2)])
    rewards = scoring.score([[[6]], [[], [7, 8]], []])
    assert rewards == [[by_hand(4, 5, 6)], [by_hand(3), by_hand(3, 7, 8)], []]


def test_sums_of_transforms_of_sums():
    inner = WeightedSum([(1.0, Polynomial(2)), (1.0, Transformed(Polynomial(2), scale=-1.0))])
    reward = WeightedSum([(1.0, Transformed(inner, center=-4.0)), (1.0, Polynomial(1))])
    assert reward.score_response(CONVERSATION, [1, 2]) == 7.0


def test_capabilities_are_what_all_can_do_without_gradient():
    total = WeightedSum([(1.0, Polynomial(2, max_tokens=40)), (1.0, Polynomial(2, max_tokens=30, tree=False))])
    assert total.capabilities == Capabilities(True, True, False, False, 30)
    assert Transformed(Polynomial(2)).capabilities == Capabilities(True, True, True, False, None)


def test_every_reward_checks_the_tokenizer():
    first, second = Polynomial(2), Polynomial(3)
    WeightedSum([(1.0, first), (1.0, Transformed(second))]).check_tokenizer("tokenizer")
    assert first.tokenizers == second.tokenizers == ["tokenizer"]
