"""Diversity by hand-counted n-grams, and intervals that cover."""

import math
import random

import pytest
import torch

from ggro_hf.evaluation import distinct_n, diversity, mean_interval


@pytest.mark.parametrize(
    ("token_ids", "n", "expected"),
    [
        ([1, 2, 3, 4], 1, 1.0),
        ([1, 1, 1, 1], 1, 1 / 4),
        ([1, 1, 1, 1], 2, 1 / 3),
        ([1, 2, 1, 2, 1], 2, 2 / 4),
        ([1, 2, 1, 2, 1], 4, 1.0),
        ([1, 2], 2, 1.0),
        ([1, 2], 3, None),
        ([], 1, None),
    ],
)
def test_distinct_n(token_ids, n, expected):
    assert distinct_n(token_ids, n) == expected


def test_distinct_n_refuses_an_empty_gram():
    with pytest.raises(ValueError, match="n is 0"):
        distinct_n([1], 0)


def test_diversity_is_the_product_over_2_to_4_and_skips_undefined_factors():
    ids = [1, 2, 1, 2, 1]
    # 2 of 4 bigrams, 2 of 3 trigrams, 2 of 2 four-grams.
    assert diversity(ids) == pytest.approx(2 / 4 * 2 / 3 * 2 / 2)
    assert diversity([1, 1, 1]) == pytest.approx(1 / 2 * 1)
    assert diversity([1]) is None


def test_the_mean_skips_undefined_values():
    interval = mean_interval([1.0, None, 3.0])
    assert interval.mean == 2.0
    assert (interval.low, interval.high) == (1.0, 3.0)
    assert mean_interval([None]) is None
    single = mean_interval([0.5])
    assert (single.mean, single.low, single.high) == (0.5, 0.5, 0.5)


def test_the_interval_is_that_of_the_normal_approximation_for_many_values():
    values = torch.randn(2000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    interval = mean_interval(values.tolist())
    half = 1.96 * values.std().item() / math.sqrt(len(values))
    assert interval.low == pytest.approx(interval.mean - half, abs=0.1 * half)
    assert interval.high == pytest.approx(interval.mean + half, abs=0.1 * half)


def test_nineteen_of_twenty_intervals_cover_the_true_mean():
    choices = random.Random(1)
    covered = 0
    for _ in range(100):
        interval = mean_interval([choices.expovariate(1.0) for _ in range(60)])
        covered += interval.low <= 1.0 <= interval.high
    assert 87 <= covered <= 100


def test_the_same_values_give_the_same_interval():
    assert mean_interval([1.0, 2.0, 5.0]) == mean_interval([1.0, 2.0, 5.0])


@pytest.mark.parametrize("size", [400, 4000])
def test_few_different_values_have_the_interval_that_many_have(size):
    few = torch.bernoulli(torch.full((size,), 0.3), generator=torch.Generator().manual_seed(0)).tolist()
    # A shift that no mean can show: now all values differ, and are drawn one by one.
    many = [value + 1e-9 * number / size for number, value in enumerate(few)]
    counted, drawn = mean_interval(few), mean_interval(many)
    half = (counted.high - counted.low) / 2
    assert drawn.low == pytest.approx(counted.low, abs=0.1 * half)
    assert drawn.high == pytest.approx(counted.high, abs=0.1 * half)
