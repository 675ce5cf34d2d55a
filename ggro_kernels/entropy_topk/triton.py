"""`entropy_topk` and its gradient in Triton."""

import torch
import triton
import triton.language as tl

from ggro_kernels.native import with_unit_column_stride
from ggro_kernels.triton_parts.conversion import rounded, widened
from ggro_kernels.triton_parts.tuning import tuned
from ggro_kernels.triton_parts.vocabulary import empty_reduced, reduce_tiles, select


def entropy_topk(
    logits: torch.Tensor, k: int, temperature: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`(entropy[R], logsumexp[R], values[R, k], indices[R, k])` of logits [R, V]."""
    logits = with_unit_column_stride(logits)
    rows, vocab = logits.shape
    device = logits.device
    entropy, logsumexp = (torch.empty(rows, device=device) for _ in range(2))
    values = torch.empty(rows, k, dtype=logits.dtype, device=device)
    indices = torch.empty(rows, k, dtype=torch.int64, device=device)
    if rows > 0:
        reduced = empty_reduced(rows, vocab, k, device, with_sums=True)
        reduce_tiles(logits, k, reduced, temperature)
        select(logits, reduced, values, indices, statistics=(entropy, logsumexp))
    return entropy, logsumexp, values, indices


@triton.jit
def _softmax_gradient(b_x, row, p_entropy, p_logsumexp, p_entropy_gradient, p_logsumexp_gradient, temperature):
    """fp32 gradient of logits b_x of a row by its entropy and logsumexp; 0 where the probability is 0."""
    entropy, logsumexp = tl.load(p_entropy + row), tl.load(p_logsumexp + row)
    entropy_gradient, logsumexp_gradient = tl.load(p_entropy_gradient + row), tl.load(p_logsumexp_gradient + row)
    b_log_p = tl.div_rn(b_x, temperature) - logsumexp
    # A statistic of NaN matters only where its gradient is used.
    b_entropy_terms = tl.where(entropy_gradient == 0.0, 0.0, entropy_gradient * (b_log_p + entropy))
    b_gradient = tl.div_rn(tl.exp(b_log_p) * (logsumexp_gradient - b_entropy_terms), temperature)
    b_gradient = tl.where((b_x == float("-inf")) | (b_log_p == float("-inf")), 0.0, b_gradient)
    return tl.where((entropy_gradient == 0.0) & (logsumexp_gradient == 0.0), 0.0, b_gradient)


@tuned(triton.Config({"TILE": 2048}, num_warps=4), triton.Config({"TILE": 4096}, num_warps=4), key=())
@triton.jit
def _backward(
    p_entropy_gradient,
    p_logsumexp_gradient,
    p_logits,
    p_entropy,
    p_logsumexp,
    p_gradient,
    row_stride,
    vocab,
    temperature,
    TILE: tl.constexpr,
):
    tiles = tl.cdiv(vocab, TILE)
    row = (tl.program_id(0) // tiles).to(tl.int64)
    o_column = tl.program_id(0) % tiles * TILE + tl.arange(0, TILE)
    m_column = o_column < vocab
    b_x = widened(tl.load(p_logits + row * row_stride + o_column, mask=m_column, other=0.0))
    b_gradient = _softmax_gradient(
        b_x, row, p_entropy, p_logsumexp, p_entropy_gradient, p_logsumexp_gradient, temperature
    )
    tl.store(p_gradient + row * vocab + o_column, rounded(b_gradient, p_gradient.dtype.element_ty), mask=m_column)


@triton.jit
def _backward_of_values(
    p_entropy_gradient,
    p_logsumexp_gradient,
    p_values_gradient,
    p_logits,
    p_entropy,
    p_logsumexp,
    p_indices,
    p_gradient,
    row_stride,
    vocab,
    k,
    temperature,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    o_k = tl.arange(0, BLOCK_K)
    m_k = o_k < k
    b_indices = tl.load(p_indices + row * k + o_k, mask=m_k, other=0)
    b_x = widened(tl.load(p_logits + row * row_stride + b_indices, mask=m_k, other=0.0))
    # Computed once more, since what lies in memory has been rounded.
    b_gradient = _softmax_gradient(
        b_x, row, p_entropy, p_logsumexp, p_entropy_gradient, p_logsumexp_gradient, temperature
    )
    b_gradient += widened(tl.load(p_values_gradient + row * k + o_k, mask=m_k, other=0.0))
    tl.store(p_gradient + row * vocab + b_indices, rounded(b_gradient, p_gradient.dtype.element_ty), mask=m_k)


def entropy_topk_backward(
    entropy_gradient: torch.Tensor,
    logsumexp_gradient: torch.Tensor,
    values_gradient: torch.Tensor,
    logits: torch.Tensor,
    entropy: torch.Tensor,
    logsumexp: torch.Tensor,
    indices: torch.Tensor,
    temperature: float,
) -> torch.Tensor:
    """Gradient [R, V] of the logits, in their dtype."""
    entropy_gradient, logsumexp_gradient = entropy_gradient.contiguous(), logsumexp_gradient.contiguous()
    values_gradient, logits = values_gradient.contiguous(), with_unit_column_stride(logits)
    rows, vocab = logits.shape
    k = indices.shape[1]
    gradient = torch.empty(rows, vocab, dtype=logits.dtype, device=logits.device)
    if rows == 0:
        return gradient
    _backward[lambda meta: (rows * triton.cdiv(vocab, meta["TILE"]),)](
        entropy_gradient,
        logsumexp_gradient,
        logits,
        entropy,
        logsumexp,
        gradient,
        logits.stride(0),
        vocab,
        temperature,
    )
    _backward_of_values[(rows,)](
        entropy_gradient,
        logsumexp_gradient,
        values_gradient,
        logits,
        entropy,
        logsumexp,
        indices,
        gradient,
        logits.stride(0),
        vocab,
        k,
        temperature,
        BLOCK_K=triton.next_power_of_2(k),
    )
    return gradient
