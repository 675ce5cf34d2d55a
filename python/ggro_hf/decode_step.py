"""One token through a model at fixed addresses: captured once, replayed for every token at the cost of a launch."""

from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from ggro_hf.attention import PREFIX_ATTENTION, attending
from ggro_hf.cache import RewindableCache
from ggro_hf.graphs import CAPTURES, Captured
from ggro_hf.models import TOLERANCE, device_of, embedding_rows
from ggro_hf.reading import Reader
from ggro_hf.recording import CaptureError
from ggro_hf.transfer import Arrival, Copies, Transfer, pack, to_device

_MOST_READERS = 8


class _Ahead(NamedTuple):
    """A step that was launched before anybody asked for it."""

    token: int
    position: int
    reader: Reader[Any]
    transfer: Arrival


class DecodeStep:
    """The pass of a model over one token behind the prefix in `cache`, and the ways to read its logits.

    The token, its position and the logits are tensors that stay where they are; the pass writes keys and values to the
    row that the position names. Reading the logits makes the likeliest token the next one and moves the position on, so
    that the next replay needs nothing of the host.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        cache: RewindableCache,
        attention: str,
        token_ids: list[int],
        expected: torch.Tensor,
    ) -> None:
        """Capture the pass with that attention implementation over the last of `token_ids`, the others being cached.

        The model is not kept. Raises whatever keeps its pass from being captured, and CaptureError unless a replay
        gives about the `expected` logits.
        """
        device = device_of(model)
        self.rows = cache.rows
        self.launches = 0
        # Token, position, the buffers' last row.
        self._inputs = torch.tensor([0, 0, self.rows - 1], device="cpu").to(device)
        self._held: tuple[int, int] | None = None
        self._ahead: _Ahead | None = None
        # What a reader makes of the logits, and on a device of its own the same as one tensor.
        self._readings: dict[Reader[Any], Captured[tuple[tuple[torch.Tensor, ...], torch.Tensor | None]]] = {}
        # Values that Python took from this token would be found out by the next.
        self._place((token_ids[-1] + 1) % embedding_rows(model), len(token_ids) - 1)
        static = cache.static(self._inputs[1:], masked=attention != PREFIX_ATTENTION)
        token, position = self._inputs[:1, None], self._inputs[1:2, None]

        @torch.inference_mode()
        def one_token() -> torch.Tensor:
            with attending(model, attention):
                output = model(
                    input_ids=token, position_ids=position, past_key_values=static, use_cache=True, logits_to_keep=1
                )
            logits: torch.Tensor = output.logits[0, -1]
            return logits

        self._forward: Captured[torch.Tensor] = CAPTURES[device.type](one_token, device)  # type: ignore[assignment]
        self._place(token_ids[-1], len(token_ids) - 1)
        self._forward.replay()
        _check(self._forward.outputs, expected)

    def prepare(self, reader: Reader[Any]) -> None:
        """Make sure that `run` can read with that reader. Raises whatever keeps it from being captured."""
        if reader in self._readings:
            return
        inputs, logits, asynchronous = self._inputs, self._forward.outputs, self._forward.asynchronous

        @torch.inference_mode()
        def read() -> tuple[tuple[torch.Tensor, ...], torch.Tensor | None]:
            tensors = reader.on_device(logits)
            inputs[:1].copy_(tensors[0][:1])
            inputs[1:2].add_(1)
            return tensors, pack(tensors) if asynchronous else None

        self.stop()
        reading: Any = CAPTURES[inputs.device.type](read, inputs.device)
        # What cannot be replayed must say so now.
        reading.replay()
        self._held = None
        while len(self._readings) >= _MOST_READERS:
            del self._readings[next(iter(self._readings))]
        self._readings[reader] = reading

    def run(self, token: int, position: int, reader: Reader[Any], *, run_ahead: bool) -> list[torch.Tensor]:
        """What the reader makes of the logits after `token` at that position, on the host.

        With `run_ahead` the step of the token that follows if the likeliest does is launched too, before the host waits
        for this one, where it has to wait. Until the next call, everything before that position must stay as it is, or
        `stop` be called.
        """
        if self._ahead is not None and self._ahead[:3] == (token, position, reader):
            transfer = self._ahead.transfer
        else:
            self._place(token, position)
            transfer = self._launch(reader)
        following = self._launch(reader) if run_ahead and self._forward.asynchronous else None
        tensors = transfer.wait()
        likeliest = int(tensors[0][0])
        self._ahead = None if following is None else _Ahead(likeliest, position + 1, reader, following)
        self._held = (likeliest, position + 1) if following is None else None
        return tensors

    def stop(self) -> None:
        """Drop the step that was launched ahead, if one was."""
        self._ahead = None

    def _place(self, token: int, position: int) -> None:
        if self._held != (token, position):
            self._inputs[:2].copy_(torch.tensor([token, position], device="cpu"), non_blocking=True)
            self._held = (token, position)

    def _launch(self, reader: Reader[Any]) -> Arrival:
        reading = self._readings[reader]
        self._forward.replay()
        reading.replay()
        self._held = None
        self.launches += 1
        tensors, packed = reading.outputs
        return Copies(tensors) if packed is None else Transfer(packed, tensors)


def _check(logits: torch.Tensor, expected: torch.Tensor) -> None:
    finite = expected.isfinite()
    scale = expected[finite].abs().amax().clamp(min=1.0) if finite.any() else 1.0
    near = (logits - expected)[finite].abs() <= TOLERANCE[expected.dtype] * scale
    if not near.all() or not logits.isfinite().equal(finite):
        raise CaptureError("its captured pass gives other logits than its forward")


def forward(model: PreTrainedModel, cache: RewindableCache, token_ids: list[int]) -> torch.Tensor:
    """The ordinary pass: append tokens to the cache and return the logits `[V]` after the last."""
    inputs = to_device([token_ids], device_of(model))
    logits: torch.Tensor = model(input_ids=inputs, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    return logits[0, -1]
