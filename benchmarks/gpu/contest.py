"""The providers of one case on a GPU, which take turns.

A timing is what the GPU needs between two marks in its queue. Before the first mark it is given enough to do that the
call is in the queue by the time its turn comes, so that Python and launches are not what is measured.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from statistics import median
from typing import Any

import torch

from benchmarks.contest import compared
from benchmarks.gpu.device import Call, Device
from benchmarks.registry import OURS, Case, Inputs, Provider
from ggro_hf.report.benchmarks import COLD, GRAPH, WARM

TIMINGS_PER_TURN = 5
FEWEST_ROUNDS, MOST_ROUNDS = 3, 20
# A graph has so many calls that they take about so long.
GRAPH_SECONDS, MOST_CALLS_OF_A_GRAPH = 2e-4, 64
# Putting a mark or a flush into the queue.
QUEUEING_SECONDS = 2e-5


@dataclass
class Measured:
    """What came of one case."""

    case: str
    timings: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    """Seconds per call, by mode and provider."""
    extra_bytes: dict[str, int] = field(default_factory=dict)
    """Peak memory, by provider."""
    failures: dict[str, str] = field(default_factory=dict)
    """What went wrong, by provider, or by provider and mode."""

    def summary(self) -> str:
        """One line: our median in every mode, and how many times slower the others were."""
        modes = dict.fromkeys(mode for mode, _ in self.timings)
        parts = [
            f"{mode} {compared({name: times for (of, name), times in self.timings.items() if of == mode})}"
            for mode in modes
        ]
        parts += [f"{name} FAILED: {reason}" for name, reason in self.failures.items()]
        return f"{self.case}: {'; '.join(parts)}"


class DeviceLost(RuntimeError):
    """An error in the queue, after which this process cannot use the device any more."""

    def __init__(self, measured: Measured) -> None:
        super().__init__(f"the device failed in {measured.case}")
        self.measured = measured


class Entrant:
    """A provider's call, compiled and warm, and how the device is kept busy while it is launched."""

    def __init__(self, call: Call, device: Device) -> None:
        self._device = device
        self._call = call
        self._replay: Call | None = None
        self._calls = 1
        # The first call may compile, and a library may look for its fastest algorithm.
        for _ in range(3):
            call()
        self._launch_seconds = min(_seconds_to_queue(call, device) for _ in range(3))
        self._flush_seconds = _seconds_to_flush(device)
        self.extra_bytes = device.extra_bytes(call)

    def capture(self) -> None:
        """Make the graph that `time` replays."""
        once = median(self.time(WARM, 3))
        self._calls = max(1, min(MOST_CALLS_OF_A_GRAPH, math.ceil(GRAPH_SECONDS / max(once, 1e-9))))
        self._replay = self._device.capture(self._call, self._calls)

    def time(self, mode: str, count: int = TIMINGS_PER_TURN) -> list[float]:
        """Seconds per call, `count` times; of `GRAPH` after `capture`."""
        device = self._device
        run, calls = (self._call, 1)
        if mode == GRAPH:
            assert self._replay is not None
            run, calls = self._replay, self._calls
        launches = 1 if mode == COLD else 2
        busy = 1.5 * (launches * self._launch_seconds + QUEUEING_SECONDS)
        flushes = math.ceil(busy / max(self._flush_seconds - QUEUEING_SECONDS, QUEUEING_SECONDS))
        marks = []
        for _ in range(count):
            for _ in range(flushes):
                device.flush()
            if mode != COLD:
                # As much of what it reads as fits is in the cache then.
                run()
            start = device.mark()
            run()
            marks.append((start, device.mark()))
        device.wait()
        return [device.seconds(start, end) / calls for start, end in marks]


class Contest:
    """The providers of a case on a device.

    Raises:
        DeviceLost: everything from here on would fail, too.
    """

    def __init__(self, case: Case, device: Device) -> None:
        self.measured = Measured(case.name)
        self._device = device
        self._entrants: dict[str, Entrant] = {}
        self._modes = (COLD, WARM, GRAPH) if case.bytes <= device.cache_bytes else (COLD,)
        torch.compiler.reset()
        torch.manual_seed(0)
        with torch.device(device.type):
            inputs = case.inputs()
        for provider in case.available_providers():
            if self._succeeds(provider.name, partial(self._enter, provider, inputs)):
                self.measured.extra_bytes[provider.name] = self._entrants[provider.name].extra_bytes
            elif provider.name == OURS:
                # There is nothing to compare the others with.
                break

    def run(self, seconds: float, rounds: int = MOST_ROUNDS) -> Measured:
        """Take turns: cold, and where the least that the op must read and write fits the cache, warm and in a graph.

        Args:
            seconds: no new round of a mode starts after so long, from round `FEWEST_ROUNDS` on.
            rounds: most rounds of a mode.
        """
        for mode in self._modes:
            # A provider that fails in one mode may do well in another.
            names = list(self._entrants)
            if mode == GRAPH:
                names = [name for name in names if self._succeeds(f"{name}, {mode}", self._entrants[name].capture)]
            end = time.monotonic() + seconds
            for round_ in range(rounds):
                if round_ >= FEWEST_ROUNDS and time.monotonic() > end:
                    break
                names = [name for name in names if self._succeeds(f"{name}, {mode}", partial(self._turn, mode, name))]
        return self.measured

    def _enter(self, provider: Provider, inputs: Inputs) -> None:
        with torch.device(self._device.type):
            call = provider.bind(inputs)
        self._entrants[provider.name] = Entrant(call, self._device)

    def _turn(self, mode: str, provider: str) -> None:
        times = self._entrants[provider].time(mode)
        self.measured.timings.setdefault((mode, provider), []).extend(times)

    def _succeeds(self, who: str, work: Callable[[], Any]) -> bool:
        """Do the work; where it fails, the reason is in `measured`."""
        try:
            work()
            return True
        except Exception as error:
            self.measured.failures[who] = first_line(error)
        try:
            self._device.wait()
        except Exception as error:
            raise DeviceLost(self.measured) from error
        return False


def first_line(error: BaseException) -> str:
    """What went wrong, in at most 200 characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]


def _seconds_to_queue(call: Call, device: Device) -> float:
    device.wait()
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _seconds_to_flush(device: Device) -> float:
    marks = [device.mark()]
    for _ in range(4):
        device.flush()
        marks.append(device.mark())
    device.wait()
    # The first finds the queue empty and waits for its launch.
    return min(device.seconds(start, end) for start, end in pairwise(marks[1:]))
