"""`weighted_bt_loss` and its gradient by Triton: fp64 sums in a fixed order, no atomics.

A launch looks at all pairs; a second one adds up its partial sums, or gathers for every position what its pairs say.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from ggro_kernels.triton_parts.conversion import rounded, widened
from ggro_kernels.triton_parts.tuning import tuned
from ggro_kernels.weighted_bt_loss.pairs import Pairs

PAIRS_AT_ONCE = 512


@triton.jit
def _total(p_partials, partials, BLOCK: tl.constexpr):
    """The sum of fp64 numbers."""
    b_sum = tl.full([BLOCK], 0.0, tl.float64)
    for first in range(0, partials, BLOCK):
        o_partial = first + tl.arange(0, BLOCK)
        b_sum += tl.load(p_partials + o_partial, mask=o_partial < partials, other=0.0)
    return tl.sum(b_sum, axis=0)


@triton.jit
def _compare_kernel(
    p_chosen,
    chosen_stride,
    chosen_length,
    p_rejected,
    rejected_stride,
    rejected_length,
    p_chosen_positions,
    p_rejected_positions,
    p_weights,
    p_loss_gradient,
    p_slopes,
    p_losses,
    p_counts,
    pairs,
    blocks,
    SLOPES: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Program = BLOCK_K pairs of one row: how many there are, and their loss or the slope of each."""
    row = (tl.program_id(0) // blocks).to(tl.int64)
    o_k = tl.program_id(0) % blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    o_pair = row * pairs + o_k
    b_weight = widened(tl.load(p_weights + o_pair, mask=o_k < pairs, other=0.0)).to(tl.float64)
    m_pair = b_weight != 0.0
    b_position = tl.load(p_chosen_positions + o_pair, mask=m_pair, other=-1)
    m_chosen = (b_position >= 0) & (b_position < chosen_length)
    b_chosen = tl.load(p_chosen + row * chosen_stride + b_position, mask=m_chosen, other=0.0)
    b_position = tl.load(p_rejected_positions + o_pair, mask=m_pair, other=-1)
    m_rejected = (b_position >= 0) & (b_position < rejected_length)
    b_rejected = tl.load(p_rejected + row * rejected_stride + b_position, mask=m_rejected, other=0.0)
    # A position outside the rewards cannot raise here.
    b_margin = widened(b_chosen).to(tl.float64) - widened(b_rejected).to(tl.float64)
    b_margin = tl.where(m_chosen & m_rejected, b_margin, float("nan"))
    tl.store(p_counts + tl.program_id(0), tl.sum(m_pair.to(tl.int32), axis=0).to(tl.float64))
    if SLOPES:
        b_slope = tl.load(p_loss_gradient).to(tl.float64) * b_weight / (1.0 + tl.exp(b_margin))
        tl.store(p_slopes + o_pair, tl.where(m_pair, b_slope, 0.0), mask=o_k < pairs)
    else:
        # softplus(-margin) is log(1 + x), and -margin more where the margin is negative; log(1 + x) for x up to 1 is
        # the series of 2 atanh(x / (2 + x)), relative error below 1e-11.
        b_x = tl.exp(-tl.abs(b_margin))
        b_ratio = b_x / (2.0 + b_x)
        b_series = tl.full([BLOCK_K], 1.0 / 19.0, tl.float64)
        for odd in tl.static_range(17, 0, -2):
            b_series = b_series * b_ratio * b_ratio + 1.0 / odd
        b_loss = 2.0 * b_ratio * b_series
        b_loss = b_weight * tl.where(b_margin < 0.0, b_loss - b_margin, b_loss)
        tl.store(p_losses + tl.program_id(0), tl.sum(tl.where(m_pair, b_loss, 0.0), axis=0))


@triton.jit
def _loss_kernel(p_losses, p_counts, p_loss, partials, MEAN: tl.constexpr, BLOCK: tl.constexpr):
    """One program."""
    loss = _total(p_losses, partials, BLOCK)
    if MEAN:
        loss = loss / tl.maximum(_total(p_counts, partials, BLOCK), 1.0)
    tl.store(p_loss, loss.to(tl.float32))


@tuned(
    triton.Config({"BLOCK_K": 64, "BLOCK_T": 64}, num_warps=8),
    triton.Config({"BLOCK_K": 32, "BLOCK_T": 64}, num_warps=4),
    triton.Config({"BLOCK_K": 32, "BLOCK_T": 128}, num_warps=8),
    key=("length", "pairs"),
)
@triton.jit
def _gather_slopes_kernel(
    p_slopes,
    p_positions,
    p_count,
    p_gradient,
    length,
    pairs,
    CHOSEN: tl.constexpr,
    MEAN: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Program = BLOCK_T positions of one row, which look through all its pairs."""
    blocks = (length + BLOCK_T - 1) // BLOCK_T
    row = (tl.program_id(0) // blocks).to(tl.int64)
    o_t = tl.program_id(0) % blocks * BLOCK_T + tl.arange(0, BLOCK_T)
    b_sum = tl.full([BLOCK_K, BLOCK_T], 0.0, tl.float64)
    for first in range(0, pairs, BLOCK_K):
        o_k = first + tl.arange(0, BLOCK_K)
        b_position = tl.load(p_positions + row * pairs + o_k, mask=o_k < pairs, other=-1)
        b_slope = tl.load(p_slopes + row * pairs + o_k, mask=o_k < pairs, other=0.0)
        b_sum += tl.where(b_position[:, None] == o_t[None, :], b_slope[:, None], 0.0)
    b_gradient = tl.sum(b_sum, axis=0)
    if CHOSEN:
        b_gradient = 0.0 - b_gradient
    if MEAN:
        b_gradient = b_gradient / tl.maximum(tl.load(p_count), 1.0)
    b_gradient = rounded(b_gradient.to(tl.float32), p_gradient.dtype.element_ty)
    tl.store(p_gradient + row * length + o_t, b_gradient, mask=o_t < length)


def _compare(
    pairs: Pairs, loss_gradient: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Partial losses and counts, and slopes [B, K], all in fp64; the slopes if there is a gradient of the loss."""
    pairs.check_positions()
    rows, count = pairs.weights.shape
    blocks = triton.cdiv(count, PAIRS_AT_ONCE)
    losses, counts = torch.empty(2, rows * blocks, dtype=torch.float64, device=pairs.weights.device)
    slopes = None
    if loss_gradient is not None:
        slopes = torch.empty(rows, count, dtype=torch.float64, device=pairs.weights.device)
    if rows * blocks > 0:
        _compare_kernel[(rows * blocks,)](
            pairs.chosen_rewards,
            pairs.chosen_rewards.stride(0),
            pairs.chosen_rewards.shape[1],
            pairs.rejected_rewards,
            pairs.rejected_rewards.stride(0),
            pairs.rejected_rewards.shape[1],
            pairs.chosen_positions,
            pairs.rejected_positions,
            pairs.weights,
            loss_gradient,
            slopes,
            losses,
            counts,
            count,
            blocks,
            SLOPES=slopes is not None,
            BLOCK_K=PAIRS_AT_ONCE,
        )
    return losses, counts, slopes


def weighted_bt_loss(*arguments: Any) -> torch.Tensor:
    """The loss of `Pairs`, a scalar; NaN on a GPU for a position outside the rewards."""
    pairs = Pairs(*arguments).laid_out()
    losses, counts, _ = _compare(pairs, None)
    loss = torch.empty((), dtype=torch.float32, device=losses.device)
    _loss_kernel[(1,)](losses, counts, loss, len(losses), MEAN=pairs.reduction == "mean", BLOCK=1024)
    return loss


def weighted_bt_loss_backward(loss_gradient: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """`(chosen_gradient[B, Tc], rejected_gradient[B, Tr])` of `Pairs` in the dtype of the rewards."""
    pairs = Pairs(*arguments).laid_out()
    _, counts, slopes = _compare(pairs, loss_gradient)
    mean = pairs.reduction == "mean"
    # Whole numbers, whose sum is the same in any order.
    count = counts.sum() if mean else None

    def gathered(rewards: torch.Tensor, positions: torch.Tensor, chosen: bool) -> torch.Tensor:
        gradient = torch.empty(rewards.shape, dtype=rewards.dtype, device=rewards.device)
        rows, length = rewards.shape
        if rows > 0:
            _gather_slopes_kernel[lambda meta: (rows * triton.cdiv(length, meta["BLOCK_T"]),)](
                slopes,
                positions,
                count,
                gradient,
                length,
                positions.shape[1],
                CHOSEN=chosen,
                MEAN=mean,
            )
        return gradient

    return (
        gathered(pairs.chosen_rewards, pairs.chosen_positions, True),
        gathered(pairs.rejected_rewards, pairs.rejected_positions, False),
    )
