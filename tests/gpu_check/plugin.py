"""A pytest plugin for the tests of a machine that nobody will come back to.

Every outcome is written down as it comes; what has not begun at the deadline is left out; an error after which a
process cannot use the GPU any more costs one test, not all that follow.
"""

import json
import os
import sys
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

OUT_OF_TIME = "out of time"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("gpu-check")
    group.addoption("--deadline", type=float, default=float("inf"), help="seconds since 1970")
    group.addoption("--record", type=Path, help="file for a line of JSON per outcome")


def pytest_configure(config: pytest.Config) -> None:
    if config.option.record is not None and not in_worker(config):
        config.pluginmanager.register(Recorder(config.option.record))


class Recorder:
    """Writes what became of every test."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.write_text("", encoding="utf-8")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.passed and report.when != "call":
            return
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else last_line(report.longreprtext)
        line = {"test": report.nodeid, "outcome": report.outcome, "reason": reason, "seconds": report.duration}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if time.time() > item.config.option.deadline:
        pytest.skip(OUT_OF_TIME)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    result = yield
    # An error in the queue belongs to this test.
    wait_for_gpu()
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Generator[None, Any, pytest.TestReport]:
    report = yield
    if report.failed and gpu_is_lost():
        capture = item.config.pluginmanager.getplugin("capturemanager")
        with capture.global_and_fixture_disabled():
            print(f"\n{item.nodeid} lost the GPU:\n{report.longreprtext}", file=sys.stderr, flush=True)
        if in_worker(item.config):
            # The test is reported as one that crashed its worker, and another worker goes on.
            os._exit(1)
        item.session.shouldstop = f"the GPU is lost for this process since {item.nodeid}"
    return report


def in_worker(config: pytest.Config) -> bool:
    """Whether this is one of pytest-xdist's processes."""
    return hasattr(config, "workerinput")


def wait_for_gpu() -> None:
    """Raise what went wrong in the GPU's queue."""
    # Imported by the tests, if they have come so far.
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def gpu_is_lost() -> bool:
    """Whether the last error is one that every later call will repeat."""
    try:
        wait_for_gpu()
    except Exception:
        return True
    return False


def last_line(text: str) -> str:
    """Of a traceback: what was raised, in at most 300 characters."""
    errors = [line[1:].strip() for line in text.splitlines() if line.startswith("E ")]
    return (errors[0] if errors else text.strip().rpartition("\n")[2])[:300]
