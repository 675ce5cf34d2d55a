"""The kernels against their fp64 reference on this machine, in seconds."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from time import perf_counter

import torch

from ggro_kernels import candidate_scores, dispatch, entropy_topk
from ggro_kernels.candidate_scores.reference import candidate_scores as candidate_scores_reference
from ggro_kernels.entropy_topk.reference import entropy_topk as entropy_topk_reference
from ggro_kernels.testing import assert_exact_selection, assert_within_budget

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# (rows, vocabulary, k): an odd and an even vocabulary, one entry, no rows.
_ENTROPY_SHAPES = ((2, 128_257, 25), (3, 32_000, 8), (4, 901, 256), (5, 1, 1), (0, 50, 4))

# (positions, width, vocabulary, k)
_SCORE_SHAPES = ((1, 4096, 2000, 25), (3, 64, 901, 25), (4, 37, 50, 3), (0, 16, 10, 2))


@dataclass(frozen=True, slots=True)
class CheckResult:
    """Outcome of one op in one implementation; `failure` is None where all cases passed."""

    op: str
    impl: str
    cases: int
    seconds: float
    failure: str | None


def check_kernels() -> Iterator[CheckResult]:
    """Check every op in every implementation that this machine can run."""
    impls = ["reference"] + (["native"] if dispatch.native_error is None else [])
    for name, cases in (("entropy_topk", _entropy_cases), ("candidate_scores", _score_cases)):
        for impl in impls:
            yield _check(name, impl, cases(impl))


def _check(op: str, impl: str, cases: Iterator[Callable[[], None]]) -> CheckResult:
    start = perf_counter()
    count = 0
    failure = None
    try:
        for case in cases:
            case()
            count += 1
    except (AssertionError, RuntimeError) as error:
        failure = str(error)
    return CheckResult(op, impl, count, perf_counter() - start, failure)


def _entropy_cases(impl: str) -> Iterator[Callable[[], None]]:
    for dtype in _DTYPES:
        for seed, (rows, vocabulary, k) in enumerate(_ENTROPY_SHAPES):
            logits = (8 * _random(seed, rows, vocabulary)).to(dtype)
            if rows and vocabulary > 3:
                logits[0, ::3] = -torch.inf
                logits[-1, 1] = torch.nan if dtype is torch.float32 else logits[-1, 0]
            yield partial(_check_entropy, logits, k, impl)


def _check_entropy(logits: torch.Tensor, k: int, impl: str) -> None:
    actual = entropy_topk(logits, k, impl=impl)
    plain = entropy_topk_reference(logits, k, 1.0)
    oracle = entropy_topk_reference(logits.double(), k, 1.0)
    what = f"{list(logits.shape)} {logits.dtype}"
    for index, part in enumerate(("entropy", "logsumexp")):
        assert_within_budget(actual[index], plain[index], oracle[index], what=f"{part} of {what}")
    assert_exact_selection(actual.values, actual.indices, logits, what=f"top {k} of {what}")


def _score_cases(impl: str) -> Iterator[Callable[[], None]]:
    for dtype in _DTYPES:
        for seed, (positions, width, vocabulary, k) in enumerate(_SCORE_SHAPES):
            gradient = _random(seed, positions, width).to(dtype)
            table = _random(seed + 100, vocabulary, width).to(dtype)
            generator = torch.Generator().manual_seed(seed)
            ids = torch.randint(vocabulary, (positions, k), generator=generator)
            yield partial(_check_scores, gradient, table, ids, impl)


def _check_scores(gradient: torch.Tensor, table: torch.Tensor, ids: torch.Tensor, impl: str) -> None:
    actual = candidate_scores(gradient, table, ids, impl=impl)
    plain = candidate_scores_reference(gradient, table, ids)
    oracle = candidate_scores_reference(gradient.double(), table.double(), ids)
    what = f"scores of {list(gradient.shape)} x {list(table.shape)} {gradient.dtype}"
    assert_within_budget(actual, plain, oracle, what=what)


def _random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
