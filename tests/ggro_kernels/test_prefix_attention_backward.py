"""The gradient of prefix_attention against autograd through one dense softmax per token in fp64."""

from typing import Any

import pytest
import torch

from ggro_kernels.testing import assert_within_budget, bitwise
from tests.ggro_kernels.implementations import on_threads, thread_counts
from tests.ggro_kernels.placed import prefix_attention
from tests.ggro_kernels.test_prefix_attention import (
    DTYPES,
    OPTIONS,
    Arguments,
    attend_token_by_token,
    inputs,
    largest_finite,
)

pytestmark = pytest.mark.usefixtures("poisoned_empty")

LEAVES = ("query", "branch_key", "branch_value")
Gradients = dict[str, torch.Tensor]


def output_gradient(arguments: Arguments) -> torch.Tensor:
    shape = (*arguments["query"].shape[:3], arguments["prefix_value"].shape[3])
    return torch.randn(shape, generator=torch.Generator().manual_seed(5)).to(arguments["query"].dtype)


def gradients(arguments: Arguments, gradient: torch.Tensor, impl: str = "auto") -> Gradients:
    leaves = {name: arguments[name].detach().requires_grad_() for name in LEAVES}
    output = prefix_attention(**arguments | leaves, impl=impl)
    return dict(zip(LEAVES, torch.autograd.grad(output, list(leaves.values()), gradient), strict=True))


def expected_gradients(arguments: Arguments, gradient: torch.Tensor, dtype: torch.dtype) -> Gradients:
    leaves = {name: arguments[name].detach().to(dtype).requires_grad_() for name in LEAVES}
    # So that it is in the graph where there are no tokens.
    output = attend_token_by_token(arguments | leaves, dtype) + 0 * leaves["query"].sum()
    found = torch.autograd.grad(output, list(leaves.values()), gradient.to(dtype), allow_unused=True)
    return {name: torch.zeros_like(leaves[name]) if x is None else x for name, x in zip(LEAVES, found, strict=True)}


def check(arguments: Arguments, impl: str, gradient: torch.Tensor | None = None) -> Gradients:
    dtype, width = arguments["query"].dtype, arguments["query"].shape[3]
    gradient = output_gradient(arguments) if gradient is None else gradient
    found = gradients(arguments, gradient, impl)
    oracle = expected_gradients(arguments, gradient, torch.float64)
    same_precision = expected_gradients(arguments, gradient, torch.float32)
    key, value = (torch.cat([arguments[f"prefix_{kind}"], arguments[f"branch_{kind}"]], 2) for kind in ("key", "value"))
    rows = arguments["query"].float().unflatten(1, (key.shape[1], -1)).flatten(2, 3)
    scale = abs(arguments.get("scale", width**-0.5))
    # A score's fp32 rounding, relative to the score, is the relative error of a weight and of what reaches the score.
    error = torch.finfo(torch.float32).eps * (1 + largest_finite(rows @ key.float().mT) * scale)
    of_rows = gradient.float().unflatten(1, (key.shape[1], -1)).flatten(2, 3)
    of_score = error * largest_finite(of_rows @ value.float().mT) * scale
    terms = {
        "query": of_score * largest_finite(key),
        "branch_key": of_score * largest_finite(rows) * rows.shape[2],
        "branch_value": error * largest_finite(gradient) * rows.shape[2],
    }
    for name, x in found.items():
        assert x.dtype == dtype
        assert_within_budget(
            x, same_precision[name].to(dtype), oracle[name], scale=terms[name] / torch.finfo(dtype).eps, what=name
        )
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("query_heads", "key_heads"), [(1, 1), (3, 3), (4, 2), (8, 1)])
def test_grouped_heads(query_heads: int, key_heads: int, dtype: torch.dtype, impl: str) -> None:
    check(inputs(2, query_heads, key_heads, 32, 67, (1, 3, 2), dtype), impl)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("prefix", "branches"),
    [(0, (1,)), (0, (5, 2)), (1, (1, 1)), (64, (9,)), (65, (1,) * 25), (130, (70, 1, 66)), (300, (8,) * 4)],
)
def test_ragged_branches(prefix: int, branches: tuple[int, ...], dtype: torch.dtype, impl: str) -> None:
    check(inputs(1, 2, 1, 16, prefix, branches, dtype), impl)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "value_width"), [(1, 1), (3, 5), (31, 64), (64, 31), (80, 80), (300, 270)])
def test_widths(width: int, value_width: int, dtype: torch.dtype, impl: str) -> None:
    check(inputs(1, 4, 2, width, 40, (2, 3, 6), dtype, value_width), impl)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_options(options: Arguments, dtype: torch.dtype, impl: str) -> None:
    arguments = inputs(2, 4, 2, 24, 130, (3, 120, 1), dtype) | options
    check(arguments | {"prefix_lengths": torch.tensor([130, 41]), "scale": 0.3}, impl)


def test_a_window_that_hides_the_prefix_and_the_start_of_a_branch(impl: str) -> None:
    check(inputs(1, 2, 1, 16, 50, (2, 40)) | {"window": 7}, impl)


def test_a_prefix_that_leaves_room_for_the_fewest_rows(impl: str) -> None:
    check(inputs(1, 2, 1, 8, 9000, (40,)), impl)


def test_branches_anywhere_in_one_buffer(impl: str) -> None:
    room = inputs(2, 4, 2, 24, 33, (30,))
    arguments = room | {
        "query": room["query"][:, :, :5],
        "branch_starts": torch.tensor([[10, 9, 0, 0, 12], [29, 2, 2, 2, 0]]),
        "branch_ends": torch.tensor([[29, 9, 4, 7, 15], [29, 20, 8, 2, 29]]),
    }
    found = check(arguments, impl)
    # Those that no token sees.
    assert (found["branch_key"][0, :, [8]] == 0).all() and (found["branch_value"][0, :, [8]] == 0).all()


def test_any_strides(impl: str) -> None:
    arguments = inputs(2, 4, 2, 24, 50, (2, 7))
    expected = gradients(arguments, output_gradient(arguments), impl)
    by_token = {
        name: x.transpose(1, 2).contiguous().transpose(1, 2) if x.is_floating_point() else x.t().contiguous().t()
        for name, x in arguments.items()
    }
    by_column = {name: x.mT.contiguous().mT if x.is_floating_point() else x for name, x in arguments.items()}
    for views in (by_token, by_column):
        found = gradients(views, output_gradient(arguments).mT.contiguous().mT, impl)
        for name, x in expected.items():
            assert torch.equal(found[name], x)


@pytest.mark.parametrize("options", OPTIONS)
def test_branches_do_not_reach_each_other(options: Arguments, native_impl: str) -> None:
    arguments = inputs(1, 4, 2, 32, 150, (3, 20, 2)) | options
    gradient = output_gradient(arguments)
    expected = gradients(arguments, gradient, native_impl)
    spoilt = {name: arguments[name].clone() for name in LEAVES}
    for x in (*spoilt.values(), gradient):
        x[:, :, 3:23] = torch.nan
    found = gradients(arguments | spoilt, gradient, native_impl)
    for name, x in found.items():
        assert x[:, :, 3:23].isnan().all()
        others = [*range(3), 23, 24]
        torch.testing.assert_close(x[:, :, others], expected[name][:, :, others])


def test_what_no_token_sees_may_be_nan(impl: str) -> None:
    arguments = inputs(1, 4, 2, 32, 150, (3, 20)) | {"window": 60, "prefix_lengths": torch.tensor([140])}
    expected = gradients(arguments, output_gradient(arguments), impl)
    for name in ("prefix_key", "prefix_value"):
        arguments[name] = arguments[name].clone()
        arguments[name][:, :, :81] = torch.nan
        arguments[name][:, :, 140:] = torch.nan
    found = gradients(arguments, output_gradient(arguments), impl)
    for name, x in expected.items():
        torch.testing.assert_close(found[name], x)


def test_scores_that_are_all_minus_infinite_give_nan(impl: str) -> None:
    arguments = inputs(1, 2, 1, 8, 10, (1, 2))
    for name in ("prefix_key", "branch_key"):
        arguments[name] = torch.full_like(arguments[name], -torch.inf)
    arguments["query"] = arguments["query"].abs() + 1
    assert gradients(arguments, output_gradient(arguments), impl)["query"].isnan().all()


def test_no_tokens(impl: str) -> None:
    arguments = inputs(2, 4, 2, 8, 30, ())
    found = gradients(arguments, output_gradient(arguments), impl)
    assert {name: tuple(x.shape) for name, x in found.items()} == {
        name: tuple(arguments[name].shape) for name in LEAVES
    }
    room = inputs(2, 4, 2, 8, 30, (3,))
    none = {"branch_starts": torch.zeros(2, 0, dtype=torch.int64), "branch_ends": torch.zeros(2, 0, dtype=torch.int64)}
    arguments = room | none | {"query": room["query"][:, :, :0]}
    found = gradients(arguments, output_gradient(arguments), impl)
    assert (found["branch_key"] == 0).all() and (found["branch_value"] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_for_any_number_of_threads(dtype: torch.dtype, kernel_impl: str) -> None:
    arguments = inputs(2, 6, 3, 40, 200, (1, 30, 5), dtype)
    found = []
    for threads in thread_counts(kernel_impl, 1, 2, 3, 7):
        with on_threads(threads):
            found.append(gradients(arguments, output_gradient(arguments), kernel_impl))
    for other in found:
        for name, x in found[0].items():
            assert torch.equal(bitwise(other[name]), bitwise(x))


def test_the_prefix_is_a_constant(impl: str) -> None:
    arguments = inputs(1, 4, 2, 24, 50, (2, 3))
    arguments["prefix_key"] = arguments["prefix_key"].clone().requires_grad_()
    assert not prefix_attention(**arguments, impl=impl).requires_grad


@pytest.mark.parametrize("options", OPTIONS)
def test_fp64_by_finite_differences(options: Arguments) -> None:
    arguments: dict[str, Any] = inputs(1, 2, 1, 3, 20, (2, 3), torch.float64) | options
    leaves = [arguments[name].requires_grad_() for name in LEAVES]

    def attend(*values: torch.Tensor) -> torch.Tensor:
        return prefix_attention(**arguments | dict(zip(LEAVES, values, strict=True)))

    assert torch.autograd.gradcheck(attend, leaves)
