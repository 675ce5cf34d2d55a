"""The kernels against their fp64 reference on this machine, in seconds."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch

import ggro_kernels
from ggro_kernels import dispatch
from ggro_kernels.library import has_triton_kernels
from ggro_kernels.testing import assert_within_budget

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class CheckResult:
    """Outcome of one op in one implementation; `failure` is None where all cases passed."""

    op: str
    impl: str
    cases: int
    seconds: float
    failure: str | None


def check_kernels() -> Iterator[CheckResult]:
    """Check every op, and its gradient where it has one, in every implementation that this machine can run."""
    impls = ["reference"] + (["native"] if dispatch.native_error is None else [])
    # Interpreted, they would take minutes and say nothing of a GPU.
    if dispatch.triton_error is None and not dispatch.INTERPRETING:
        impls.append("triton")
    for op, make_cases in _CASES.items():
        for impl in impls:
            if impl == "triton" and not has_triton_kernels(op):
                continue
            yield _check(op, impl, (case for dtype in _DTYPES for case in make_cases(dtype)))


Case = dict[str, Any]
"""Arguments of an op; the gradients of those that require one are checked too."""


def _check(op: str, impl: str, cases: Iterator[Case]) -> CheckResult:
    start = perf_counter()
    count = 0
    failure = None
    try:
        for case in cases:
            _check_case(op, impl, case)
            count += 1
    except (AssertionError, RuntimeError) as error:
        failure = str(error)
    return CheckResult(op, impl, count, perf_counter() - start, failure)


def _check_case(op: str, impl: str, case: Case) -> None:
    actual = _results(op, impl, case)
    plain = _results(op, "reference", case)
    # Uniforms are fp32 in any precision.
    exact = {name: value if name == "uniforms" else _in_fp64(value) for name, value in case.items()}
    oracle = _results(op, "reference", exact)
    shapes = ", ".join(f"{name} {list(x.shape)} {x.dtype}" for name, x in case.items() if isinstance(x, torch.Tensor))
    for name, expected in oracle.items():
        what = f"{name} of {op}({shapes})"
        if expected.is_floating_point():
            assert_within_budget(actual[name], plain[name], expected, what=what)
        elif not torch.equal(actual[name], expected):
            raise AssertionError(f"{what}: differs from the reference")


def _results(op: str, impl: str, case: Case) -> dict[str, torch.Tensor]:
    """Outputs by name, and the gradients of the sum of all float outputs, on the CPU."""
    device = "cuda" if impl == "triton" else "cpu"
    placed = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in case.items()}
    output = getattr(ggro_kernels, op)(**placed, impl=impl)
    results = {"output": output} if isinstance(output, torch.Tensor) else output._asdict()
    inputs = {name: x for name, x in case.items() if isinstance(x, torch.Tensor) and x.requires_grad}
    if inputs:
        total = torch.stack([x.sum() for x in results.values() if x.is_floating_point()]).sum()
        gradients = torch.autograd.grad(total, list(inputs.values()))
        results |= {f"gradient of {name}": gradient for name, gradient in zip(inputs, gradients, strict=True)}
    return {name: result.detach().cpu() for name, result in results.items()}


def _in_fp64(value: Any) -> Any:
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return value
    return value.detach().double().requires_grad_(value.requires_grad)


def _batch_invariant_linear(dtype: torch.dtype) -> Iterator[Case]:
    for rows, width, outputs, biased in (
        (1, 512, 200, False),
        (5, 37, 51, True),
        (9, 1024, 24, True),
        (0, 16, 10, False),
    ):
        bias = _normal(dtype, outputs) if biased else None
        weight = _normal(dtype, outputs, width)
        yield {"x": _normal(dtype, rows, width).requires_grad_(), "weight": weight, "bias": bias}


def _candidate_scores(dtype: torch.dtype) -> Iterator[Case]:
    for positions, width, vocab, k in ((1, 1024, 200, 25), (3, 64, 901, 25), (4, 37, 50, 3), (0, 16, 10, 2)):
        gradient, table = _normal(dtype, positions, width), _normal(dtype, vocab, width)
        ids = _integers(vocab, positions, k)
        yield {"gradient": gradient.requires_grad_(), "table": table.requires_grad_(), "ids": ids}


# An odd and an even vocabulary, one entry, no rows.
_LOGITS = ((2, 128_257, 25), (3, 32_000, 8), (4, 901, 256), (5, 1, 1), (0, 50, 4))


def _entropy_topk(dtype: torch.dtype) -> Iterator[Case]:
    for rows, vocab, k in _LOGITS:
        logits = 8 * _normal(dtype, rows, vocab)
        yield {"logits": logits.clone().requires_grad_(), "k": k}
        if rows and vocab > 3:
            logits[0, ::3] = -torch.inf
            logits[-1, 1] = torch.nan
            yield {"logits": logits, "k": k}


def _lm_head_entropy_topk(dtype: torch.dtype) -> Iterator[Case]:
    for rows, width, vocab, k in ((1, 256, 2001, 25), (30, 65, 901, 256), (0, 16, 50, 4)):
        yield {"hidden": _whole(dtype, rows, width), "weight": _whole(dtype, vocab, width), "k": k, "temperature": 20.0}


def _merge_partials(dtype: torch.dtype) -> Iterator[Case]:
    for shards, rows, k in ((1, 3, 5), (4, 9, 25), (2, 0, 4)):
        partial = ggro_kernels.entropy_topk(logits=_normal(dtype, shards * rows, 500), k=k, impl="reference")
        parts = {name: x.unflatten(0, (shards, rows)) for name, x in partial._asdict().items()}
        yield parts | {"offsets": 500 * torch.arange(shards).flip(0)}


def _prefix_attention(dtype: torch.dtype) -> Iterator[Case]:
    for heads, key_heads, prefix, branches in ((4, 2, 300, (1, 5, 70)), (6, 1, 33, (1, 1, 1, 1)), (2, 2, 0, (9,))):
        tokens = sum(branches)
        starts = [sum(branches[:index]) for index, length in enumerate(branches) for _ in range(length)]
        yield {
            "query": _normal(dtype, 2, heads, tokens, 24),
            "prefix_key": _normal(dtype, 2, key_heads, prefix, 24),
            "prefix_value": _normal(dtype, 2, key_heads, prefix, 16),
            "branch_key": _normal(dtype, 2, key_heads, tokens, 24),
            "branch_value": _normal(dtype, 2, key_heads, tokens, 16),
            "branch_starts": torch.tensor(starts).repeat(2, 1),
        }


def _project_topk(dtype: torch.dtype) -> Iterator[Case]:
    for positions, width, vocab, k in ((1, 256, 2001, 25), (30, 65, 901, 256), (0, 16, 50, 4)):
        forbidden = torch.arange(vocab) % 7 == 0
        tensors = {"gradient": _whole(dtype, positions, width), "table": _whole(dtype, vocab, width)}
        yield tensors | {"k": k, "bias": _whole(dtype, vocab), "forbidden": forbidden}


def _score_select(dtype: torch.dtype) -> Iterator[Case]:
    for rows, candidates, width in ((3, 25, 257), (1, 1, 8), (0, 4, 16)):
        states = {"hidden": _whole(dtype, rows, candidates, width), "head": _whole(dtype, width)}
        case = states | {"logits": _whole(dtype, rows, candidates), "weight": 0.5}
        yield case
        uniforms = torch.rand(rows, generator=torch.Generator().manual_seed(rows))
        yield case | {"mode": "categorical", "temperature": 30.0, "uniforms": uniforms}


def _weighted_bt_loss(dtype: torch.dtype) -> Iterator[Case]:
    for rows, chosen, rejected, pairs in ((30, 70, 50, 500), (1, 1, 1, 1), (0, 7, 5, 9)):
        yield {
            "chosen_rewards": _normal(dtype, rows, chosen).requires_grad_(),
            "rejected_rewards": _normal(dtype, rows, rejected).requires_grad_(),
            "chosen_positions": _integers(chosen, rows, pairs),
            "rejected_positions": _integers(rejected, rows, pairs),
            "weights": _normal(torch.float32, rows, pairs).relu(),
        }


_CASES: dict[str, Callable[[torch.dtype], Iterator[Case]]] = {
    "batch_invariant_linear": _batch_invariant_linear,
    "candidate_scores": _candidate_scores,
    "entropy_topk": _entropy_topk,
    "lm_head_entropy_topk": _lm_head_entropy_topk,
    "merge_partials": _merge_partials,
    "prefix_attention": _prefix_attention,
    "project_topk": _project_topk,
    "score_select": _score_select,
    "weighted_bt_loss": _weighted_bt_loss,
}


def _normal(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def _whole(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Small whole numbers: their sums of products are exact, and so is the order of these."""
    return _normal(torch.float32, *shape).mul(2).round().to(dtype)


def _integers(end: int, *shape: int) -> torch.Tensor:
    return torch.randint(end, shape, generator=torch.Generator().manual_seed(sum(shape)))
