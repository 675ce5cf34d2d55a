"""Keys and values of several sequences at once: for each a lane with a prefix, and rows that continue it."""

from typing import NamedTuple

import torch
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from ggro_hf.cache import KeysAndValues, RewindableCache
from ggro_hf.decode_step import forward

# Tokens that a row has room for at first, and that prefixes have room for more than asked.
_ROOM, _STEP = 16, 64


class LaneLayer(NamedTuple):
    """The buffers of one layer.

    `prefix_keys` and `prefix_values` are `[lanes, heads, capacity, head_dim]`; `keys` and `values`, those of the rows
    one after another and of one column that is nobody's, `[lanes, columns, heads, head_dim]`.
    """

    prefix_keys: torch.Tensor
    prefix_values: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor


class StepLayer(DynamicLayer):
    """What the attention of the first lanes sees in a step: the rows' buffers, with the new tokens written to them."""

    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, buffers: LaneLayer, lanes: int, columns: torch.Tensor) -> None:
        """`columns[T]` int64 number the new tokens' columns, those of all lanes in a row."""
        super().__init__()
        self.prefix_keys, self.prefix_values = buffers.prefix_keys[:lanes], buffers.prefix_values[:lanes]
        self.keys, self.values = buffers.keys[:lanes], buffers.values[:lanes]
        self.dtype, self.device = buffers.keys.dtype, buffers.keys.device
        self.is_initialized = True
        self._columns = columns.to(self.device)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self._written(self.keys, key_states), self._written(self.values, value_states)

    def get_seq_length(self) -> int:
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def _written(self, buffer: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        buffer.flatten(0, 1).index_copy_(0, self._columns, states.transpose(1, 2).flatten(0, 1))
        return buffer.transpose(1, 2)


class LaneCache:
    """The buffers of all layers, which grow when they must."""

    # All in inference mode, whose tensors can be written to nowhere else.
    @torch.inference_mode()
    def __init__(self, model: PreTrainedModel, lanes: int, capacity: int, rows: int) -> None:
        """Room for that many lanes, with prefixes of `capacity` tokens and `rows` rows each.

        Raises ValueError where a layer's state cannot be rewound.
        """
        self.lanes, self.rows, self.room = lanes, rows, _ROOM
        self.capacity = -(-capacity // _STEP) * _STEP
        self._config = model.config
        probe = RewindableCache(model.config)
        forward(model, probe, [0])
        self._like = [(keys[:, :, :1], values[:, :, :1]) for keys, values in probe.read(0, 1)]
        self.layers = [self._allocated(keys, values) for keys, values in self._like]

    @property
    def columns(self) -> int:
        """Columns of a lane's rows; the last is nobody's."""
        return self.rows * self.room + 1

    def step(self, lanes: int, columns: torch.Tensor) -> Cache:
        """What a forward pass over the first lanes takes: see `StepLayer`."""
        return Cache(layers=[StepLayer(buffers, lanes, columns) for buffers in self.layers])

    def prefix(self, lane: int, length: int) -> RewindableCache:
        """The prefix of a lane as a cache of its own; what it appends is in the lane."""
        cache = RewindableCache(self._config)
        for layer, buffers in zip(cache.rewindable, self.layers, strict=True):
            layer.adopt(buffers.prefix_keys[lane : lane + 1], buffers.prefix_values[lane : lane + 1], length)
        return cache

    @torch.inference_mode()
    def read(self, lane: int, start: int, end: int) -> KeysAndValues:
        """Copy columns of a lane."""
        return tuple(
            (
                buffers.keys[lane, start:end].transpose(0, 1)[None].clone(),
                buffers.values[lane, start:end].transpose(0, 1)[None].clone(),
            )
            for buffers in self.layers
        )

    @torch.inference_mode()
    def write(self, lane: int, length: int, layers: KeysAndValues) -> None:
        """Put keys and values behind the first tokens of a lane's prefix."""
        for buffers, (keys, values) in zip(self.layers, layers, strict=True):
            end = length + keys.shape[2]
            buffers.prefix_keys[lane, :, length:end] = keys[0]
            buffers.prefix_values[lane, :, length:end] = values[0]

    @torch.inference_mode()
    def keep(self, lane: int, length: int, start: int, end: int) -> None:
        """Copy columns of a lane behind the first tokens of its prefix."""
        for buffers in self.layers:
            target = slice(length, length + end - start)
            buffers.prefix_keys[lane, :, target] = buffers.keys[lane, start:end].transpose(0, 1)
            buffers.prefix_values[lane, :, target] = buffers.values[lane, start:end].transpose(0, 1)

    @torch.inference_mode()
    def move(self, source: int, target: int) -> None:
        """Copy a lane to another place."""
        for buffers in self.layers:
            for buffer in buffers:
                buffer[target] = buffer[source]

    def widen(self) -> None:
        """Double the room of every row."""
        self.room *= 2
        self._fit()

    def resize(self, lanes: int, capacity: int) -> None:
        """Another number of lanes, of which the first stay, with room for at least that many tokens in a prefix.

        Where memory runs out, some layers are as wanted and others as they were, until a call like this one succeeds.
        """
        self.lanes, self.capacity = lanes, -(-capacity // _STEP) * _STEP
        self._fit()

    @torch.inference_mode()
    def _fit(self) -> None:
        """Copy what the layers hold to buffers of the sizes now wanted."""
        for index, old in enumerate(self.layers):
            # One layer after the other: memory may be short.
            new = self._allocated(*self._like[index])
            lanes = min(self.lanes, len(old.keys))
            tokens = min(self.capacity, old.prefix_keys.shape[2])
            room = (old.keys.shape[1] - 1) // self.rows
            for target, source in ((new.prefix_keys, old.prefix_keys), (new.prefix_values, old.prefix_values)):
                target[:lanes, :, :tokens] = source[:lanes, :, :tokens]
            for target, source in ((new.keys, old.keys), (new.values, old.values)):
                by_row = target[:lanes, :-1].unflatten(1, (self.rows, self.room))
                by_row[:, :, :room] = source[:lanes, :-1].unflatten(1, (self.rows, room))
            self.layers[index] = new

    def _allocated(self, keys: torch.Tensor, values: torch.Tensor) -> LaneLayer:
        def zeros(like: torch.Tensor, *shape: int) -> torch.Tensor:
            # What nobody sees must not be NaN where a mask multiplies it by zero.
            return torch.zeros(shape, dtype=like.dtype, device=like.device)

        return LaneLayer(
            *(zeros(like, self.lanes, like.shape[1], self.capacity, like.shape[3]) for like in (keys, values)),
            *(zeros(like, self.lanes, self.columns, like.shape[1], like.shape[3]) for like in (keys, values)),
        )
