"""A function of tensors at fixed addresses, run again at the least cost: what a decode step is captured with."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, Protocol, TypeVar

import torch

from ggro_hf.recording import Recording

R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)


class Captured(Protocol[R_co]):
    """A function that can be replayed; a replay writes into the `outputs` of the first."""

    @property
    def outputs(self) -> R_co: ...

    @property
    def asynchronous(self) -> bool:
        """Whether a replay returns before it is done, and the host can do something else meanwhile."""

    def replay(self) -> None:
        """Run again, on the current stream."""


class CudaGraph(Generic[R]):
    """A function whose kernels one CUDA graph holds.

    The function is called three times here and never again, so what Python does in it happens only here; it must
    neither wait for the device nor draw random numbers. Raises what the function raises, and RuntimeError where it
    waits for the device.
    """

    asynchronous = True

    def __init__(self, function: Callable[[], R], device: torch.device) -> None:
        with torch.cuda.device(device):
            stream, current = torch.cuda.Stream(device), torch.cuda.current_stream(device)
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                # What is made once is made now: handles, workspaces, compiled kernels.
                function()
                # A wait would make the capture fail too, but leave the random generator's state behind in one.
                with _forbidden_waiting():
                    function()
            current.wait_stream(stream)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
                self.outputs = function()

    def replay(self) -> None:
        """Run again, on the current stream."""
        self._graph.replay()


CAPTURES: dict[str, Callable[[Callable[[], object], torch.device], Captured[object]]] = {
    "cpu": Recording,
    "cuda": CudaGraph,
}
"""What captures functions, by the type of device; on others a decode step is an ordinary forward pass."""


def captured_size(count: int) -> int:
    """What a pass over that many is captured for: a quarter more at most, so that few captures serve all numbers."""
    step = 1 << max(0, count.bit_length() - 3)
    return -(-count // step) * step


@contextmanager
def _forbidden_waiting() -> Iterator[None]:
    previous = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(previous)
