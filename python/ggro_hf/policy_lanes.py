"""The policy's side of several responses: one forward pass lets rows of all of them grow by a token."""

import logging
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from ggro_hf.attention import PREFIX_ATTENTION, attending
from ggro_hf.cache import Branch, RewindableCache, common_prefix_length
from ggro_hf.decode_step import forward
from ggro_hf.graphs import CAPTURES, Captured, captured_size
from ggro_hf.lanes import LaneCache
from ggro_hf.models import device_of, disagreement, embedding_rows
from ggro_hf.policy_lane import PolicyLane
from ggro_hf.reading import Position, TopK, likeliest
from ggro_hf.results import Counters
from ggro_hf.step_pool import check_capturable, fingerprint_of
from ggro_hf.transfer import to_device, to_host, wait_for

# Steps that are kept captured: each holds logits of its own.
_MOST_STEPS = 16

# Single lanes that are kept for a model's next responses, if these differ in what they read or in their rows.
_MOST_IDLE = 2

_logger = logging.getLogger(__name__)


class Lane(PolicyLane):
    """A sequence of the policy, and rows that continue it (see `PolicyLane`).

    Of the columns that a row has in the cache, it uses those from the first of its span up to the second.
    """

    def __init__(self, lanes: "PolicyLanes", index: int, counters: Counters) -> None:
        self.index = index
        self.counters = counters
        self._lanes = lanes
        self._token_ids: list[int] = []
        self._added: list[list[int]] = []
        self._spans: list[tuple[int, int]] = []
        self._clear_all()

    @property
    def rows(self) -> int:
        return self._lanes.cache.rows

    @property
    def token_ids(self) -> list[int]:
        return self._token_ids

    def clear(self, row: int) -> None:
        self._spans[row], self._added[row] = (0, 0), []

    def commit(self, row: int, tokens: int) -> None:
        added, (start, end) = self._added[row], self._spans[row]
        first = row * self._lanes.cache.room + start
        self._lanes.make_room(len(self._token_ids) + tokens)
        self._lanes.cache.keep(self.index, len(self._token_ids), first, first + tokens)
        self._token_ids = self._token_ids + added[:tokens]
        self._clear_all()
        self._spans[row], self._added[row] = (start + tokens, end), added[tokens:]

    def save(self, row: int) -> Branch:
        first, (start, end) = row * self._lanes.cache.room, self._spans[row]
        return Branch(self._added[row], self._lanes.cache.read(self.index, first + start, first + end))

    def append(self, branch: Branch) -> None:
        self._lanes.make_room(len(self._token_ids) + len(branch.token_ids))
        self._lanes.cache.write(self.index, len(self._token_ids), branch.layers)
        self._token_ids = self._token_ids + branch.token_ids
        self._clear_all()

    @torch.inference_mode()
    def move_to(self, token_ids: list[int]) -> Position:
        kept = min(common_prefix_length(self._token_ids, token_ids), len(token_ids) - 1)
        self._lanes.make_room(len(token_ids))
        logits = forward(self._lanes.model, self._lanes.cache.prefix(self.index, kept), token_ids[kept:])
        self.counters.policy_tokens += len(token_ids) - kept
        self._token_ids = list(token_ids)
        self._clear_all()
        reader = self._lanes.reader
        return reader.on_host(*to_host(*reader.on_device(logits)))

    @property
    def longest_row(self) -> int:
        """Columns that the rows use at most."""
        return max(end for _, end in self._spans)

    @property
    def model(self) -> PreTrainedModel:
        """The policy."""
        return self._lanes.model

    def step(self, tokens: Mapping[int, int]) -> list[Position | FloatingPointError]:
        """`PolicyLanes.step` of this lane alone."""
        return self._lanes.step([(self, tokens)])[0]

    def place(self, row: int) -> tuple[int, int, int]:
        """Position of the row's next token, the first column that it sees, and its own."""
        start, end = self._spans[row]
        first = row * self._lanes.cache.room
        return len(self._token_ids) + end - start, first + start, first + end

    def grow(self, row: int, token: int) -> None:
        """Give the row the token whose keys and values are now at `place`."""
        start, end = self._spans[row]
        self._spans[row] = (start, end + 1)
        self._added[row] = [*self._added[row], token]

    def _clear_all(self) -> None:
        self._spans = [(0, 0)] * self.rows
        self._added = [[]] * self.rows


class PolicyLanes:
    """Lanes of one causal language model. Those in use are the first ones of the cache."""

    def __init__(self, model: PreTrainedModel, reader: TopK, lanes: int, capacity: int, rows: int) -> None:
        self._model = weakref.ref(model)
        self.reader = reader
        self.cache = LaneCache(model, lanes, capacity, rows)
        self.lanes: list[Lane] = []
        self._steps: OrderedDict[tuple[int, int], LaneStep] = OrderedDict()

    @property
    def model(self) -> PreTrainedModel:
        """The model, which whoever uses the lanes keeps."""
        model = self._model()
        assert model is not None
        return model

    def open(self, prompt_ids: list[int], counters: Counters) -> tuple[Lane, Position]:
        """Take a lane for a prompt; return it with the position after the prompt."""
        lane = Lane(self, len(self.lanes), counters)
        self.lanes.append(lane)
        try:
            return lane, lane.move_to(prompt_ids)
        except BaseException:
            self.lanes.pop()
            raise

    def close(self, lane: Lane) -> None:
        """Give a lane back."""
        last = self.lanes.pop()
        if last is not lane:
            self.cache.move(last.index, lane.index)
            last.index = lane.index
            self.lanes[last.index] = last

    def make_room(self, tokens: int) -> None:
        """Let prefixes have that many tokens."""
        if tokens > self.cache.capacity:
            self.resize(self.cache.lanes, 2 * tokens)

    def resize(self, lanes: int, capacity: int) -> None:
        """Another number of lanes, at least those in use, with room for at least that many tokens in a prefix."""
        self._steps.clear()
        self.cache.resize(lanes, max([capacity, *(len(lane.token_ids) for lane in self.lanes)]))

    @torch.inference_mode()
    def step(self, works: Sequence[tuple[Lane, Mapping[int, int]]]) -> list[list[Position | FloatingPointError]]:
        """Let rows of lanes grow by a token each; return the positions after them, in order, or why there are none."""
        if any(lane.longest_row == self.cache.room for lane, _ in works):
            self._steps.clear()
            self.cache.widen()
        width = captured_size(max(len(tokens) for _, tokens in works))
        nobodys = (0, 0, self.cache.columns - 1, self.cache.columns - 1)
        places = [[nobodys] * width for _ in self.lanes]
        for lane, tokens in works:
            places[lane.index][: len(tokens)] = [(token, *lane.place(row)) for row, token in tokens.items()]
        tensors = self._run(places, [len(lane.token_ids) for lane in self.lanes])
        # Only now, so that a step that runs out of memory can be repeated.
        for lane, tokens in works:
            lane.counters.policy_tokens += len(tokens)
            for row, token in tokens.items():
                lane.grow(row, token)
        rows = list(zip(*(tensor.unbind() for tensor in tensors), strict=True))
        return [
            [self._read(row) for row in rows[lane.index * width : lane.index * width + len(tokens)]]
            for lane, tokens in works
        ]

    def _read(self, row: tuple[torch.Tensor, ...]) -> Position | FloatingPointError:
        try:
            return self.reader.on_host(*row)
        except FloatingPointError as error:
            return error

    def _run(self, places: list[list[tuple[int, int, int, int]]], lengths: list[int]) -> list[torch.Tensor]:
        """What the reader makes of the logits `[R, V]` after the tokens of all lanes, on the host."""
        shape = len(places), len(places[0])
        if shape not in self._steps:
            # Before another is made, so that there are never more.
            while len(self._steps) >= _MOST_STEPS:
                self._steps.popitem(last=False)
            self._steps[shape] = LaneStep(self.model, self.cache, self.reader, *shape)
        self._steps.move_to_end(shape)
        return to_host(*self._steps[shape].run(places, lengths))


class LaneStep:
    """The forward pass over a number of tokens in each of the first lanes, at fixed addresses."""

    def __init__(self, model: PreTrainedModel, cache: LaneCache, reader: TopK, lanes: int, tokens: int) -> None:
        self._model = weakref.ref(model)
        self._reader = reader
        self._inputs = torch.zeros((5 * tokens + 1) * lanes, dtype=torch.int64, device=device_of(model))
        *grids, self._lengths = self._inputs.split([lanes * tokens] * 5 + [lanes])
        self._token_ids, self._positions, self._starts, self._ends = (grid.view(lanes, tokens) for grid in grids[:4])
        self._cache = cache.step(lanes, grids[4])
        self._columns = cache.columns
        self._tried = False
        self._captured: Captured[tuple[torch.Tensor, ...]] | None = None

    def run(self, places: list[list[tuple[int, int, int, int]]], lengths: list[int]) -> tuple[torch.Tensor, ...]:
        """What the reader makes of the logits `[R, V]`, on the device, until the next run."""
        grids = [[place[index] for own in places for place in own] for index in range(4)]
        columns = [lane * self._columns + end for lane, own in enumerate(places) for *_, end in own]
        flat = [number for grid in (*grids, columns, lengths) for number in grid]
        self._inputs.copy_(to_device([flat], None)[0], non_blocking=True)
        # At once, so that a response does not depend on how often the step ran before.
        if not self._tried:
            self._captured = _capture(self._model(), self._forward)
            self._tried = True
        return self._forward() if self._captured is None else self._replay(self._captured)

    def _replay(self, captured: Captured[tuple[torch.Tensor, ...]]) -> tuple[torch.Tensor, ...]:
        captured.replay()
        return captured.outputs

    @torch.inference_mode()
    def _forward(self) -> tuple[torch.Tensor, ...]:
        model: Any = self._model()
        with attending(model, PREFIX_ATTENTION):
            output = model(
                input_ids=self._token_ids,
                position_ids=self._positions,
                past_key_values=self._cache,
                use_cache=True,
                branch_starts=self._starts,
                branch_ends=self._ends,
                prefix_lengths=self._lengths,
                lanes=self._cache.layers,
            )
        return self._reader.rows_on_device(output.logits.flatten(0, 1))


def _capture(
    model: PreTrainedModel | None, function: Callable[[], tuple[torch.Tensor, ...]]
) -> Captured[tuple[torch.Tensor, ...]] | None:
    """The function captured, None where it cannot be."""
    assert model is not None
    device = device_of(model)
    if device.type not in CAPTURES:
        return None
    try:
        check_capturable(model)
        return CAPTURES[device.type](function, device)  # type: ignore[return-value]
    # Whatever it is, the ordinary pass can do without.
    except Exception as error:
        _logger.info("%s steps by ordinary passes: %s", type(model).__name__, str(error).partition("\n")[0])
        return None


_Kept = OrderedDict[tuple[Hashable, TopK, int], PolicyLanes]
_idle: weakref.WeakKeyDictionary[PreTrainedModel, _Kept] = weakref.WeakKeyDictionary()


@contextmanager
def lent_lane(model: PreTrainedModel, reader: TopK, capacity: int, rows: int) -> Iterator[PolicyLanes]:
    """A single lane with room for that many tokens and rows; it is kept for the model's next such response."""
    key = fingerprint_of(model), reader, rows
    # At once, so that no other thread takes the same.
    lanes = _idle.setdefault(model, OrderedDict()).pop(key, None) or PolicyLanes(model, reader, 1, capacity, rows)
    lanes.lanes.clear()
    lanes.make_room(capacity)
    yield lanes
    wait_for(device_of(model))
    kept = _idle.setdefault(model, OrderedDict())
    kept[key] = lanes
    while len(kept) > _MOST_IDLE:
        kept.popitem(last=False)


_takes_lanes: weakref.WeakKeyDictionary[PreTrainedModel, bool] = weakref.WeakKeyDictionary()


def takes_lanes(model: PreTrainedModel) -> bool:
    """Whether a model can decode in lanes; tried once a model on a few tokens."""
    if model not in _takes_lanes:
        _takes_lanes[model] = _try_lanes(model)
    return _takes_lanes[model]


@torch.inference_mode()
def _try_lanes(model: PreTrainedModel) -> bool:
    vocabulary = embedding_rows(model)
    reader = TopK(min(5, vocabulary))
    prompts = [[(7 * token + 1) % vocabulary for token in range(length)] for length in (5, 3)]
    # Of either lane the first row gets three tokens, the second two. The second step repeats what was captured with the
    # first one's tokens, so that values that are taken for constants show.
    steps = [[{0: 3, 1: 5}, {0: 4, 1: 6}], [{0: 9, 1: 10}, {0: 11, 1: 12}], [{0: 7}, {0: 8}]]

    def alone() -> torch.Tensor:
        sequences = [
            prompt + [step[number][row] % vocabulary for step in steps[: 3 - row]]
            for number, prompt in enumerate(prompts)
            for row in (0, 1)
        ]
        logits = [forward(model, RewindableCache(model.config), sequence) for sequence in sequences]
        return likeliest(torch.stack(logits), reader.k).values.cpu()

    def in_lanes() -> torch.Tensor:
        lanes = PolicyLanes(model, reader, len(prompts), max(map(len, prompts)), 2)
        own = [lanes.open(prompt, Counters())[0] for prompt in prompts]
        found: dict[tuple[int, int], list[float]] = {}
        for step in steps:
            tokens = [{row: token % vocabulary for row, token in rows.items()} for rows in step]
            for lane, rows, positions in zip(own, tokens, lanes.step(list(zip(own, tokens, strict=True))), strict=True):
                for row, position in zip(rows, positions, strict=True):
                    if isinstance(position, FloatingPointError):
                        raise position
                    found[lane.index, row] = position.logits
        return torch.tensor([found[key] for key in sorted(found)])

    try:
        expected = alone()
    # A model that cannot decode at all is refused by name when it is to.
    except Exception as error:
        reason: str | None = f"{type(error).__name__}: {error}".partition("\n")[0]
    else:
        # Readers answer in fp32 at most.
        dtype = torch.float32 if model.dtype is torch.float64 else model.dtype
        reason = disagreement("logits", in_lanes, expected, dtype)
    if reason is not None:
        _logger.warning("%s decodes one row at a time: %s", type(model).__name__, reason)
    return reason is None
