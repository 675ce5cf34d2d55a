"""One pytest-benchmark session over the registry, in a process of its own."""

import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

Timings = dict[tuple[str, int | str, str], list[float]]
"""Seconds per call, by the case's name, number of threads (on a GPU: mode) and provider."""


@dataclass(frozen=True)
class Session:
    """What a session measured, and `ggro_kernels.info.capabilities()` inside it."""

    timings: Timings
    capabilities: dict[str, Any]


class SessionError(RuntimeError):
    """The session ended without results; what it said is on the terminal."""


@dataclass(frozen=True)
class Settings:
    """What a session runs; None leaves the suite's default."""

    ops: list[str] | None = None
    threads: list[int] | None = None
    rounds: int | None = None
    seconds: float | None = None
    quick: bool = False
    only_ours: bool = False

    def arguments(self) -> list[str]:
        """As options of benchmarks/conftest.py."""
        arguments = []
        if self.ops is not None:
            arguments += ["--op", *self.ops]
        if self.threads is not None:
            arguments += ["--threads", *map(str, self.threads)]
        if self.rounds is not None:
            arguments += [f"--rounds={self.rounds}"]
        if self.seconds is not None:
            arguments += [f"--seconds={self.seconds}"]
        return arguments + ["--quick"] * self.quick + ["--only-ours"] * self.only_ours


def run(settings: Settings, kernels: Path = ROOT) -> Session:
    """Run the suite and read what it measured: nothing where `kernels` has none of the ops.

    Args:
        kernels: the directory whose `ggro_kernels` is measured.

    Raises:
        SessionError: a provider failed, or another ggro_kernels was found.
    """
    with tempfile.TemporaryDirectory() as directory:
        raw = Path(directory, "raw.json")
        command = [
            sys.executable,
            "-m",
            "pytest",
            f"{ROOT}/benchmarks/suite.py",
            "-x",
            "-qq",
            "-s",
            "--disable-warnings",
        ]
        # The path decides which ggro_kernels is found, so pytest must not put its own entries first.
        command += [f"--rootdir={ROOT}", "--import-mode=append", "-p", "no:cacheprovider"]
        command += [f"--benchmark-json={raw}", "--benchmark-quiet", *settings.arguments()]
        # pytest-benchmark measures nothing in a worker of xdist, as which a run started by a test would pass.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
        paths = (str(kernels), str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", ""))
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        code = subprocess.run(command, cwd=directory, env=environment).returncode
        if code != 0:
            raise SessionError("the benchmarks did not finish: the message above says where they stopped")
        if not raw.exists():
            return Session({}, {})
        session = json.loads(raw.read_text(encoding="utf-8"))
    found = Path(session["ggro_kernels"]["file"])
    if not found.is_relative_to(kernels.resolve()):
        raise SessionError(f"measured {found} instead of the kernels in {kernels}")
    return Session(collect_timings(session["benchmarks"]), session["ggro_kernels"]["capabilities"])


def collect_timings(turns: list[dict[str, Any]]) -> Timings:
    """The timings of all turns that pytest-benchmark's JSON lists."""
    timings: Timings = defaultdict(list)
    for turn in turns:
        info = turn["extra_info"]
        timings[info["case"], info["threads"], info["provider"]] += turn["stats"]["data"]
    return dict(timings)
