"""Options of the suite, and its order: case, threads, round, provider, so that the providers take turns."""

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import ggro_kernels
from benchmarks import ceilings
from benchmarks.contest import Contests
from benchmarks.registry import OURS, Case, Provider, load_cases
from ggro_kernels import info


@dataclass(frozen=True)
class Turn:
    """One provider's turn in one round of a case."""

    case: Case
    threads: int
    round: int
    provider: Provider


def default_threads() -> list[int]:
    """One thread, and two where there are two."""
    return [1, 2] if (os.cpu_count() or 1) > 1 else [1]


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("suite")
    group.addoption("--op", nargs="+", help="ops of the registry (all)")
    group.addoption("--threads", nargs="+", type=int, default=default_threads(), help="numbers of threads")
    group.addoption("--rounds", type=int, default=30, help="most turns of a provider")
    group.addoption(
        "--seconds", type=float, default=1.5, help="no new round of a case after so long, from the fifth on"
    )
    group.addoption("--quick", action="store_true", help="only the cases of --quick")
    group.addoption("--only-ours", action="store_true", help="no baselines, no ceilings")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    option = metafunc.config.option
    cases = [case for case in load_cases(option.op) if case.quick or not option.quick]
    if not option.only_ours:
        cases = ceilings.CASES + cases
    turns = [
        Turn(case, threads, round_, provider)
        for case in cases
        for threads in option.threads
        for round_ in range(option.rounds)
        for provider in case.available_providers()
        if provider.name == OURS or not option.only_ours
    ]
    metafunc.parametrize("turn", [pytest.param(turn, marks=clock(turn), id=identifier(turn)) for turn in turns])


def clock(turn: Turn) -> pytest.MarkDecorator:
    """With one thread the CPU time of the process, in which what the machine gives to others does not count."""
    return pytest.mark.benchmark(timer=time.process_time if turn.threads == 1 else time.perf_counter)


def identifier(turn: Turn) -> str:
    return f"{turn.case.name}-{turn.threads}-{turn.round}-{turn.provider.name}"


@pytest.fixture(scope="session")
def contests(request: pytest.FixtureRequest) -> Iterator[Contests]:
    turns = [item.callspec.params["turn"] for item in request.session.items]
    total = len({(turn.case.name, turn.threads) for turn in turns})
    contests = Contests(total, request.config.option.seconds)
    yield contests
    contests.close()


def pytest_report_teststatus(report: pytest.TestReport) -> tuple[str, str, str] | None:
    """No dot per turn: every contest prints a line of its own."""
    return None if report.failed else (report.outcome, "", "")


def pytest_benchmark_update_json(output_json: dict[str, Any]) -> None:
    """Which kernels were measured."""
    file = str(Path(ggro_kernels.__file__).resolve())
    output_json["ggro_kernels"] = {"file": file, "capabilities": info.capabilities()}
