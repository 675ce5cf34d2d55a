"""Diversity of a response, and means with confidence intervals."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_RESAMPLES = 10_000
_FEWEST_RESAMPLES = 1_000
_DRAWS = 10_000_000
_DRAWS_AT_ONCE = 1_000_000
# Up to so many different values, counting how often each is drawn is quicker than drawing.
_FEW_DIFFERENT = 16


def distinct_n(token_ids: Sequence[int], n: int) -> float | None:
    """Unique n-grams divided by all n-grams of one response, in tokens; None where it has fewer than `n` tokens."""
    if n < 1:
        raise ValueError(f"n is {n}, but an n-gram has at least one token")
    total = len(token_ids) - n + 1
    if total < 1:
        return None
    return len({tuple(token_ids[start : start + n]) for start in range(total)}) / total


def diversity(token_ids: Sequence[int]) -> float | None:
    """Product over n = 2..4 of `distinct_n`, as the SP-PRM paper defines it.

    Undefined factors are skipped; None if all are.
    """
    factors = [factor for n in (2, 3, 4) if (factor := distinct_n(token_ids, n)) is not None]
    return math.prod(factors) if factors else None


@dataclass(frozen=True, slots=True)
class MeanInterval:
    """A mean with its 95 % confidence interval."""

    mean: float
    low: float
    high: float


def mean_interval(values: Iterable[float | None], *, seed: int = 0) -> MeanInterval | None:
    """Mean over the defined values with a percentile bootstrap interval; None where none is defined.

    10,000 resamples; of more than 1,000 values that are not just few different ones, fewer, but never less than 1,000.
    The same values and seed always give the same interval. One value alone gives an interval of no width.
    """
    defined = np.array([value for value in values if value is not None], dtype=np.float64)
    if not len(defined):
        return None
    low, high = np.quantile(_resampled_means(defined, np.random.Generator(np.random.Philox(seed))), [0.025, 0.975])
    return MeanInterval(float(defined.mean()), float(low), float(high))


def _resampled_means(values: NDArray[np.float64], generator: np.random.Generator) -> NDArray[np.float64]:
    different, counts = np.unique(values, return_counts=True)
    if len(different) == 1:
        return different
    size = len(values)
    if len(different) <= _FEW_DIFFERENT:
        return generator.multinomial(size, counts / size, _RESAMPLES) @ different / size
    resamples = min(_RESAMPLES, max(_FEWEST_RESAMPLES, _DRAWS // size))
    at_once = max(1, _DRAWS_AT_ONCE // size)
    means = [
        values[generator.integers(size, size=(min(at_once, resamples - first), size))].mean(axis=1)
        for first in range(0, resamples, at_once)
    ]
    return np.concatenate(means)
