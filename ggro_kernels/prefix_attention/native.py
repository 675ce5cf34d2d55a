"""`prefix_attention` and its gradient by the extension; csrc/cuda has no kernel of the gradient."""

from collections.abc import Callable

import torch

from ggro_kernels.dispatch import native
from ggro_kernels.native import DTYPE_CODES, address, run, with_unit_column_stride

_NO_WINDOW = 2**62


def prefix_attention(
    query: torch.Tensor,
    prefix_key: torch.Tensor,
    prefix_value: torch.Tensor,
    branch_key: torch.Tensor,
    branch_value: torch.Tensor,
    branch_starts: torch.Tensor,
    branch_ends: torch.Tensor | None,
    prefix_lengths: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> torch.Tensor:
    """output [B, Hq, T, Dv]; arguments as in the public function."""
    tensors = tuple(map(with_unit_column_stride, (query, prefix_key, prefix_value, branch_key, branch_value)))
    branches = tuple(map(_contiguous, (branch_starts, branch_ends, prefix_lengths)))
    batch, query_heads, tokens, _ = query.shape
    output = query.new_empty(batch, tokens, query_heads, prefix_value.shape[3])
    run(
        "prefix_attention",
        query.device,
        DTYPE_CODES[query.dtype],
        *map(_view, tensors),
        *map(address, branches),
        *_fields(tensors, scale, softcap, window),
        output.data_ptr(),
    )
    return output.transpose(1, 2)


def prefix_attention_backward(
    gradient: torch.Tensor,
    query: torch.Tensor,
    prefix_key: torch.Tensor,
    prefix_value: torch.Tensor,
    branch_key: torch.Tensor,
    branch_value: torch.Tensor,
    branch_starts: torch.Tensor,
    branch_ends: torch.Tensor | None,
    prefix_lengths: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What reaches query, branch_key and branch_value from gradient [B, Hq, T, Dv] on the CPU."""
    gradient = with_unit_column_stride(gradient)
    tensors = tuple(map(with_unit_column_stride, (query, prefix_key, prefix_value, branch_key, branch_value)))
    branches = tuple(map(_contiguous, (branch_starts, branch_ends, prefix_lengths)))
    outputs = [query.new_empty(x.transpose(1, 2).shape) for x in (query, branch_key, branch_value)]
    run(
        "prefix_attention_backward",
        query.device,
        DTYPE_CODES[query.dtype],
        _view(gradient),
        *map(_view, tensors),
        *map(address, branches),
        *_fields(tensors, scale, softcap, window),
        *map(address, outputs),
    )
    of_query, of_key, of_value = (output.transpose(1, 2) for output in outputs)
    return of_query, of_key, of_value


def prepared(
    query: torch.Tensor,
    branch_key: torch.Tensor,
    branch_value: torch.Tensor,
    outputs: tuple[torch.Tensor, ...],
    scale: float,
    softcap: float | None,
    window: int | None,
    gradient: torch.Tensor | None = None,
) -> Callable[[torch.Tensor, torch.Tensor, int, int, int, int], None]:
    """Attention, or with `gradient` its way back, at addresses that are found once; what changes is the prefix.

    Args:
        query, branch_key, branch_value, gradient: as in the public function, for one row, on the CPU, with unit column
            stride; not kept.
        outputs: what is written: the output, or what reaches query, branch_key and branch_value; contiguous as
            [1, T, H, D], not kept.
        scale, softcap, window: as in the public function.

    Returns:
        What takes keys and values [1, Hkv, N, D] and how many tokens of them are the prefix, where `branch_starts` of
        the tokens lie, int64, the first of the tokens and how many there are: others are not looked at, nor written.
    """
    kernel = native().prefix_attention if gradient is None else native().prefix_attention_backward
    code, size = DTYPE_CODES[query.dtype], query.element_size()
    _, query_heads, _, key_width = query.shape
    _, key_heads, _, value_width = branch_value.shape
    options = scale, 0.0 if softcap is None else softcap, _NO_WINDOW if window is None else window
    before = [_view(x) for x in ((query,) if gradient is None else (gradient, query))]
    branches = [_view(x) for x in (branch_key, branch_value)]
    written = [(x.data_ptr(), x.shape[2] * x.shape[3] * size) for x in outputs]

    def run(keys: torch.Tensor, values: torch.Tensor, prefix_tokens: int, starts: int, first: int, tokens: int) -> None:
        def own(view: tuple[int, ...]) -> tuple[int, ...]:
            return view[0] + first * view[3] * size, *view[1:]

        kernel(
            code,
            *map(own, before),
            _view(keys),
            _view(values),
            *map(own, branches),
            starts,
            0,
            0,
            1,
            query_heads,
            key_heads,
            tokens,
            prefix_tokens,
            tokens,
            key_width,
            value_width,
            *options,
            *(address + first * row for address, row in written),
            torch.get_num_threads(),
        )

    return run


def _contiguous(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x.contiguous()


def _view(x: torch.Tensor) -> tuple[int, ...]:
    """`ggro::HeadsView` of x [batch, heads, tokens, width]."""
    return x.data_ptr(), *x.stride()[:3]


def _fields(
    tensors: tuple[torch.Tensor, ...], scale: float, softcap: float | None, window: int | None
) -> tuple[float, ...]:
    """The numbers of the argument structs, `batch` to `window`."""
    query, _, prefix_value, branch_key, _ = tensors
    batch, query_heads, tokens, key_width = query.shape
    _, key_heads, prefix_tokens, value_width = prefix_value.shape
    return (
        batch,
        query_heads,
        key_heads,
        tokens,
        prefix_tokens,
        branch_key.shape[2],
        key_width,
        value_width,
        scale,
        0.0 if softcap is None else softcap,
        _NO_WINDOW if window is None else window,
    )
