"""weighted_bt_loss, its gradients and its weights, through every implementation."""

import math

import pytest
import torch
from torch import inf, nan
from torch.nn.functional import logsigmoid

from ggro_kernels import binary_entropy_weight
from ggro_kernels.testing import assert_within_budget, bitwise
from ggro_kernels.weighted_bt_loss import pairs as pairs_module
from tests.ggro_kernels.implementations import on_threads, select, thread_counts
from tests.ggro_kernels.placed import weighted_bt_loss

pytestmark = pytest.mark.usefixtures("poisoned_empty")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Pairs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def inputs(
    rows: int,
    lengths: tuple[int, int],
    pairs: int,
    dtype: torch.dtype = torch.float32,
    weights_dtype: torch.dtype = torch.float32,
) -> Pairs:
    generator = torch.Generator().manual_seed(rows + sum(lengths) + pairs)
    chosen, rejected = (torch.randn(rows, length, generator=generator).to(dtype) for length in lengths)
    positions = [torch.randint(length, (rows, pairs), generator=generator) for length in lengths]
    weights = torch.randn(rows, pairs, generator=generator).relu().to(weights_dtype)
    return chosen, rejected, *positions, weights


def torch_loss(pairs: Pairs, dtype: torch.dtype, reduction: str) -> torch.Tensor:
    """By gather and torch's own logsigmoid."""
    chosen, rejected, chosen_positions, rejected_positions, weights = pairs
    margins = chosen.to(dtype).gather(1, chosen_positions) - rejected.to(dtype).gather(1, rejected_positions)
    terms = -(weights.to(dtype) * logsigmoid(margins))[weights != 0]
    if reduction == "sum" or len(terms) == 0:
        return terms.sum()
    return terms.mean()


def check(pairs: Pairs, impl: str, reduction: str = "mean") -> None:
    chosen, rejected = (rewards.detach().requires_grad_() for rewards in pairs[:2])
    loss = weighted_bt_loss(chosen, rejected, *pairs[2:], reduction=reduction, impl=impl)
    assert loss.dtype == torch.float32 and loss.shape == ()
    gradients = torch.autograd.grad(3 * loss, (chosen, rejected))
    expected = []
    for dtype in (torch.float32, torch.float64):
        leaves = [rewards.detach().to(dtype).requires_grad_() for rewards in pairs[:2]]
        value = torch_loss((*leaves, *pairs[2:]), dtype, reduction)
        expected.append([value.detach(), *torch.autograd.grad(3 * value, leaves)])
    assert_within_budget(loss.detach(), *(results[0] for results in expected), what="loss")
    for i, (name, gradient) in enumerate(zip(("chosen", "rejected"), gradients, strict=True), start=1):
        assert gradient.dtype == pairs[0].dtype and gradient.is_contiguous()
        assert_within_budget(gradient, *(results[i] for results in expected), what=f"gradient of {name}_rewards")


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weights_dtype", DTYPES)
def test_random_inputs(reduction: str, dtype: torch.dtype, weights_dtype: torch.dtype, impl: str) -> None:
    for rows, lengths, pairs in ((1, (1, 1), 1), (3, (7, 5), 4), (2, (100, 33), 1), (40, (50, 60), 300)):
        check(inputs(rows, lengths, pairs, dtype, weights_dtype), impl, reduction)


def test_repeated_positions_are_summed(impl: str) -> None:
    chosen, rejected, *_ = inputs(2, (5, 4), 1)
    positions = torch.full((2, 6), 3)
    check((chosen, rejected, positions, positions, torch.tensor([[1.0, 2.0, 3.0, 0.0, 4.0, 5.0]] * 2)), impl)


@pytest.mark.parametrize("margin", [0.0, 1e-3, 30.0, 1e3, 1e4])
@pytest.mark.parametrize("sign", [1, -1])
def test_large_margins(margin: float, sign: int, impl: str) -> None:
    pair = torch.zeros(1, 1, dtype=torch.int64)
    check((torch.tensor([[sign * margin]]), torch.zeros(1, 1), pair, pair, torch.ones(1, 1)), impl)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-3, 1e-6, 1e-8, 300.0])
def test_small_and_large_gradients_are_rounded_to_nearest(dtype: torch.dtype, scale: float, impl: str) -> None:
    chosen, rejected, *positions, weights = inputs(4, (500, 1), 400, dtype)
    positions[0] = torch.arange(400).expand(4, -1)
    pairs = (chosen, rejected.expand(-1, 3), *positions, scale * weights)
    leaves = [rewards.detach().requires_grad_() for rewards in pairs[:2]]
    gradients = torch.autograd.grad(weighted_bt_loss(*leaves, *pairs[2:], reduction="sum", impl=impl), leaves)
    exact = [rewards.detach().double().requires_grad_() for rewards in pairs[:2]]
    expected = torch.autograd.grad(torch_loss((*exact, *pairs[2:]), torch.float64, "sum"), exact)
    for gradient, oracle in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, oracle.to(dtype), rtol=2e-7, atol=0)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_pairs_of_weight_zero_do_not_exist(reduction: str, impl: str) -> None:
    chosen, rejected, chosen_positions, rejected_positions, weights = inputs(3, (7, 5), 4)
    weights = weights + 0.1
    kept = (chosen, rejected, chosen_positions, rejected_positions, weights)
    padding = torch.zeros(3, 2)
    chosen, rejected = (torch.cat([rewards, padding * nan], dim=1) for rewards in (chosen, rejected))
    # At rewards of NaN, and at positions that are not there.
    chosen_positions = torch.cat([torch.full((3, 1), 7), chosen_positions, torch.full((3, 1), -1)], dim=1)
    rejected_positions = torch.cat([torch.full((3, 1), 6), rejected_positions, torch.full((3, 1), 99)], dim=1)
    weights = torch.cat([padding[:, :1], weights, -padding[:, :1]], dim=1)
    chosen.requires_grad_(), rejected.requires_grad_()
    loss = weighted_bt_loss(
        chosen, rejected, chosen_positions, rejected_positions, weights, reduction=reduction, impl=impl
    )
    assert torch.equal(loss, weighted_bt_loss(*kept, reduction=reduction, impl=impl))
    for gradient in torch.autograd.grad(loss, (chosen, rejected)):
        assert gradient.isfinite().all() and (gradient[:, -2:] == 0).all()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(("rows", "pairs"), [(0, 3), (2, 0), (2, 3)])
def test_no_pairs_give_zero(reduction: str, rows: int, pairs: int, impl: str) -> None:
    chosen, rejected, *positions, weights = inputs(rows, (7, 5), pairs)
    chosen.requires_grad_(), rejected.requires_grad_()
    loss = weighted_bt_loss(chosen, rejected, *positions, torch.zeros_like(weights), reduction=reduction, impl=impl)
    assert loss.item() == 0.0
    for gradient, rewards in zip(torch.autograd.grad(loss, (chosen, rejected)), (chosen, rejected), strict=True):
        assert torch.equal(gradient, torch.zeros_like(rewards))


def test_nan_and_infinite_rewards_pass_through(impl: str) -> None:
    pair = torch.zeros(1, 1, dtype=torch.int64)
    for reward, expected in ((nan, nan), (inf, 0.0), (-inf, inf)):
        loss = weighted_bt_loss(torch.tensor([[reward]]), torch.zeros(1, 1), pair, pair, torch.ones(1, 1), impl=impl)
        assert loss.item() == expected or (math.isnan(expected) and loss.isnan())


def test_strides(impl: str) -> None:
    chosen, rejected, chosen_positions, rejected_positions, weights = inputs(8, (20, 30), 6)
    check(
        (chosen[::2], rejected[::2, 3:], *(x[::2] % 20 for x in (chosen_positions, rejected_positions)), weights[::2]),
        impl,
    )
    check((chosen[:, ::2], rejected.t()[:8, :8], chosen_positions % 10, rejected_positions % 8, weights), impl)
    check(
        (chosen[:1].expand(8, -1), rejected, chosen_positions.t().contiguous().t(), rejected_positions, weights), impl
    )


def test_gradcheck_in_fp64() -> None:
    chosen, rejected, *others = inputs(3, (7, 5), 9, torch.float64, torch.float64)
    for reduction in ("mean", "sum"):
        assert torch.autograd.gradcheck(
            lambda chosen, rejected, reduction=reduction: weighted_bt_loss(
                chosen, rejected, *others, reduction=reduction
            ),
            (chosen.requires_grad_(), rejected.requires_grad_()),
        )


def test_fp64_goes_through_the_reference() -> None:
    for dtypes in ((torch.float64, torch.float32), (torch.float32, torch.float64)):
        pairs = inputs(3, (7, 5), 9, *dtypes)
        loss = weighted_bt_loss(*pairs)
        assert loss.dtype == torch.float64
        torch.testing.assert_close(loss, torch_loss(pairs, torch.float64, "mean"), rtol=1e-13, atol=0)


def test_one_side_may_be_constant(impl: str) -> None:
    chosen, rejected, *others = inputs(3, (7, 5), 9)
    both = [chosen.clone().requires_grad_(), rejected.clone().requires_grad_()]
    expected = torch.autograd.grad(weighted_bt_loss(*both, *others, impl=impl), both)
    for i in range(2):
        rewards = [chosen.clone(), rejected.clone()]
        rewards[i].requires_grad_()
        (gradient,) = torch.autograd.grad(weighted_bt_loss(*rewards, *others, impl=impl), rewards[i])
        assert torch.equal(gradient, expected[i])


def test_weights_are_constants(impl: str) -> None:
    *pairs, weights = inputs(3, (7, 5), 9)
    assert not weighted_bt_loss(*pairs, weights.requires_grad_(), impl=impl).requires_grad


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_threads(dtype: torch.dtype, kernel_impl: str) -> None:
    chosen, rejected, *others = inputs(40, (70, 50), 500, dtype)
    chosen.requires_grad_(), rejected.requires_grad_()

    def bits() -> list[torch.Tensor]:
        loss = weighted_bt_loss(chosen, rejected, *others, impl=kernel_impl)
        return [bitwise(x) for x in (loss.detach(), *torch.autograd.grad(loss, (chosen, rejected)))]

    alone = bits()
    for threads in thread_counts(kernel_impl, 2, 3, 8):
        with on_threads(threads):
            for a, b in zip(bits(), alone, strict=True):
                assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_a_row_do_not_depend_on_the_batch(dtype: torch.dtype, kernel_impl: str) -> None:
    pairs = inputs(6, (70, 150), 90, dtype)

    def gradients(rows: slice) -> list[torch.Tensor]:
        chosen, rejected, *others = (x[rows] for x in pairs)
        chosen.requires_grad_(), rejected.requires_grad_()
        loss = weighted_bt_loss(chosen, rejected, *others, reduction="sum", impl=kernel_impl)
        return [bitwise(x) for x in torch.autograd.grad(loss, (chosen, rejected))]

    whole = gradients(slice(6))
    for first, last in ((0, 1), (2, 5)):
        for a, b in zip(gradients(slice(first, last)), whole, strict=True):
            assert torch.equal(a, b[first:last])


@pytest.mark.parametrize("bad", [-1, 7, 2**40])
def test_position_outside_the_rewards(bad: int, checking_impl: str) -> None:
    chosen, rejected, chosen_positions, rejected_positions, weights = inputs(3, (7, 7), 4)
    for name, positions in (("chosen", chosen_positions), ("rejected", rejected_positions)):
        kept = positions[1, 2].item()
        positions[1, 2] = bad
        with pytest.raises(
            IndexError,
            match=rf"{name}_positions\[1, 2\] must be in 0 \.\. 6, the positions of {name}_rewards, got {bad}",
        ):
            weighted_bt_loss(chosen, rejected, chosen_positions, rejected_positions, weights + 1, impl=checking_impl)
        positions[1, 2] = kept


@pytest.mark.parametrize("bad", [-1, 7, 2**40])
def test_unchecked_position_outside_the_rewards_gives_nan(bad: int, monkeypatch: pytest.MonkeyPatch) -> None:
    impl = select("triton", monkeypatch)
    monkeypatch.setattr(pairs_module.Pairs, "check_positions", lambda self: None)
    chosen, rejected, chosen_positions, rejected_positions, weights = inputs(3, (7, 7), 4)
    chosen.requires_grad_(), rejected.requires_grad_()
    chosen_positions[1, 2] = bad
    loss = weighted_bt_loss(chosen, rejected, chosen_positions, rejected_positions, weights + 1, impl=impl)
    gradients = torch.autograd.grad(loss, (chosen, rejected))
    assert loss.isnan() and gradients[0].isfinite().all()
    assert gradients[1].isnan().nonzero().tolist() == [[1, rejected_positions[1, 2].item()]]


C, R, CP, RP, W = inputs(2, (4, 3), 5)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1.0], R, CP, RP, W), TypeError, r"chosen_rewards must be a torch\.Tensor, got list"),
        ((C[0], R, CP, RP, W), ValueError, r"chosen_rewards must have shape \[B, Tc\], got \[4\]"),
        ((C, R[0], CP, RP, W), ValueError, r"rejected_rewards must have shape \[B, Tr\], got \[3\]"),
        ((C, R, CP[0], RP, W), ValueError, r"chosen_positions must have shape \[B, K\], got \[5\]"),
        ((C, R, CP, RP, W.to("meta")), ValueError, "weights must be on cpu as the other tensors, got meta"),
        ((C.long(), R, CP, RP, W), TypeError, r"chosen_rewards must be float32.*got torch\.int64"),
        (
            (C, R.half(), CP, RP, W),
            TypeError,
            r"rejected_rewards must have the dtype of chosen_rewards, torch\.float32",
        ),
        ((C, R, CP.int(), RP, W), TypeError, r"chosen_positions must be int64, got torch\.int32"),
        ((C, R, CP, RP.int(), W), TypeError, r"rejected_positions must be int64, got torch\.int32"),
        ((C, R, CP, RP, W.bool()), TypeError, r"weights must be float32.*got torch\.bool"),
        ((C[:1], R, CP, RP, W), ValueError, r"chosen_rewards must have shape \[2, T\] with T >= 1 .*got \[1, 4\]"),
        ((C, R[:, :0], CP, RP, W), ValueError, r"rejected_rewards must have shape \[2, T\] with T >= 1 .*got \[2, 0\]"),
        ((C, R, CP, RP[:, :4], W), ValueError, r"rejected_positions must have shape \[2, 5\] to go with chosen_pos"),
        ((C, R, CP, RP, W[:, :4]), ValueError, r"weights must have shape \[2, 5\] to go with chosen_positions, got"),
    ],
)
def test_bad_arguments(arguments: tuple, error: type[Exception], message: str, impl: str) -> None:
    with pytest.raises(error, match=message):
        weighted_bt_loss(*arguments, impl=impl)


def test_bad_reduction(impl: str) -> None:
    with pytest.raises(ValueError, match="reduction must be 'mean' or 'sum', got 'none'"):
        weighted_bt_loss(C, R, CP, RP, W, reduction="none", impl=impl)


def test_binary_entropy_weight_is_the_formula() -> None:
    margins = torch.linspace(0.01, 15, 400, dtype=torch.float64)
    p = torch.sigmoid(margins)
    entropy = -p * p.log() - (1 - p) * (1 - p).log()
    torch.testing.assert_close(binary_entropy_weight(margins, clamp=None), 1 / entropy, rtol=1e-6, atol=0)
    torch.testing.assert_close(
        binary_entropy_weight(margins.float(), clamp=None).double(), 1 / entropy, rtol=2e-6, atol=0
    )
    assert torch.equal(binary_entropy_weight(-margins), torch.zeros_like(margins))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_binary_entropy_weight_at_the_ends(dtype: torch.dtype) -> None:
    margins = torch.tensor([[0.0, -0.0, -inf], [inf, nan, 2**-14]], dtype=dtype)
    weights = binary_entropy_weight(margins)
    assert weights.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert weights[0].tolist() == [0.0, 0.0, 0.0]
    assert weights[1, 0] == 100.0 and weights[1, 1].isnan()
    assert weights[1, 2].item() == pytest.approx(1 / math.log(2), rel=1e-6)
    assert binary_entropy_weight(margins, clamp=None)[1, 0] == inf


def test_binary_entropy_weight_far_out() -> None:
    # Where the naive form is NaN in fp32: e^d / (d + 1) to first order.
    for margin in (10.0, 17.0, 30.0, 80.0):
        weight = binary_entropy_weight(torch.tensor(margin), clamp=None).item()
        assert weight == pytest.approx(math.exp(margin) / (margin + 1), rel=1e-4)
    assert binary_entropy_weight(torch.tensor(10.0)).item() == 100.0
    assert binary_entropy_weight(torch.tensor(10.0), clamp=7.0).item() == 7.0


def test_binary_entropy_weight_bad_arguments() -> None:
    with pytest.raises(TypeError, match=r"margin must be a torch\.Tensor, got float"):
        binary_entropy_weight(1.0)
    with pytest.raises(TypeError, match="margin must be float32"):
        binary_entropy_weight(torch.tensor([1]))
    for clamp in (0.0, -1.0, nan):
        with pytest.raises(ValueError, match="clamp must be positive or None"):
            binary_entropy_weight(torch.tensor([1.0]), clamp=clamp)
