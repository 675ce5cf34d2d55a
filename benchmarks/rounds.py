"""Functions that take turns, so that whatever else the machine does meets all of them alike; the file of results."""

import json
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any, TypeVar

import torch
import transformers

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


def write_results(path: Path, results: Sequence[Mapping[str, Any]]) -> None:
    """Write results as JSON, with what they were measured on."""
    report = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": platform.processor() or platform.machine(),
        "results": results,
    }
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
