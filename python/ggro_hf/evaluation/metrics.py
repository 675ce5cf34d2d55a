"""Diversity of a response, and means with confidence intervals."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

_RESAMPLES = 10_000


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
    """Mean over the defined values with a percentile bootstrap interval (10,000 resamples); None where none is defined.

    The same values and seed always give the same interval. One value alone gives an interval of no width.
    """
    defined = torch.tensor([value for value in values if value is not None], dtype=torch.float64)
    if not len(defined):
        return None
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(len(defined), (_RESAMPLES, len(defined)), generator=generator)
    low, high = torch.quantile(defined[draws].mean(dim=1), torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return MeanInterval(defined.mean().item(), low, high)
