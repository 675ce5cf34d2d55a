"""Hypothesis strategies for what ops are called with: odd shapes, any memory layout, special values."""

from typing import Any

import torch
from hypothesis import strategies as st

from tests.conftest import poison

NATIVE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

dtypes = st.sampled_from(NATIVE_DTYPES)
seeds = st.integers(0, 2**32 - 1)
thread_counts = st.integers(2, 7)


def sizes(largest: int, *more: int) -> st.SearchStrategy[int]:
    """1 .. largest, small ones first, or one of `more`."""
    return st.one_of(st.integers(1, min(largest, 20)), st.integers(1, largest), st.sampled_from(more or (largest,)))


@st.composite
def layouts(draw: Any, x: torch.Tensor) -> torch.Tensor:
    """`x` anywhere in memory: any order of dimensions, gaps, steps, an offset; the last element may end the storage.

    What lies between the elements is NaN (integers: a huge negative number; bool: true), so that reading it does not
    go unnoticed. One dimension may be expanded, which repeats its first slice.
    """
    if x.numel() and draw(st.integers(0, 5)) == 5:
        dim = draw(st.integers(0, x.dim() - 1))
        return draw(layouts(x.narrow(dim, 0, 1))).expand(x.shape)
    if draw(st.booleans()):
        return x.contiguous()
    order = draw(st.permutations(range(x.dim())))
    gaps = [draw(st.sampled_from((0, 0, 1, 3))) for _ in order]
    steps = [draw(st.sampled_from((1, 1, 2))) for _ in order]
    spans = [gap + max(0, (x.shape[dim] - 1) * step + 1) for dim, gap, step in zip(order, gaps, steps, strict=True)]
    offset = draw(st.integers(0, 3))
    storage = torch.full((offset + torch.Size(spans).numel(),), poison(x.dtype), dtype=x.dtype)
    parts = tuple(slice(gap, None, step) for gap, step in zip(gaps, steps, strict=True))
    view = storage[offset:].view(spans)[parts].permute([order.index(dim) for dim in range(x.dim())])
    return view.copy_(x)


def special_values(dtype: torch.dtype, largest: float) -> tuple[float, ...]:
    """-inf, +inf, NaN, zeros of both signs, denormals, and plus and minus `largest`."""
    denormal = torch.finfo(dtype).smallest_normal / 4
    largest = min(largest, torch.finfo(dtype).max)
    return (-torch.inf, torch.inf, torch.nan, -0.0, 0.0, denormal, -denormal, largest, -largest)


@st.composite
def values(draw: Any, shape: tuple[int, ...], dtype: torch.dtype, *, largest: float = torch.inf) -> torch.Tensor:
    """A contiguous tensor: normal numbers, small integers (which tie) or a constant, with special values strewn in."""
    generator = torch.Generator().manual_seed(draw(seeds))
    kind = draw(st.sampled_from(("normal", "integer", "constant", "sorted")))
    x = torch.randn(shape, generator=generator) * draw(st.sampled_from((1.0, 3.0, 1e-3, 100.0)))
    if kind == "integer":
        x = x.round().clamp(-8, 8)
    elif kind == "constant":
        x = torch.full(shape, 1.5)
    elif kind == "sorted" and shape:
        x = x.sort(dim=-1, descending=draw(st.booleans())).values
    x = x.to(dtype)
    for special in draw(st.lists(st.sampled_from(special_values(dtype, largest)), max_size=3)):
        share = draw(st.sampled_from((0.01, 0.3, 1.0)))
        x[torch.rand(shape, generator=generator) < share] = special
    return x


@st.composite
def tensors(draw: Any, shape: tuple[int, ...], dtype: torch.dtype | None = None, **kwargs: Any) -> torch.Tensor:
    """`values` in one of `layouts`; without `dtype`, of any dtype that the native kernels take."""
    return draw(layouts(draw(values(shape, dtype or draw(dtypes), **kwargs))))


@st.composite
def integer_valued(draw: Any, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> torch.Tensor:
    """Whole numbers in -8 .. 8 in one of `layouts`: sums of their products are exact in fp32."""
    generator = torch.Generator().manual_seed(draw(seeds))
    return draw(layouts(torch.randint(-8, 9, shape, generator=generator).to(dtype or draw(dtypes))))


@st.composite
def ids(draw: Any, shape: tuple[int, ...], vocab: int) -> torch.Tensor:
    """int64 in 0 .. vocab - 1 in one of `layouts`."""
    generator = torch.Generator().manual_seed(draw(seeds))
    return draw(layouts(torch.randint(vocab, shape, generator=generator)))


@st.composite
def masks(draw: Any, shape: tuple[int, ...]) -> torch.Tensor:
    """bool, true for none, some, most or all elements, in one of `layouts`."""
    generator = torch.Generator().manual_seed(draw(seeds))
    share = draw(st.sampled_from((0.0, 0.1, 0.9, 1.0)))
    return draw(layouts(torch.rand(shape, generator=generator) < share))


def flush_denormals(x: torch.Tensor) -> None:
    """Set the denormals of x to zero, in place and whatever its strides."""
    elements = torch.tensor([], dtype=x.dtype).set_(x.untyped_storage())
    elements[elements.abs() < torch.finfo(x.dtype).smallest_normal] = 0
