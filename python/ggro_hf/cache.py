"""A KV cache that can be rewound: preallocated layers behind the interface of `transformers.Cache`."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache, DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

_GROWTH = 256
# Tokens that a row of a fork has room for at first.
_FORK_ROOM = 32

KeysAndValues = tuple[tuple[torch.Tensor, torch.Tensor], ...]
"""Of consecutive tokens, `[batch, heads, tokens, head_dim]`, one pair a layer."""


@dataclass(frozen=True, slots=True)
class Branch:
    """Consecutive tokens with their keys and values."""

    token_ids: list[int]
    layers: KeysAndValues


class RewindableLayer(DynamicLayer):
    """Keys and values of one layer in a buffer that grows by doubling; rewinding only moves `length`.

    A sliding-window layer keeps every token, so it can be rewound past its window, and shows attention the window
    alone. A pass that needs gradients gets its new keys and values through the graph, the earlier ones as constants.
    """

    # `transformers` types them as optional, being lazy.
    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, capacity: int, sliding_window: int | None = None) -> None:
        super().__init__()
        self.capacity = capacity
        self.sliding_window = sliding_window
        self.is_sliding = sliding_window is not None
        self.length = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = self._allocate(key_states)
        self.values = self._allocate(value_states)
        self.is_initialized = True

    def adopt(self, keys: torch.Tensor, values: torch.Tensor, length: int) -> None:
        """Use the buffers of somebody else, who sees to their room; they hold `length` tokens."""
        self.keys, self.values, self.length = keys, values, length
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        first, end = self._first_visible(), self.length + key_states.shape[-2]
        self.write(key_states.detach(), value_states.detach())
        keys, values = self.keys[:, :, first:end], self.values[:, :, first:end]
        if key_states.requires_grad:
            return _BehindConstants.apply(key_states, keys), _BehindConstants.apply(value_states, values)
        return keys, values

    def write(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Append without attention: what `update` stores, and what a saved branch restores."""
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        end = self.length + keys.shape[-2]
        if end > self.keys.shape[-2]:
            self.grow(end)
        self.keys[:, :, self.length : end] = keys
        self.values[:, :, self.length : end] = values
        self.length = end

    def grow(self, tokens: int) -> None:
        """Make room for that many tokens and at least twice as many as there was."""
        self.capacity = max(tokens, 2 * self.keys.shape[-2])
        self.keys = self._grown(self.keys)
        self.values = self._grown(self.values)

    def move(self, start: int, end: int, target: int) -> None:
        """Put the keys and values of tokens `start .. end` at `target`, which comes before them."""
        for buffer in (self.keys, self.values):
            # The source may overlap the target.
            buffer[:, :, target : target + end - start] = buffer[:, :, start:end].clone()

    def clear(self) -> None:
        """Forget all tokens, and whatever might be NaN in the buffers."""
        self.length = 0
        if self.is_initialized:
            self.keys.zero_()
            self.values.zero_()

    def read(self, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Copy the keys and values of tokens `start .. end`."""
        return self.keys[:, :, start:end].clone(), self.values[:, :, start:end].clone()

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        first = self._first_visible()
        return self.length - first + query_length, first

    def crop(self, tokens_to_remove: int) -> None:
        self.length -= abs(tokens_to_remove)

    def reset(self) -> None:
        self.length = 0

    def _first_visible(self) -> int:
        return 0 if self.sliding_window is None else max(0, self.length - self.sliding_window + 1)

    def _allocate(self, like: torch.Tensor) -> torch.Tensor:
        batch, heads, tokens, width = like.shape
        rows = -(-max(self.capacity, tokens) // _GROWTH) * _GROWTH
        # A mask multiplies what it hides by zero, which must not be NaN: see StaticLayer.
        return torch.zeros((batch, heads, rows, width), dtype=like.dtype, device=like.device)

    def _grown(self, buffer: torch.Tensor) -> torch.Tensor:
        grown = self._allocate(buffer)
        grown[:, :, : self.length] = buffer[:, :, : self.length]
        return grown


class _BehindConstants(torch.autograd.Function):
    """A buffer that ends with new tokens, of which only these have a gradient: `cat` without copying the others.

    The buffer must stay as it is until the backward pass, which autograd checks.
    """

    @staticmethod
    def forward(ctx: Any, new: torch.Tensor, buffer: torch.Tensor) -> torch.Tensor:
        ctx.tokens = new.shape[-2]
        return buffer

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient[..., -ctx.tokens :, :], None


class StaticLayer(DynamicLayer):
    """The buffers of a `RewindableLayer` for one more token, whose row is on the device.

    No address and no shape depends on the number of tokens, so a CUDA graph can hold the pass: attention gets the
    buffers whole, and its mask ends at the token's row. The token is written to that row and to the last one, where
    `prefix_attention` looks for it.
    """

    def __init__(self, layer: RewindableLayer, rows: torch.Tensor, *, masked: bool) -> None:
        """`rows[2]` int64 are the token's row and the last one; `masked` tells transformers to build a mask."""
        super().__init__()
        self.keys, self.values = layer.keys, layer.values
        self.dtype, self.device = layer.dtype, layer.device
        self.is_initialized = True
        self.is_sliding = layer.is_sliding
        self.is_compileable = masked
        self._rows = rows

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.keys is not None and self.values is not None
        self.keys.index_copy_(2, self._rows, key_states.expand(-1, -1, 2, -1))
        self.values.index_copy_(2, self._rows, value_states.expand(-1, -1, 2, -1))
        return self.keys, self.values

    # As of transformers' own static layers: the mask takes it as the offset of the query.
    def get_seq_length(self) -> torch.Tensor:  # type: ignore[override]
        return self._rows[0]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        assert self.keys is not None
        return self.keys.shape[-2], 0


class RewindableCache(Cache):
    """A cache whose last tokens can be dropped, set aside and put back at the cost of those tokens alone.

    Raises ValueError where a layer of the model keeps a state that cannot be rewound (linear attention, state space,
    ...).
    """

    def __init__(self, config: PretrainedConfig, capacity: int = 0) -> None:
        self._rewindable = [_rewindable(layer, capacity, config) for layer in DynamicCache(config=config).layers]
        super().__init__(layers=list(self._rewindable))

    @property
    def rewindable(self) -> list[RewindableLayer]:
        """The layers."""
        return self._rewindable

    def rewind(self, length: int) -> None:
        """Keep the first `length` tokens."""
        for layer in self._rewindable:
            layer.length = length

    def keep_branch(self, length: int, start: int, end: int) -> None:
        """Keep the first `length` tokens and, as their continuation, those from `start` to `end`.

        Commits one of the branches that a forward with `pack_branches` put behind a prefix of `length` tokens; only the
        branch is copied.
        """
        if start != length:
            for layer in self._rewindable:
                layer.move(start, end, length)
        self.rewind(length + end - start)

    def clear(self) -> None:
        """Forget all tokens; the buffers stay where they are."""
        for layer in self._rewindable:
            layer.clear()

    @property
    def windows(self) -> set[int | None]:
        """The sliding windows that layers have; None stands for layers without one."""
        return {layer.sliding_window for layer in self._rewindable}

    @property
    def rows(self) -> int:
        """Tokens that the buffers have room for; 0 before the first pass."""
        layer = self._rewindable[0]
        return layer.keys.shape[-2] if layer.is_initialized else 0

    def grow(self) -> None:
        """Double the room; the buffers move."""
        for layer in self._rewindable:
            layer.grow(0)

    def fork(self, rows: int) -> "ForkedCache":
        """A cache of that many rows which all continue this one; it must stay as it is meanwhile."""
        return ForkedCache(self._rewindable, rows)

    def static(self, rows: torch.Tensor, *, masked: bool) -> Cache:
        """The same buffers for a forward of one token: see `StaticLayer`. Outdated once they have grown."""
        return Cache(layers=[StaticLayer(layer, rows, masked=masked) for layer in self._rewindable])

    def read(self, start: int, end: int) -> KeysAndValues:
        """Copy the keys and values of tokens `start .. end`."""
        return tuple(layer.read(start, end) for layer in self._rewindable)

    def write(self, layers: KeysAndValues) -> None:
        """Append keys and values that were computed after the same prefix."""
        for layer, (keys, values) in zip(self._rewindable, layers, strict=True):
            layer.write(keys, values)

    def save(self, token_ids: list[int]) -> Branch:
        """Copy the keys and values of the last tokens, which are `token_ids`."""
        length = self._rewindable[0].length
        return Branch(token_ids, self.read(length - len(token_ids), length))

    def restore(self, branch: Branch) -> None:
        """Append a branch again; it must have been saved after the same prefix."""
        self.write(branch.layers)


class ForkedLayer(DynamicLayer):
    """What each of several rows adds to one prefix, whose keys and values are not copied.

    Attention gets the rows' own keys and values, with `joined` those of prefix and row together: copied for every row
    in every pass, but fit for any attention.
    """

    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, prefix: RewindableLayer, rows: int) -> None:
        super().__init__()
        self.prefix = prefix
        self.joined = False
        self.is_sliding = prefix.is_sliding
        self.dtype, self.device = prefix.dtype, prefix.device
        self.is_initialized = True
        self.length = 0
        shapes = [(rows, buffer.shape[1], _FORK_ROOM, buffer.shape[3]) for buffer in (prefix.keys, prefix.values)]
        self.keys, self.values = (torch.empty(shape, dtype=self.dtype, device=self.device) for shape in shapes)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        end = self.length + key_states.shape[-2]
        if end > self.keys.shape[-2]:
            every = torch.arange(len(self.keys), device=self.device)
            self.keys, self.values = (self._selected(buffer, every, 2 * end) for buffer in (self.keys, self.values))
        self.keys[:, :, self.length : end] = key_states
        self.values[:, :, self.length : end] = value_states
        first = self._first_visible()
        self.length = end
        if not self.joined:
            return self.keys[:, :, :end], self.values[:, :, :end]
        return self._joined(self.prefix.keys, self.keys, first), self._joined(self.prefix.values, self.values, first)

    def get_seq_length(self) -> int:
        return self.prefix.length + self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        first = self._first_visible()
        return self.get_seq_length() - first + query_length, first

    def select(self, rows: torch.Tensor) -> None:
        """Make `rows` the rows; a row may be repeated."""
        room = self.keys.shape[-2]
        # Layers of one model may be on several devices.
        rows = rows.to(self.device)
        self.keys, self.values = (self._selected(buffer, rows, room) for buffer in (self.keys, self.values))

    def _selected(self, buffer: torch.Tensor, rows: torch.Tensor, room: int) -> torch.Tensor:
        selected = buffer.new_empty((len(rows), buffer.shape[1], room, buffer.shape[3]))
        selected[:, :, : self.length] = buffer[rows, :, : self.length]
        return selected

    def _first_visible(self) -> int:
        window = self.prefix.sliding_window
        return 0 if window is None else max(0, self.get_seq_length() - window + 1)

    def _joined(self, prefix: torch.Tensor, own: torch.Tensor, first: int) -> torch.Tensor:
        before = prefix[:, :, min(first, self.prefix.length) : self.prefix.length]
        after = own[:, :, max(0, first - self.prefix.length) : self.length]
        return torch.cat([before.expand(len(own), -1, -1, -1), after], dim=2)


class ForkedCache(Cache):
    """Rows of equal length that continue one prefix."""

    def __init__(self, prefix: list[RewindableLayer], rows: int) -> None:
        self._forked = [ForkedLayer(layer, rows) for layer in prefix]
        super().__init__(layers=list(self._forked))

    @property
    def shared_prefix(self) -> list[RewindableLayer]:
        """What comes before the rows' own keys and values, for every layer."""
        return [layer.prefix for layer in self._forked]

    def join(self) -> None:
        """Hand attention the keys and values of prefix and rows together from now on."""
        for layer in self._forked:
            layer.joined = True

    def select(self, rows: torch.Tensor) -> None:
        """Make `rows` the rows; a row may be repeated."""
        for layer in self._forked:
            layer.select(rows)

    def read(self, row: int) -> KeysAndValues:
        """Copy what a row has added to the prefix."""
        return tuple(
            (
                layer.keys[row : row + 1, :, : layer.length].clone(),
                layer.values[row : row + 1, :, : layer.length].clone(),
            )
            for layer in self._forked
        )


def _rewindable(layer: object, capacity: int, config: PretrainedConfig) -> RewindableLayer:
    if type(layer) is DynamicLayer:
        return RewindableLayer(capacity)
    if type(layer) is DynamicSlidingWindowLayer and "chunked_attention" not in (_layer_types(config) or ()):
        return RewindableLayer(capacity, sliding_window=layer.sliding_window)
    raise ValueError(
        f"model of type {config.model_type!r} has a cache layer {type(layer).__name__} whose state cannot be rewound; "
        "use a model with full or sliding-window attention only"
    )


def _layer_types(config: PretrainedConfig) -> list[str] | None:
    return getattr(config.get_text_config(decoder=True), "layer_types", None)


def common_prefix_length(first: list[int], second: list[int]) -> int:
    """Number of leading tokens that two sequences share."""
    for index, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return index
    return min(len(first), len(second))
