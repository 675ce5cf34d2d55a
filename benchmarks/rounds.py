"""Functions that take turns, so that whatever else the machine does meets all of them alike."""

import statistics
from collections.abc import Callable
from time import perf_counter
from typing import TypeVar

T = TypeVar("T")


def interleaved(runs: dict[str, Callable[[], T]], rounds: int) -> dict[str, tuple[T, float]]:
    """The last result of every function and its median seconds, the functions taking turns."""
    results: dict[str, T] = {}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = perf_counter()
            results[name] = run()
            seconds[name].append(perf_counter() - start)
    return {name: (results[name], statistics.median(times)) for name, times in seconds.items()}
