"""Entropy, logsumexp and top k of rows as wide as a vocabulary, in two launches.

Every program of the first reads one tile of a row, once: the sums of its softmax and the maxima of groups of columns.
One program a row of the second merges the sums and selects: the k largest logits lie in the k groups whose maxima are
the largest (of equal ones the first), so it reads those groups again and nothing else.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ggro_kernels.triton_parts.conversion import widened
from ggro_kernels.triton_parts.selection import (
    KEY_SHIFTS,
    candidates_of,
    order_keys,
    ranked,
    top_k_places,
)
from ggro_kernels.triton_parts.softmax_sums import statistics, sums_of
from ggro_kernels.triton_parts.tuning import tuned

TILE = 4096
"""How many logits one program takes: the same for every batch, so that a row's bits do not depend on it."""


def group_of(k: int) -> int:
    """How many columns share a maximum: V / group maxima and k * group logits are left to be searched."""
    return 64 if k <= 64 else 32


class Reduced(NamedTuple):
    """What a first read keeps of R rows."""

    maxima: torch.Tensor
    """[R, groups of whole tiles] fp32; NaN where a group has a NaN, -inf beyond the last column."""
    sums: torch.Tensor | None
    """[R, 3, tiles] fp32: m, s, t of `softmax_sums`; None where no statistics are wanted."""


def empty_reduced(rows: int, vocab: int, k: int, device: torch.device, *, with_sums: bool) -> Reduced:
    """Room for what `reduce_tiles` finds."""
    tiles = triton.cdiv(vocab, TILE)
    maxima = torch.empty(rows, tiles * (TILE // group_of(k)), device=device)
    return Reduced(maxima, torch.empty(rows, 3, tiles, device=device) if with_sums else None)


@tuned(triton.Config({}, num_warps=4), triton.Config({}, num_warps=8), key=("GROUP",))
@triton.jit
def _reduce_tiles(
    p_logits,
    p_maxima,
    p_sums,
    row_stride,
    columns,
    slab_tiles,
    first_tile,
    tiles,
    temperature,
    SUMS: tl.constexpr,
    DIVIDE: tl.constexpr,
    TILE: tl.constexpr,
    GROUP: tl.constexpr,
):
    row = (tl.program_id(0) // slab_tiles).to(tl.int64)
    tile = tl.program_id(0) % slab_tiles
    o_column = tile * TILE + tl.arange(0, TILE)
    b_x = widened(tl.load(p_logits + row * row_stride + o_column, mask=o_column < columns, other=float("-inf")))

    if SUMS:
        m, s, t = sums_of(tl.div_rn(b_x, temperature) if DIVIDE else b_x)
        p_row = p_sums + row * 3 * tiles + first_tile + tile
        tl.store(p_row, m)
        tl.store(p_row + tiles, s)
        tl.store(p_row + 2 * tiles, t)
    else:
        # NaN where there is one; infinities make one too, which does no harm.
        s = tl.sum(b_x * 0.0, 0)

    b_groups = tl.reshape(b_x, [TILE // GROUP, GROUP])
    b_maxima = tl.max(b_groups, 1)
    # tl.max passes NaN over, unless there is nothing else.
    if s != s:
        b_maxima = tl.where(tl.max((b_groups != b_groups).to(tl.int32), 1) > 0, float("nan"), b_maxima)
    o_group = tile * (TILE // GROUP) + tl.arange(0, TILE // GROUP)
    tl.store(p_maxima + row * slab_tiles * (TILE // GROUP) + o_group, b_maxima)


def reduce_tiles(logits: torch.Tensor, k: int, reduced: Reduced, temperature: float = 1.0, first_tile: int = 0) -> None:
    """Read logits [R, columns] once: their maxima, and their sums as those of the tiles from `first_tile` on.

    The maxima start at 0: a slab of a vocabulary, which ends where a tile ends, is selected from before the next.
    """
    rows, columns = logits.shape
    slab_tiles = triton.cdiv(columns, TILE)
    _reduce_tiles[(rows * slab_tiles,)](
        logits,
        reduced.maxima,
        reduced.sums,
        logits.stride(0),
        columns,
        slab_tiles,
        first_tile,
        0 if reduced.sums is None else reduced.sums.shape[2],
        temperature,
        SUMS=reduced.sums is not None,
        DIVIDE=temperature != 1.0,
        TILE=TILE,
        GROUP=group_of(k),
    )


@triton.jit
def store_statistics(p_sums, p_entropy, p_logsumexp, row, tiles, BLOCK_T: tl.constexpr):
    """Entropy and logsumexp of one row from the sums of its tiles."""
    o_tile = tl.arange(0, BLOCK_T)
    m_tile = o_tile < tiles
    p_row = p_sums + row * 3 * tiles + o_tile
    b_m = tl.load(p_row, mask=m_tile, other=float("-inf"))
    b_s = tl.load(p_row + tiles, mask=m_tile, other=0.0)
    b_t = tl.load(p_row + 2 * tiles, mask=m_tile, other=0.0)
    entropy, logsumexp = statistics(b_m, b_s, b_t)
    tl.store(p_entropy + row, entropy)
    tl.store(p_logsumexp + row, logsumexp)


@tuned(triton.Config({}, num_warps=8), triton.Config({}, num_warps=4), key=("BLOCK_G", "BLOCK_E"))
@triton.jit
def _select(
    p_logits,
    p_maxima,
    p_sums,
    p_column_indices,
    p_groups,
    p_candidates,
    p_entropy,
    p_logsumexp,
    p_values,
    p_indices,
    row_stride,
    columns,
    groups,
    tiles,
    first_column,
    output_stride,
    k,
    SHIFT: tl.constexpr,
    SUMS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    p_logits += row * row_stride
    p_groups += row * k
    p_candidates += row * k

    o_element = tl.arange(0, BLOCK_E)
    if BLOCK_G == 0:
        o_column = o_element
        m_column = o_element < columns
    else:
        o_group = tl.arange(0, BLOCK_G)
        m_group = o_group < groups
        b_maxima = tl.load(p_maxima + row * groups + o_group, mask=m_group, other=0.0)
        m_taken, b_places = top_k_places(tl.where(m_group, order_keys(b_maxima, SHIFT), 0), k, 32 - SHIFT)
        tl.store(p_groups + b_places, o_group, mask=m_taken)
        # All threads of this program have written before one of them reads.
        tl.debug_barrier()
        # In ascending order, so that the order of positions is that of the columns.
        m_element = o_element // GROUP < k
        o_column = tl.load(p_groups + o_element // GROUP, mask=m_element, other=0) * GROUP + o_element % GROUP
        m_column = m_element & (o_column < columns)
    b_x = widened(tl.load(p_logits + o_column, mask=m_column, other=0.0))
    b_keys = tl.where(m_column, order_keys(b_x, SHIFT), 0)
    m_taken, b_places = top_k_places(b_keys, k, 32 - SHIFT)
    tl.store(p_candidates + b_places, candidates_of(b_keys, o_column), mask=m_taken)
    tl.debug_barrier()

    b_indices, b_ranks = ranked(p_candidates, k, BLOCK_K)
    m_k = tl.arange(0, BLOCK_K) < k
    b_column_indices = b_indices + first_column
    if p_column_indices is not None:
        b_column_indices = tl.load(p_column_indices + row * row_stride + b_indices, mask=m_k, other=0)
    tl.store(p_indices + row * output_stride + b_ranks, b_column_indices, mask=m_k)
    # Loaded once more: a conversion to fp32 and back may change the bits of a NaN.
    b_values = tl.load(p_logits + b_indices, mask=m_k, other=0.0)
    tl.store(p_values + row * output_stride + b_ranks, b_values, mask=m_k)
    if SUMS:
        store_statistics(p_sums, p_entropy, p_logsumexp, row, tiles, BLOCK_T)


def select(
    logits: torch.Tensor,
    reduced: Reduced | None,
    values: torch.Tensor,
    indices: torch.Tensor,
    *,
    first_column: int = 0,
    column_indices: torch.Tensor | None = None,
    statistics: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> None:
    """Fill values and indices [R, k], of one row stride, from logits [R, columns] that were reduced, k <= columns.

    Few enough columns, up to k groups of them, need not be reduced. Indices are those of the columns plus
    `first_column`, or what `column_indices`, of the strides of the logits, has for them. `statistics`, entropy [R] and
    logsumexp [R], are filled from the sums of all tiles.
    """
    rows, columns = logits.shape
    k = values.shape[1]
    group = group_of(k)
    # Those beyond the last column are the last of the smallest: not one of them is among the k best.
    groups = triton.cdiv(columns, TILE) * (TILE // group)
    # Few columns are searched as they are.
    elements = min(group * triton.next_power_of_2(k), triton.next_power_of_2(columns))
    grouped = elements < columns
    maxima, sums = reduced or (None, None)
    tiles = 0 if sums is None else sums.shape[2]
    entropy, logsumexp = statistics or (None, None)
    _select[(rows,)](
        logits,
        maxima,
        sums,
        column_indices,
        torch.empty(rows, k, dtype=torch.int32, device=logits.device),
        torch.empty(rows, k, dtype=torch.int64, device=logits.device),
        entropy,
        logsumexp,
        values,
        indices,
        logits.stride(0),
        columns,
        groups,
        tiles,
        first_column,
        values.stride(0),
        k,
        SHIFT=KEY_SHIFTS[logits.dtype],
        SUMS=statistics is not None,
        GROUP=group,
        BLOCK_G=triton.next_power_of_2(groups) if grouped else 0,
        BLOCK_E=elements,
        BLOCK_K=max(32, triton.next_power_of_2(k)),
        BLOCK_T=triton.next_power_of_2(tiles),
    )
