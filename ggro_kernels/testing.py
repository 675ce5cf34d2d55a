"""How a kernel is judged: numbers against an fp64 oracle within an error budget, selections exactly."""

import math

import torch

from ggro_kernels.selection import bitwise


def error_budget(
    same_precision: torch.Tensor, oracle: torch.Tensor, *, dtype: torch.dtype, scale: float = 1.0
) -> float:
    """`2 * max|same_precision - oracle| + eps * max(scale, max|oracle|)` where the oracle is finite; eps of `dtype`."""
    finite = oracle.isfinite()
    if not finite.any():
        return torch.finfo(dtype).eps * scale
    expected = oracle[finite].double()
    torch_error = (same_precision[finite].double() - expected).abs().nan_to_num(nan=0.0, posinf=0.0).max().item()
    return 2 * torch_error + torch.finfo(dtype).eps * max(scale, expected.abs().max().item())


def assert_within_budget(
    actual: torch.Tensor,
    same_precision: torch.Tensor,
    oracle: torch.Tensor,
    *,
    scale: float = 1.0,
    what: str = "result",
) -> None:
    """Raise AssertionError unless `actual` errs at most twice as much as plain torch in the same precision, plus eps.

    Args:
        actual: the kernel's result.
        same_precision: torch's eager result in the precision the kernel computes in.
        oracle: the fp64 result. All three have one shape; NaN and infinities must be where the oracle has them.
        scale: magnitude of the terms that were summed, where they may cancel.
        what: name used in the message.

    Budget: that of `error_budget`.
    """
    if actual.shape != oracle.shape:
        raise AssertionError(f"{what}: shape {list(actual.shape)}, expected {list(oracle.shape)}")
    finite = oracle.isfinite()
    if not torch.equal(actual[~finite].double().nan_to_num(nan=0.5), oracle[~finite].double().nan_to_num(nan=0.5)):
        raise AssertionError(f"{what}: non-finite values differ: {actual[~finite]}, expected {oracle[~finite]}")
    if not finite.any():
        return
    expected = oracle[finite].double()
    error = (actual[finite].double() - expected).abs().max().item()
    budget = error_budget(same_precision, oracle, dtype=actual.dtype, scale=scale)
    # Written so that a NaN error fails.
    if not error <= budget:
        raise AssertionError(f"{what}: error {error:.3e} exceeds the budget {budget:.3e}")


def exact_topk_indices(logits: torch.Tensor, k: int) -> torch.Tensor:
    """[R, k] indices of the k largest of logits [R, V]: NaN first, value descending, index ascending; -0.0 == +0.0."""
    rows = []
    for row in logits.double():
        # torch.topk orders ties as it likes, but its k-th value is the k-th value; NaN is its largest.
        last = row.topk(k).values[-1]
        contenders = (row.isnan() if last.isnan() else row.isnan() | (row >= last)).nonzero().flatten().tolist()
        values = row.tolist()
        contenders.sort(key=lambda i, row=values: (0, 0.0, i) if math.isnan(row[i]) else (1, -row[i], i))
        rows.append(contenders[:k])
    return torch.tensor(rows, dtype=torch.int64).reshape(len(logits), k)


def assert_exact_selection(
    values: torch.Tensor, indices: torch.Tensor, logits: torch.Tensor, *, what: str = "selection"
) -> None:
    """Raise AssertionError unless `values` and `indices` [R, k] are the exact top k of logits [R, V], bit by bit."""
    expected = exact_topk_indices(logits, indices.shape[1])
    if not torch.equal(indices, expected):
        wrong = (indices != expected).nonzero()[0].tolist()
        raise AssertionError(
            f"{what}: index at {wrong} is {indices[tuple(wrong)].item()}, expected {expected[tuple(wrong)].item()}"
        )
    # Gathered as integers: torch's gather changes the bits of a NaN in some layouts.
    if values.dtype != logits.dtype or not torch.equal(bitwise(values), bitwise(logits).gather(1, indices)):
        raise AssertionError(f"{what}: values are not the logits at the indices")


def assert_selection_within_budget(
    values: torch.Tensor,
    indices: torch.Tensor,
    same_precision: torch.Tensor,
    oracle: torch.Tensor,
    *,
    scale: float = 1.0,
    what: str = "selection",
) -> None:
    """Raise AssertionError unless `values` and `indices` [R, k] are a top k of computed scores [R, V].

    Rounding may exchange scores that lie within the budget of `assert_within_budget` of each other, nothing else: the
    order of what is returned, and infinities and NaN, are exact.

    Args:
        values: the scores that the kernel computed at `indices`.
        indices: int64.
        same_precision: torch's eager scores [R, V] in the precision the kernel computes in.
        oracle: the fp64 scores [R, V].
        scale: magnitude of the terms that were summed.
        what: name used in the message.
    """
    k = indices.shape[1]
    ordered = indices.sort(dim=1).values
    if ((indices < 0) | (indices >= oracle.shape[1])).any() or (ordered[:, 1:] == ordered[:, :-1]).any():
        raise AssertionError(f"{what}: indices out of range or repeated")
    if not torch.equal(exact_topk_indices(values, k), torch.arange(k).expand_as(indices)):
        raise AssertionError(f"{what}: values are not in descending order")
    tied = (values[:, 1:] == values[:, :-1]) | (values[:, 1:].isnan() & values[:, :-1].isnan())
    if (tied & (indices[:, 1:] < indices[:, :-1])).any():
        raise AssertionError(f"{what}: equal values are not in index order")
    assert_within_budget(values, same_precision.gather(1, indices), oracle.gather(1, indices), scale=scale, what=what)

    # Finite numbers in the order NaN, +inf, finite, -inf.
    ranks = oracle.double().nan_to_num(nan=1e302, posinf=1e301, neginf=-1e301)
    omitted = ranks.scatter(1, indices, -1e302).amax(dim=1)
    budget = error_budget(same_precision, oracle, dtype=values.dtype, scale=scale)
    cut = values[:, -1].double().nan_to_num(nan=1e302, posinf=1e301, neginf=-1e301)
    if (omitted > cut + budget).any():
        raise AssertionError(f"{what}: a better score was omitted")
    for special in (oracle.isnan(), oracle == torch.inf, oracle == -torch.inf):
        returned = special.gather(1, indices)
        position = (special.cumsum(dim=1) - 1).gather(1, indices)
        if not torch.equal(position[returned], (returned.cumsum(dim=1) - 1)[returned]):
            raise AssertionError(f"{what}: of equal NaN or infinities, those of the lowest index must be returned")
