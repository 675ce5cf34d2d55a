"""Compiles the CUDA kernels for every architecture and compares what they use with tests/cuda_budget/budget.txt.

Fails where a kernel spills registers, takes more of them or moves fewer bytes at a time than recorded, or is not
recorded.
"""

import argparse
import sys
from pathlib import Path

from tests.cuda_budget import budget
from tests.cuda_budget.compilation import Usage, measured, nvcc, nvcc_release
from tests.sass import shown

PATH = Path(__file__).with_name("budget.txt")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.cuda_budget", description=__doc__)
    parser.add_argument("--record", action="store_true", help="write the budget that the kernels just keep")
    options = parser.parse_args(argv)
    if nvcc() is None:
        print("cuda-budget: nothing is checked, there is no nvcc (put it on PATH, or set CUDACXX)")
        return 0
    usages = measured()
    if options.record:
        budget.write(budget.recorded(usages, nvcc_release(), budget.read(PATH)), PATH)
    return report(budget.read(PATH), usages, nvcc_release())


def report(allowed: budget.Budget, usages: list[Usage], release: str) -> int:
    """Print what every kernel uses and what is wrong with it; the exit code."""
    found = [(usage, allowed.faults(usage)) for usage in sorted(usages, key=lambda x: (x.kernel, x.architecture))]
    width = max((len(usage.kernel) for usage in usages), default=0)
    print(f"{'kernel':{width}}  {'':6} {'regs':>4} {'stack':>5} {'spills':>6} {'shared':>6}  {'loads':24} stores")
    for usage, faults in found:
        print(
            f"{usage.kernel:{width}}  {usage.architecture:6} {usage.registers:>4} {usage.stack_bytes:>5} "
            f"{usage.spilled_bytes:>6} {usage.shared_bytes:>6}  {shown(usage.loads):24} {shown(usage.stores)}"
            + "".join(f"  FAILED: {fault}" for fault in faults)
        )
    gone = allowed.gone(usages)
    for kernel in gone:
        print(f"{kernel}: FAILED: recorded, but not there")
    failed = sum(bool(faults) for _, faults in found) + len(gone)
    if failed:
        total = len(found) + len(gone)
        print(f"cuda-budget: {failed} of {total} failed (nvcc {release}, recorded with {allowed.release})")
        print("Where this is meant, record it with `python -m tests.cuda_budget --record` and review the difference.")
    return int(bool(failed) or not usages)


if __name__ == "__main__":
    sys.exit(main())
