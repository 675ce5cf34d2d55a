"""Build, tests of kernels on the GPU, sanitizer, profile, benchmarks, report, within nine minutes: `make gpu-check`.

Each step may take what is left after the time that the steps behind it need; one that runs out of it ends with what it
has and says so. Logs and results are in build/gpu-check, of every step the last.
"""

import argparse
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

from tests.gpu_check.check import CUT, FAILED, ROOT, Check, Result
from tests.gpu_check.steps import STEPS

SECONDS = 525.0
# What a step leaves for each of those behind it.
NEEDED = {"build": 50.0, "tests": 200.0, "sanitizer": 60.0, "profile": 30.0, "benchmarks": 165.0, "report": 20.0}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m tests.gpu_check", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("steps", nargs="*", metavar="STEP", help=f"{', '.join(STEPS)} (all, in this order)")
    parser.add_argument(
        "--wheels", type=Path, metavar="DIR", help="a folder of wheels to install first, for the check only"
    )
    arguments = parser.parse_args(argv)
    if unknown := set(arguments.steps) - set(STEPS):
        parser.error(f"there is no step {min(unknown)!r}: there are {', '.join(STEPS)}")
    if arguments.wheels is not None and not list(arguments.wheels.glob("*.whl")):
        parser.error(f"--wheels {str(arguments.wheels)!r} has no wheels")
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 where every step that ran has passed, 1 otherwise, a cut test step included."""
    arguments = parse(argv)
    # What it started ends with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    chosen = [step for step in STEPS if not arguments.steps or step in arguments.steps]
    if {"tests", "sanitizer", "profile", "benchmarks"} & set(chosen) and not sees_gpu():
        print("gpu-check: error: torch sees no GPU", file=sys.stderr)
        return 1
    check = Check(ROOT / "build" / "gpu-check", arguments.wheels)
    if not check.install_wheels():
        print("gpu-check: error: the wheels could not be installed", file=sys.stderr)
        return 1
    return exit_code(run(check, chosen, time.monotonic() + SECONDS))


def run(check: Check, chosen: list[str], end: float) -> list[Result]:
    """The results of the steps, which together end about then."""
    results = []
    for index, step in enumerate(chosen):
        check.forget(f"{step}.json", f"{step}.log")
        start = time.monotonic()
        seconds = max(0.0, end - start - sum(NEEDED[later] for later in chosen[index + 1 :]))
        print(f"\n== {step}: at most {seconds:.0f} s", flush=True)
        result = replace(STEPS[step](check, seconds), seconds=round(time.monotonic() - start, 1))
        check.keep(result)
        results.append(result)
        if step != "report":
            print(f"== {step}: {result.status}, {result.seconds:.0f} s; {result.note}", flush=True)
    return results


def exit_code(results: list[Result]) -> int:
    """What was cut short is an error only of tests: benchmarks measure what they have time for."""
    wrong = [result for result in results if result.status == FAILED or (result.step, result.status) == ("tests", CUT)]
    return int(bool(wrong))


def sees_gpu() -> bool:
    """Asked in a process of its own: this one needs no torch."""
    ask = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", ask]).returncode == 0


if __name__ == "__main__":
    sys.exit(main())
