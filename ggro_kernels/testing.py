"""How a kernel is judged: numbers against an fp64 oracle within an error budget, selections exactly."""

import math

import torch


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

    Budget: `2 * max|same_precision - oracle| + eps * max(scale, max|oracle|)`, eps that of `actual.dtype`.
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
    torch_error = (same_precision[finite].double() - expected).abs().nan_to_num(nan=0.0, posinf=0.0).max().item()
    budget = 2 * torch_error + torch.finfo(actual.dtype).eps * max(scale, expected.abs().max().item())
    # Written so that a NaN error fails.
    if not error <= budget:
        raise AssertionError(f"{what}: error {error:.3e} exceeds the budget {budget:.3e} (torch: {torch_error:.3e})")


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


def bitwise(x: torch.Tensor) -> torch.Tensor:
    """The bits of a float tensor as integers: equal where and only where the bits are, NaN included."""
    return x.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


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
    if values.dtype != logits.dtype or not torch.equal(bitwise(values), bitwise(logits.gather(1, indices))):
        raise AssertionError(f"{what}: values are not the logits at the indices")
