"""Weights of comparisons against the formula in 60 digits, and what is left out."""

import json
from dataclasses import replace
from decimal import Decimal, localcontext

import pytest

from ggro_hf.pairs import PairRewards, PartialPair, PreferencePair
from ggro_hf.training.weights import (
    WeighedPair,
    Weighting,
    format_weight_statistics,
    weigh,
    weight_statistics,
)
from tests.ggro_hf.training.preference_data import partial_pairs


def pair_rewards(row, margins, *, lengths=None):
    lengths = lengths or (*range(1, len(margins)), None)
    return PairRewards(row, lengths, tuple(margin + 1.5 for margin in margins), (1.5,) * len(margins))


def weigh_margins(weighting, margins):
    """The weights of a pair by length; a margin of one alone is that of the finished responses."""
    partial = PartialPair(PreferencePair(7, "a", "b", "c"), (*range(1, len(margins)), None))
    rewards = PairRewards(7, partial.lengths, tuple(margins), (0.0,) * len(margins))
    weighed = weigh(weighting, {7: rewards}, [partial])
    return dict(zip(weighed[0].partial.lengths, weighed[0].weights, strict=True)) if weighed else {}


def exact_weight(margin):
    with localcontext() as context:
        context.prec = 60
        odds = (-Decimal(margin)).exp()
        sure, unsure = 1 / (1 + odds), odds / (1 + odds)
        return float(-1 / (sure * sure.ln() + unsure * unsure.ln()))


@pytest.mark.parametrize("margin", [1e-9, 0.01, 0.5, 1.0, 3.0, 6.6, 10.0, 17.0, 20.0, 40.0, 80.0])
def test_weights_are_the_formulas(margin):
    (weight,) = weigh_margins(Weighting(clamp=None), [margin]).values()
    assert weight == pytest.approx(exact_weight(margin), rel=1e-12)
    (clamped,) = weigh_margins(Weighting(), [margin]).values()
    assert clamped == pytest.approx(min(exact_weight(margin), 100.0), rel=1e-12)
    (other,) = weigh_margins(Weighting(clamp=1.5), [margin]).values()
    assert other == pytest.approx(min(exact_weight(margin), 1.5), rel=1e-12)


def test_weights_grow_with_the_margin():
    weights = list(weigh_margins(Weighting(clamp=None), [step / 7 for step in range(1, 300)]).values())
    assert weights == sorted(weights)
    assert weights[0] > 1.4426


@pytest.mark.parametrize("mode", ["reference", "mask"])
def test_only_a_strict_preference_of_the_chosen_response_counts(mode):
    weights = weigh_margins(Weighting(mode), [0.0, -0.0, -1e-300, -5.0, 5e-324, 2.0, 0.0])
    assert list(weights) == [5, 6]
    assert weigh_margins(Weighting(mode), [-1.0]) == {}
    assert list(weigh_margins(Weighting(mode), [-1.0, 1.0])) == [None]


def test_mask_and_none_weigh_equally():
    pairs = [PartialPair(PreferencePair(row, "a", "b", "c"), lengths) for row, lengths in ((1, (1, None)), (2, ()))]
    rewards = {1: pair_rewards(1, [-1.0, 9.0]), 2: PairRewards(2, (), (), ())}
    assert weigh(Weighting("mask"), rewards, pairs) == [WeighedPair(replace(pairs[0], lengths=(None,)), (1.0,))]
    # The ablation does not look at them, not even to refuse them.
    for given in (None, rewards, {1: pair_rewards(1, [float("nan"), 0.0])}):
        assert weigh(Weighting("none"), given, pairs) == [WeighedPair(pairs[0], (1.0, 1.0))]


def test_equal_lengths_count_as_often_as_they_occur():
    partial = PartialPair(PreferencePair(1, "a", "b", "c"), (2, 2, 5))
    rewards = {1: PairRewards(1, (2, 2, 5), (1.0, 1.0, 0.0), (0.0, 0.0, 1.0))}
    (weighed,) = weigh(Weighting(), rewards, [partial])
    assert weighed.partial.lengths == (2, 2)
    assert weighed.weights[0] == weighed.weights[1]


@pytest.mark.parametrize("mode", ["reference", "mask", "none"])
def test_normalised_weights_have_mean_one_over_what_is_kept(mode):
    pairs = partial_pairs()
    rewards = {
        partial.pair.row: pair_rewards(
            partial.pair.row,
            [partial.pair.row - 5 + 0.3 * step for step in range(len(partial.lengths))],
            lengths=partial.lengths,
        )
        for partial in pairs
    }
    plain = weigh(Weighting(mode), rewards, pairs)
    normalised = weigh(Weighting(mode, normalise=True), rewards, pairs)
    assert [item.partial for item in normalised] == [item.partial for item in plain]
    weights = [weight for item in normalised for weight in item.weights]
    before = [weight for item in plain for weight in item.weights]
    assert sum(weights) / len(weights) == pytest.approx(1.0, rel=1e-12)
    assert [weight * before[0] for weight in weights] == pytest.approx([weight * weights[0] for weight in before])
    nothing = {row: replace(own, chosen=own.rejected) for row, own in rewards.items()}
    if mode != "none":
        assert weigh(Weighting(mode, normalise=True), nothing, pairs) == []


@pytest.mark.parametrize("mode", ["reference", "mask"])
def test_rewards_that_are_missing_or_do_not_fit_are_refused_by_row(mode):
    weighting = Weighting(mode)
    pairs = [PartialPair(PreferencePair(4, "a", "b", "c"), (1, 2, None))]
    with pytest.raises(ValueError, match="rewards is None, but mode"):
        weigh(weighting, None, pairs)
    with pytest.raises(ValueError, match="row 4 has no rewards"):
        weigh(weighting, {}, pairs)
    with pytest.raises(ValueError, match=r"row 4: .* at lengths \[1, 3, None\], but the data has the lengths \[1, 2, "):
        weigh(weighting, {4: pair_rewards(4, [1.0] * 3, lengths=(1, 3, None))}, pairs)
    with pytest.raises(ValueError, match="row 4: 3 chosen and 2 rejected rewards"):
        weigh(weighting, {4: PairRewards(4, (1, 2, None), (1.0,) * 3, (1.0,) * 2)}, pairs)
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match=rf"row 4: the rewards at length 2 are {value} and 1\.5"):
            weigh(weighting, {4: pair_rewards(4, [1.0, value, 1.0])}, pairs)
    with pytest.raises(ValueError, match="row 4: the rewards of the finished responses are nan"):
        weigh(weighting, {4: pair_rewards(4, [1.0, 1.0, float("nan")])}, pairs)


@pytest.mark.parametrize("margin", [95.0, 1000.0])
def test_a_weight_beyond_fp32_needs_a_clamp(margin):
    with pytest.raises(ValueError, match="row 7: the weight at length 1 exceeds fp32; set a clamp"):
        weigh_margins(Weighting(clamp=None), [margin, 1.0])
    assert weigh_margins(Weighting(), [margin]) == {None: 100.0}
    assert weigh_margins(Weighting("mask", clamp=None), [margin]) == {None: 1.0}


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="mode is 'masked', but must be one of 'reference', 'mask', 'none'"):
        Weighting("masked")
    for clamp in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="clamp is"):
            Weighting(clamp=clamp)


def test_statistics_by_length():
    pairs = [
        PartialPair(PreferencePair(1, "a", "b", "c"), (1, 2, 3, 4, 5, 8, 9, None)),
        PartialPair(PreferencePair(2, "a", "b", "c"), (4, None)),
        PartialPair(PreferencePair(3, "a", "b", "c"), (1,)),
    ]
    rewards = {
        1: pair_rewards(1, [1.0, 0.0, 2.0, -1.0, 3.0, 3.0, 20.0, 1.0], lengths=pairs[0].lengths),
        2: pair_rewards(2, [2.0, -1.0], lengths=pairs[1].lengths),
        3: pair_rewards(3, [-2.0], lengths=(1,)),
    }
    statistics = weight_statistics(pairs, weigh(Weighting(), rewards, pairs))
    assert json.loads(json.dumps(statistics)) == statistics
    assert statistics["pairs"] == {"all": 3, "kept": 2}
    assert statistics["comparisons"] == {"all": 11, "kept": 7}
    assert statistics["max_weight"] == 100.0
    weights = [*map(exact_weight, (1.0, 2.0, 3.0, 3.0, 1.0, 2.0)), 100.0]
    assert statistics["mean_weight"] == pytest.approx(sum(weights) / 7)
    by_length = statistics["by_length"]
    assert list(by_length) == ["1", "2", "3-4", "5-8", "9-16", "finished"]
    shares = {name: (row["comparisons"]["all"], row["comparisons"]["kept"]) for name, row in by_length.items()}
    assert shares == {"1": (2, 1), "2": (1, 0), "3-4": (3, 2), "5-8": (2, 2), "9-16": (1, 1), "finished": (2, 1)}
    assert by_length["3-4"]["mean_weight"] == pytest.approx(exact_weight(2.0))
    assert by_length["2"]["mean_weight"] is by_length["2"]["max_weight"] is None
    table = format_weight_statistics(statistics).splitlines()
    assert table[0] == "2 of 3 pairs have a comparison that counts"
    assert table[3].split() == ["2", "1", "0", "0.0", "%", "-", "-"]
    assert table[-1].split()[:4] == ["all", "11", "7", "63.6"]
    assert len({len(line) for line in table[1:]}) == 1
    assert weight_statistics([], [])["comparisons"] == {"all": 0, "kept": 0}
    assert format_weight_statistics(weight_statistics([], [])).splitlines()[-1].split()[3] == "-"
