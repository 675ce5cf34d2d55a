"""Attention of segments behind prefixes, and its way back: an op whose prefixes lie in caches of their own.

So a pass can be recorded once for a number of tokens, whatever prefixes, of whatever lengths, its segments have later.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from ggro_hf.attention import window_for_mask
from ggro_hf.cache import RewindableCache, RewindableLayer
from ggro_kernels.library import automatic
from ggro_kernels.native import call_observed, is_observed
from ggro_kernels.prefix_attention.native import prepared
from ggro_kernels.prefix_attention.ops import prefix_attention_backward_op, prefix_attention_op

BEHIND_PREFIXES = "ggro_behind_prefixes"
"""The attention implementation; a forward gets `behind=`, the number that `holding` gave."""

_CPU = torch.device("cpu")
_UNSUPPORTED = ("position_bias", "s_aux", "cache", "cu_seq_lens_q")


@dataclass(eq=False, slots=True)
class Behind:
    """Segments, token ids, of which each continues the first `length` tokens of a cache."""

    cache: RewindableCache
    length: int
    segments: Sequence[list[int]]

    @property
    def tokens(self) -> int:
        """Of all segments."""
        return sum(map(len, self.segments))

    @property
    def positions(self) -> list[int]:
        """Of every token."""
        return [self.length + index for segment in self.segments for index in range(len(segment))]

    @property
    def places(self) -> list[tuple[int, int]]:
        """Where the cache has each segment after the pass."""
        ends = list(accumulate((len(segment) for segment in self.segments), initial=self.length))
        return list(itertools.pairwise(ends))

    @property
    def starts(self) -> list[int]:
        """Of every token where its segment starts among them."""
        return [start - self.length for start, end in self.places for _ in range(start, end)]


class Held:
    """What a pass is over: parts one after another, and of every token the start of its segment in its part."""

    def __init__(self, parts: Sequence[Behind], starts: Tensor) -> None:
        """`starts[T]` int64."""
        ends = list(accumulate((part.tokens for part in parts), initial=0))
        self.parts = [(part, slice(*own)) for part, own in zip(parts, itertools.pairwise(ends), strict=True)]
        self.tokens = ends[-1]
        self._starts = {starts.device: starts}

    def starts(self, device: torch.device) -> Tensor:
        """[T], on a layer's device."""
        if device not in self._starts:
            self._starts[device] = next(iter(self._starts.values())).to(device)
        return self._starts[device]


_held: dict[int, Held] = {}
_numbers = itertools.count()


@contextmanager
def holding(number: int, held: Held) -> Iterator[None]:
    """Let attention know what a pass is over."""
    _held[number] = held
    try:
        yield
    finally:
        del _held[number]


def new_number() -> int:
    """A number for `holding`, which a recorded pass keeps."""
    return next(_numbers)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    number: int,
    layer: int,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> Tensor:
    """[1, T, Hq, D] for query [1, Hq, T, D] and new keys and values [1, Hkv, T, D], which join their caches."""
    output = query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])
    if _can_be_prepared(query, key, value):
        attend = prepared(query, key, value, (output,), scale, softcap, window)
        call_observed(partial(_replay, attend, number, layer, (output,), (key, value)))
        return output
    held = _held[number]
    output[:, held.tokens :] = 0
    for part, own in held.parts:
        buffers = _joined(part, layer, key[:, :, own], value[:, :, own])
        inputs = _inputs(query, key, value, part, own, buffers, held)
        attended = prefix_attention_op(*inputs, None, None, scale, softcap, window, "auto")
        output[:, own] = attended.transpose(1, 2)
    return output


def _attend_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    number: int,
    layer: int,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value; what is in the prefixes is constant."""
    outputs = tuple(x.new_empty(x.transpose(1, 2).shape) for x in (query, key, value))
    of_query, of_key, of_value = (x.transpose(1, 2) for x in outputs)
    if _can_be_prepared(gradient, query, key, value):
        attend = prepared(query, key, value, outputs, scale, softcap, window, gradient.transpose(1, 2))
        call_observed(partial(_replay, attend, number, layer, outputs))
        return of_query, of_key, of_value
    held = _held[number]
    for output in outputs:
        output[:, held.tokens :] = 0
    for part, own in held.parts:
        inputs = _inputs(query, key, value, part, own, part.cache.rewindable[layer], held)
        of_output = gradient[:, own].transpose(1, 2)
        gradients = prefix_attention_backward_op(of_output, *inputs, None, None, scale, softcap, window, "auto")
        for whole, of_part in zip((of_query, of_key, of_value), gradients, strict=True):
            whole[:, :, own] = of_part
    return of_query, of_key, of_value


def _can_be_prepared(*tensors: Tensor) -> bool:
    """Whether a recording can have the kernels themselves: torch's calls of them take longer than they do."""
    first = tensors[0]
    return (
        is_observed()
        and automatic("prefix_attention", first.device, first.dtype) == "native"
        and all(x.stride(-1) == 1 for x in tensors)
    )


def _replay(
    attend: Callable[..., None],
    number: int,
    layer: int,
    outputs: tuple[Tensor, ...],
    joining: tuple[Tensor, Tensor] | None = None,
) -> None:
    """What a recording runs: `attend` over all parts; new keys and values that are joining go to their caches."""
    held = _held[number]
    starts = held.starts(_CPU)
    address = starts.data_ptr()
    if held.tokens < len(starts):
        for output in outputs:
            output[:, held.tokens :] = 0
    for part, own in held.parts:
        buffers = part.cache.rewindable[layer]
        if joining is not None:
            _joined(part, layer, *(x[:, :, own] for x in joining))
        first, tokens = own.start, own.stop - own.start
        attend(buffers.keys, buffers.values, part.length, address + first * starts.itemsize, first, tokens)


def _joined(part: Behind, layer: int, keys: Tensor, values: Tensor) -> RewindableLayer:
    buffers = part.cache.rewindable[layer]
    buffers.length = part.length
    buffers.write(keys, values)
    return buffers


def _inputs(
    query: Tensor, key: Tensor, value: Tensor, part: Behind, own: slice, buffers: RewindableLayer, held: Held
) -> tuple[Tensor, ...]:
    """What `prefix_attention` takes of a part, up to `branch_starts`."""
    prefix = (x[:, :, : part.length] for x in (buffers.keys, buffers.values))
    return query[:, :, own], *prefix, key[:, :, own], value[:, :, own], held.starts(query.device)[None, own]


_library = torch.library.Library("ggro_hf", "DEF")
_OPTIONS = "int number, int layer, float scale, float? softcap, int? window"
_library.define(f"attend_behind(Tensor query, Tensor key, Tensor value, {_OPTIONS}) -> Tensor")
_library.define(
    f"attend_behind_backward(Tensor gradient, Tensor query, Tensor key, Tensor value, {_OPTIONS}) "
    "-> (Tensor, Tensor, Tensor)"
)
_library.impl("attend_behind", _attend, "CompositeExplicitAutograd")
_library.impl("attend_behind_backward", _attend_backward, "CompositeExplicitAutograd")
for _name in ("attend_behind", "attend_behind_backward"):
    _library.impl(_name, torch.library.fallthrough_kernel, "Autograd")


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, *options: Any) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.options = options
        # An op is what a recording can hold; elsewhere it would only hide the caches from the dispatcher.
        attend = torch.ops.ggro_hf.attend_behind if query.device.type == "cpu" else _attend
        return cast(Tensor, attend(query, key, value, *options))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        on_cpu = gradient.device.type == "cpu"
        backward = torch.ops.ggro_hf.attend_behind_backward if on_cpu else _attend_backward
        gradients = backward(gradient, *ctx.saved_tensors, *ctx.options)
        return *gradients, *(None for _ in ctx.options)


def _forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: int | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    behind: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    for name in _UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise ValueError(f"attention behind prefixes does not go with {name}")
    window = sliding_window if attention_mask is None else attention_mask
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return _Attend.apply(query, key, value, behind, cast(int, module.layer_idx), scale, softcap, window), None


AttentionInterface.register(BEHIND_PREFIXES, _forward)
AttentionMaskInterface.register(BEHIND_PREFIXES, window_for_mask)
