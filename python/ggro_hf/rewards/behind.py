"""Attention of segments behind prefixes, and its way back: an op whose prefixes lie in caches of their own.

So a pass can be recorded once for a number of tokens, whatever prefixes, of whatever lengths, its segments have later.
"""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from ggro_hf.attention import window_for_mask
from ggro_hf.cache import RewindableCache

BEHIND_PREFIXES = "ggro_behind_prefixes"
"""The attention implementation; a forward gets `behind=`, the number that `holding` gave."""

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

    def first_key(self, window: int | None) -> int:
        """The first key that a token could see."""
        return 0 if window is None else max(0, self.length - window + 1)

    @property
    def starts(self) -> list[int]:
        """Of every token where its segment starts among them."""
        return [start - self.length for start, end in self.places for _ in range(start, end)]


class Held:
    """What a pass is over: parts one after another, and of every token its position and its segment's start."""

    def __init__(self, parts: Sequence[Behind], positions: Tensor, starts: Tensor) -> None:
        """`positions[T]` and `starts[T]` int64, on the model's first device."""
        first = [0, *accumulate(part.tokens for part in parts)]
        self.parts = [(part, slice(*ends)) for part, ends in zip(parts, itertools.pairwise(first), strict=True)]
        self._positions, self._starts = positions, starts
        self._masks: dict[tuple[int, int | None, torch.device], Tensor] = {}

    def mask(self, number: int, window: int | None, device: torch.device) -> Tensor:
        """[tokens, keys] from the first key on of one of the parts, to be added to scores."""
        key = number, window, device
        if key not in self._masks:
            self._masks[key] = self._mask(*self.parts[number], window, device)
        return self._masks[key]

    def _mask(self, part: Behind, own: slice, window: int | None, device: torch.device) -> Tensor:
        position, start = self._positions[own].to(device)[:, None], self._starts[own].to(device)[:, None]
        token = torch.arange(part.tokens, device=device)
        behind = torch.arange(part.first_key(window), part.length, device=device).expand(part.tokens, -1)
        sees = torch.cat([torch.ones_like(behind, dtype=torch.bool), (token >= start) & (token <= token[:, None])], 1)
        if window is not None:
            sees &= torch.cat([behind, position - token[:, None] + token], 1) > position - window
        return torch.zeros(sees.shape, device=device).masked_fill_(~sees, -torch.inf)


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
    output = query.new_zeros(query.shape[2], query.shape[1], value.shape[3])
    held = _held[number]
    for index, (part, own) in enumerate(held.parts):
        part.cache.rewindable[layer].length = part.length
        part.cache.rewindable[layer].write(key[:, :, own], value[:, :, own])
        mask = held.mask(index, window, query.device)
        _, _, values, weights, _ = _weights(part, query[0, :, own], mask, layer, scale, softcap, window)
        output[own] = _by_head(weights.to(values.dtype) @ values, part.tokens)
    return output[None]


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
    of_query, of_key, of_value = (torch.zeros_like(x) for x in (query, key, value))
    held = _held[number]
    for index, (part, own) in enumerate(held.parts):
        mask = held.mask(index, window, query.device)
        queries, keys, values, weights, capped = _weights(part, query[0, :, own], mask, layer, scale, softcap, window)
        tokens = part.tokens
        of_output = _by_key_head(gradient[0, own].transpose(0, 1), keys.shape[0])
        of_value[0, :, own] = (weights[..., -tokens:].to(values.dtype).mT @ of_output).to(value.dtype)
        of_weights = (of_output @ values.mT).to(weights.dtype)
        of_scores = weights * (of_weights - (of_weights * weights).sum(-1, keepdim=True))
        if softcap is not None:
            of_scores *= 1 - (capped / softcap) ** 2
        of_scores = (of_scores * scale).to(keys.dtype)
        of_query[0, :, own] = _by_head(of_scores @ keys, tokens).transpose(0, 1)
        of_key[0, :, own] = of_scores[..., -tokens:].mT @ queries
    return of_query, of_key, of_value


def _weights(
    part: Behind,
    query: Tensor,
    mask: Tensor,
    layer: int,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Queries [Hkv, group * T, D], keys and values [Hkv, N, D], weights and scores [Hkv, group * T, N]."""
    buffers = part.cache.rewindable[layer]
    visible = slice(part.first_key(window), part.length + part.tokens)
    keys, values = buffers.keys[0, :, visible], buffers.values[0, :, visible]
    queries = _by_key_head(query, keys.shape[0])
    # Softmax in fp32 at least.
    scores = (queries @ keys.mT).to(torch.promote_types(query.dtype, torch.float32)) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    masked = scores.unflatten(1, (-1, part.tokens)) + mask.to(scores)
    return queries, keys, values, masked.softmax(-1).flatten(1, 2), scores


def _by_key_head(x: Tensor, key_heads: int) -> Tensor:
    """[Hkv, group * T, D] of [Hq, T, D]."""
    return x.reshape(key_heads, -1, x.shape[-1])


def _by_head(x: Tensor, tokens: int) -> Tensor:
    """[T, Hq, D] of [Hkv, group * T, D]."""
    return x.reshape(-1, tokens, x.shape[-1]).transpose(0, 1)


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
