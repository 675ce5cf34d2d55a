"""The providers of one case on one number of threads, which take turns."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

import torch

from benchmarks.registry import OURS, Case, Inputs

# A shorter timing repeats the call, so that the clock is not what is measured.
SHORTEST_TIMING = 2e-4
# A turn takes several timings of a fast call, of which only the first finds the caches as another provider left them.
TIMINGS_PER_TURN, TURN_SECONDS = 5, 0.02
FEWEST_ROUNDS = 5


class Contest:
    """Compiled and warm calls of one case, and the timings they took.

    Args:
        seconds: no new round starts after so long, from round `FEWEST_ROUNDS` on.
    """

    def __init__(self, case: Case, threads: int, inputs: Inputs, seconds: float) -> None:
        # Compiled code is specialised to the number of threads.
        torch.compiler.reset()
        torch.set_num_threads(threads)
        self.case = case
        self.threads = threads
        self.calls = {provider.name: provider.bind(inputs) for provider in case.available_providers()}
        self.times: dict[str, list[float]] = {name: [] for name in self.calls}
        self._once = {name: _warm_up(call) for name, call in self.calls.items()}
        self._end = time.perf_counter() + seconds
        self._rounds: dict[int, bool] = {}

    def plays(self, round_: int) -> bool:
        """Whether there is time for this round: the answer is the same for all its turns."""
        if round_ not in self._rounds:
            self._rounds[round_] = round_ < FEWEST_ROUNDS or time.perf_counter() < self._end
        return self._rounds[round_]

    def turn(self, provider: str) -> tuple[int, int]:
        """How many timings a turn takes, and of how many calls each."""
        once = self._once[provider]
        calls = math.ceil(SHORTEST_TIMING / once)
        return max(1, min(TIMINGS_PER_TURN, int(TURN_SECONDS / (calls * once)))), calls

    def summary(self) -> str:
        """One line: our median, and how many times slower the others were."""
        times = {name: times for name, times in self.times.items() if times}
        threads = f"{self.threads} thread{'s' * (self.threads > 1)}"
        return f"{self.case.name}, {threads}: {compared(times)}"


class Contests:
    """The contest at hand; the inputs of a case live as long as its turns do."""

    def __init__(self, total: int, seconds: float) -> None:
        self._total = total
        self._seconds = seconds
        self._count = 0
        self._inputs: Inputs = {}
        self._contest: Contest | None = None

    def enter(self, case: Case, threads: int) -> Contest:
        """The contest of a case and number of threads, set up if it is not the one at hand."""
        last = self._contest
        if last is None or (last.case.name, last.threads) != (case.name, threads):
            self.close()
            if last is None or last.case.name != case.name:
                # Free the last case's tensors before the next one's are made.
                last = None
                self._inputs.clear()
                torch.manual_seed(0)
                self._inputs = case.inputs()
            self._contest = Contest(case, threads, self._inputs, self._seconds)
        return self._contest

    def close(self) -> None:
        """Print what came of the contest at hand."""
        if self._contest is not None:
            self._count += 1
            print(f"[{self._count}/{self._total}] {self._contest.summary()}", flush=True)
            self._contest = None


def compared(times: Mapping[str, Sequence[float]]) -> str:
    """Our median, and how many times slower the other providers were; medians where ours is missing."""
    medians = {name: median(seconds) for name, seconds in times.items()}
    base = medians.pop(OURS, None)
    parts = [f"{OURS} {1e6 * base:.1f} us"] if base else []
    parts += [
        f"{name} " + (f"{value / base:.2f}x" if base else f"{1e6 * value:.1f} us") for name, value in medians.items()
    ]
    return ", ".join(parts)


def _warm_up(call: Callable[[], Any]) -> float:
    """Seconds of the second call; the first may compile."""
    call()
    start = time.perf_counter()
    call()
    return max(time.perf_counter() - start, 1e-9)
