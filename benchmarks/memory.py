"""Peak memory of a call over its inputs, each provider in a process of its own: `--memory`."""

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from benchmarks.registry import Case, load_cases
from benchmarks.session import ROOT

# What is freed goes back to the system at once, so that a call cannot live on what an earlier one left.
_ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MKL_DISABLE_FAST_MM": "1"}


def measure_peaks(ops: Iterable[str] | None = None, *, quick: bool = False) -> dict[tuple[str, str], int]:
    """Extra bytes by case and provider, of the cases marked for it; on one thread."""
    peaks = {}
    for case in load_cases(ops):
        if not case.memory or (quick and not case.quick):
            continue
        for provider in case.available_providers():
            # torch.compile's own compilation would be what is measured.
            if not provider.compiled:
                peaks[case.name, provider.name] = peak_extra_bytes(case.name, provider.name)
                print(f"{case.name}, {provider.name}: {peaks[case.name, provider.name] / 1e6:.1f} MB extra", flush=True)
    return peaks


def peak_extra_bytes(case: str, provider: str) -> int:
    """Growth of a fresh process during one call, its result included."""
    return last_number_printed_by("benchmarks.memory", case, provider)


def last_number_printed_by(module: str, *arguments: str) -> int:
    """What a module prints last when it runs in a process of its own, where memory can be measured."""
    command = [sys.executable, "-m", module, *arguments]
    paths = filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))
    environment = {**os.environ, **_ENVIRONMENT, "PYTHONPATH": os.pathsep.join(paths)}
    result = subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return int(result.stdout.split()[-1])


def measure_growth(case: Case, provider_name: str) -> int:
    """Bytes by which this process grows during one call (Linux), what the provider keeps for later calls included."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    provider = next(provider for provider in case.providers if provider.name == provider_name)
    # What torch's own libraries set up at their first call is not the op's doing.
    for _ in range(2):
        block = torch.ones(64, 64, dtype=case.dtype)
        (block @ block).softmax(-1).topk(2)
    return peak_growth(provider.bind(case.inputs()))


def peak_growth(call: Callable[[], Any]) -> int:
    """Bytes by which this process grows at most during a call (Linux), the code that it loads left out."""
    # Whatever came before had a peak of its own: start counting afresh.
    Path("/proc/self/clear_refs").write_text("5")
    before, code = _kib("VmRSS"), _kib("RssFile")
    result = call()
    # Code is loaded as it is first run.
    growth = _kib("VmHWM") - before - (_kib("RssFile") - code)
    del result
    return 1024 * max(growth, 0)


def _kib(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("case")
    parser.add_argument("provider")
    arguments = parser.parse_args()
    found = next(case for case in load_cases() if case.name == arguments.case)
    print(measure_growth(found, arguments.provider))
