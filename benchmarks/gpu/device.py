"""What the measurements ask of a GPU."""

from collections.abc import Callable
from typing import Any, Protocol

import torch

Call = Callable[[], Any]


class Device(Protocol):
    """A device that works through a queue of calls. Everything but `wait` returns before the work is done."""

    type: str
    """torch's name for it: where the inputs are made."""
    cache_bytes: int
    """Size of the last cache before its memory."""

    def mark(self) -> Any:
        """Puts into the queue what notes the time when its turn comes."""

    def seconds(self, start: Any, end: Any) -> float:
        """Between two marks, after `wait`."""

    def wait(self) -> None:
        """Until the queue is empty; raises what went wrong in it."""

    def flush(self) -> None:
        """Pushes everything out of the cache."""

    def capture(self, call: Call, calls: int) -> Call:
        """Something that runs `calls` calls without the work of launching each."""

    def extra_bytes(self, call: Call) -> int:
        """Peak memory of a call over what is there before it, its result included."""

    def describe(self) -> dict[str, Any]:
        """For the report: its name and what tells it from others of that name."""


class CudaDevice:
    """The current NVIDIA GPU."""

    type = "cuda"

    def __init__(self) -> None:
        self._properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        self.cache_bytes = self._properties.L2_cache_size
        self._scratch = torch.empty(max(1 << 28, 4 * self.cache_bytes), dtype=torch.uint8, device="cuda")

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        return 1e-3 * start.elapsed_time(end)

    def wait(self) -> None:
        torch.cuda.synchronize()

    def flush(self) -> None:
        self._scratch.zero_()

    def capture(self, call: Call, calls: int) -> Call:
        # What a library or autograd sets up at its first call on a stream cannot be captured.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            call()
            call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(calls):
                call()
        return graph.replay

    def extra_bytes(self, call: Call) -> int:
        self.wait()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        self.wait()
        return torch.cuda.max_memory_allocated() - before

    def describe(self) -> dict[str, Any]:
        return {
            "gpu": self._properties.name,
            "gpu_gib": round(self._properties.total_memory / 2**30, 1),
            "gpu_processors": self._properties.multi_processor_count,
            "compute_capability": f"{self._properties.major}.{self._properties.minor}",
            "l2_mib": self.cache_bytes / 2**20,
        }
