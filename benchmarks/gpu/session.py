"""All cases on a GPU within a budget of time, in a process that is replaced when its device fails."""

import multiprocessing
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

from benchmarks import ceilings
from benchmarks.gpu.contest import MOST_ROUNDS, Contest, DeviceLost, Measured
from benchmarks.gpu.device import CudaDevice, Device
from benchmarks.registry import Case, load_cases
from benchmarks.session import SessionError
from ggro_kernels import info

NO_TIME = "no time left"

# Time for the case at hand beyond the end of the budget, such as for a compilation.
GRACE_SECONDS = 15.0
# A case that takes so long hangs, or compiles a library.
CASE_SECONDS = 90.0


@dataclass(frozen=True)
class Settings:
    """What is run, and for how long."""

    ops: list[str] | None = None
    quick: bool = False
    budget: float = float("inf")
    """Seconds for everything; no case starts after so long."""
    seconds: float = 0.4
    """The same for the rounds of one case in one mode."""
    rounds: int = MOST_ROUNDS


@dataclass
class GpuSession:
    """What was measured, and what was not."""

    machine: dict[str, Any] = field(default_factory=dict)
    """The device's `describe`."""
    capabilities: dict[str, Any] = field(default_factory=dict)
    """`ggro_kernels.info.capabilities()` of the process that measured."""
    measured: dict[str, Measured] = field(default_factory=dict)
    """By the name of the case, those of benchmarks/ceilings.py included."""
    left_out: list[str] = field(default_factory=list)
    """Cases for which there was no time."""


def by_importance(settings: Settings) -> list[Case]:
    """The ceilings, one case of every op, those of README's table, the others."""
    cases = [case for case in load_cases(settings.ops, gpu=True) if case.quick or not settings.quick]
    return ceilings.GPU_CASES + sorted(cases, key=lambda case: (not case.quick, not case.shown))


Cases = Callable[[Settings], list[Case]]


def run(settings: Settings, device: Callable[[], Device] = CudaDevice, cases_of: Cases = by_importance) -> GpuSession:
    """Measure the cases in their order until they are done or the budget is used up.

    Args:
        device: made in the process that measures; as `cases_of`, importable by its name.

    Raises:
        SessionError: the process that measures does not start.
    """
    end = time.monotonic() + settings.budget
    session = GpuSession()
    names = [case.name for case in cases_of(settings)]
    while names and time.monotonic() < end:
        names = _run_in_a_process(names, end, settings, device, cases_of, session)
    session.left_out = names
    return session


def _run_in_a_process(
    names: list[str],
    end: float,
    settings: Settings,
    device: Callable[[], Device],
    cases_of: Cases,
    session: GpuSession,
) -> list[str]:
    """Measure cases until the process ends; those that it did not begin with."""
    # A process forked from one that has used CUDA cannot use it.
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_measure, args=(theirs, names, end, settings, device, cases_of))
    process.start()
    theirs.close()
    begun: str | None = None
    left = list(names)
    limit = end + GRACE_SECONDS
    try:
        while ours.poll(None if limit == float("inf") else max(0.0, limit - time.monotonic())):
            message = ours.recv()
            limit = min(end + GRACE_SECONDS, time.monotonic() + CASE_SECONDS)
            if isinstance(message, str):
                begun = message
                left.remove(begun)
            elif isinstance(message, Measured):
                session.measured[message.case] = message
                print(f"[{len(names) - len(left)}/{len(names)}] {message.summary()}", flush=True)
            else:
                session.machine, session.capabilities = message
    except EOFError:
        process.join(GRACE_SECONDS)
    finally:
        if process.is_alive():
            process.kill()
        process.join()
    if begun is None and time.monotonic() < end:
        raise SessionError("the process that measures ended before its first case: the message above says why")
    if begun is not None and begun not in session.measured:
        now = time.monotonic()
        if now < end:
            took_long = f"no end within {CASE_SECONDS:.0f} s"
            reason = took_long if now >= limit else f"its process ended with exit code {process.exitcode}"
        else:
            reason = NO_TIME
        session.measured[begun] = Measured(begun, failures={"all providers": reason})
        print(session.measured[begun].summary(), flush=True)
    return left


def _measure(
    results: Connection,
    names: list[str],
    end: float,
    settings: Settings,
    device_type: Callable[[], Device],
    cases_of: Cases,
) -> None:
    """Send the machine, then for every case its name and what came of it."""
    device = device_type()
    results.send((device.describe(), info.capabilities()))
    cases = {case.name: case for case in cases_of(settings)}
    for name in names:
        if time.monotonic() >= end:
            return
        results.send(name)
        try:
            results.send(Contest(cases[name], device).run(settings.seconds, settings.rounds))
        except DeviceLost as lost:
            results.send(lost.measured)
            return
