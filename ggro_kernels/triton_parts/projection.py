"""The best rows of a table for each of some vectors, with statistics of the softmax of all of them, in one read of it.

The table is walked in slabs. One launch computes the scores of a slab for all vectors, two of `vocabulary` reduce them
and select from them while they are in the GPU's cache; with several slabs, another selects from the best of each.
Sums are those of tiles of the whole vocabulary and selection is exact, so that no bit depends on the slabs.
"""

import torch
import triton
import triton.language as tl

from ggro_kernels.native import with_unit_column_stride
from ggro_kernels.triton_parts.conversion import INTERPRETED, widened
from ggro_kernels.triton_parts.softcap import softcapped
from ggro_kernels.triton_parts.tuning import tuned
from ggro_kernels.triton_parts.vocabulary import TILE, Reduced, empty_reduced, reduce_tiles, select

SCORES = 2**23
"""How many scores are computed at once: 32 MB. With very many vectors it is one tile of each of them."""

LARGEST_SLABS = 32
"""Into how many slabs a vocabulary is cut at most: k of each are selected from at the end."""


@triton.jit
def _scores(
    p_vectors,
    p_table,
    p_bias,
    p_forbidden,
    p_scores,
    vectors,
    columns,
    width,
    vector_stride,
    table_stride,
    table_column_stride,
    bias_stride,
    forbidden_stride,
    scores_stride,
    first_column,
    softcap,
    SOFTCAP: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # Programs of the same columns are neighbours: the first to read them brings them into the cache for all.
    vector_blocks = tl.cdiv(vectors, BLOCK_M)
    o_vector = ((tl.program_id(0) % vector_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    o_column = (tl.program_id(0) // vector_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_token = o_column.to(tl.int64) + first_column
    m_vector, m_column = o_vector < vectors, o_column < columns

    o_d = tl.arange(0, BLOCK_D)
    p_a = p_vectors + o_vector[:, None] * vector_stride + o_d[None, :]
    p_b = p_table + o_token[None, :] * table_stride + o_d.to(tl.int64)[:, None] * table_column_stride
    b_scores = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(0, width, BLOCK_D):
        m_d = o_d < width - first
        b_a = tl.load(p_a, mask=m_vector[:, None] & m_d[None, :], other=0.0)  # [BLOCK_M, BLOCK_D]
        b_b = tl.load(p_b, mask=m_d[:, None] & m_column[None, :], other=0.0)  # [BLOCK_D, BLOCK_N]
        if UPCAST:
            b_a, b_b = widened(b_a), widened(b_b)
        # Tensor cores truncate as they add: only BLOCK_D products in a chain, the rest in rounded additions. An fma,
        # since the compiler would make a product that is added into one that starts from the sum.
        b_scores = tl.fma(tl.dot(b_a, b_b, input_precision="ieee"), 1.0, b_scores)
        p_a += BLOCK_D
        p_b += BLOCK_D * table_column_stride

    if p_bias is not None:
        b_bias = widened(tl.load(p_bias + o_token * bias_stride, mask=m_column, other=0.0))
        b_scores += b_bias[None, :]
    if SOFTCAP:
        b_scores = softcapped(b_scores, softcap)
    if p_forbidden is not None:
        m_forbidden = tl.load(p_forbidden + o_token * forbidden_stride, mask=m_column, other=False)
        b_scores = tl.where(m_forbidden[None, :], float("-inf"), b_scores)
    p_out = p_scores + o_vector[:, None] * scores_stride + o_column[None, :]
    tl.store(p_out, b_scores, mask=m_vector[:, None] & m_column[None, :])


# For any number of vectors, however few: 64 is the least that the matrix instructions of sm_90 take.
_scores_by_tensor_cores = tuned(
    triton.Config({"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_D": 64}, num_warps=8, num_stages=4),
    triton.Config({"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_D": 64}, num_warps=4, num_stages=4),
    triton.Config({"BLOCK_M": 64, "BLOCK_N": 256, "BLOCK_D": 64}, num_warps=8, num_stages=3),
    key=("width", "table_column_stride"),
)(_scores)

_scores_in_fp32 = tuned(
    triton.Config({"BLOCK_M": 16, "BLOCK_N": 128, "BLOCK_D": 32}, num_warps=8, num_stages=3),
    triton.Config({"BLOCK_M": 16, "BLOCK_N": 128, "BLOCK_D": 16}, num_warps=4, num_stages=4),
    triton.Config({"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_D": 32}, num_warps=4, num_stages=3),
    key=("width", "table_column_stride"),
)(_scores)


def _slab_of(vectors: int, vocab: int) -> int:
    """How many columns are scored at once, in whole tiles."""
    tiles = triton.cdiv(vocab, TILE)
    return TILE * min(tiles, max(1, SCORES // (vectors * TILE), triton.cdiv(tiles, LARGEST_SLABS)))


def project(
    vectors: torch.Tensor,
    table: torch.Tensor,
    values: torch.Tensor,
    indices: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    forbidden: torch.Tensor | None = None,
    softcap: float | None = None,
    temperature: float = 1.0,
    statistics: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> None:
    """Fill values (fp32) and indices [R, k] from the scores of vectors [R, d], R of 1 or more, with table [V, d].

    A score is the dot product, plus bias [V], bounded by `softcap`; -inf where forbidden [V]. `statistics`, entropy
    [R] and logsumexp [R], are those of the scores divided by `temperature`. The table is read where it lies, whatever
    its strides.
    """
    vectors = with_unit_column_stride(vectors)
    (rows, width), vocab, k = vectors.shape, table.shape[0], values.shape[1]
    device = vectors.device
    halves = vectors.dtype == table.dtype != torch.float32
    score = _scores_by_tensor_cores if halves else _scores_in_fp32
    slab = _slab_of(rows, vocab)
    firsts = range(0, vocab, slab)
    scores = torch.empty(rows, slab, device=device)
    reduced = empty_reduced(rows, slab, k, device, with_sums=False)
    if statistics is not None:
        reduced = Reduced(reduced.maxima, torch.empty(rows, 3, triton.cdiv(vocab, TILE), device=device))

    best, best_columns = values, indices
    if len(firsts) > 1:
        candidates = k * (len(firsts) - 1) + min(k, vocab - firsts[-1])
        best = torch.empty(rows, candidates, device=device)
        best_columns = torch.empty(rows, candidates, dtype=torch.int64, device=device)
    for number, first in enumerate(firsts):
        columns = min(slab, vocab - first)
        score[
            lambda meta, columns=columns: (triton.cdiv(rows, meta["BLOCK_M"]) * triton.cdiv(columns, meta["BLOCK_N"]),)
        ](
            vectors,
            table,
            bias,
            forbidden,
            scores,
            rows,
            columns,
            width,
            vectors.stride(0),
            table.stride(0),
            table.stride(1),
            0 if bias is None else bias.stride(0),
            0 if forbidden is None else forbidden.stride(0),
            slab,
            first,
            softcap,
            SOFTCAP=softcap is not None,
            UPCAST=not halves or INTERPRETED.value,
        )
        slab_scores = scores[:, :columns]
        reduce_tiles(slab_scores, k, reduced, temperature, first_tile=first // TILE)
        places = slice(k * number, k * number + min(k, columns))
        select(
            slab_scores,
            reduced,
            best[:, places],
            best_columns[:, places],
            first_column=first,
            statistics=statistics if first == firsts[-1] else None,
        )
    if len(firsts) > 1:
        # Slabs and the best of each are in the order that is wanted among equal values.
        select(best, None, values, indices, column_indices=best_columns)
