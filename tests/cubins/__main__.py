"""Compiles every case for every architecture, prints what the kernels use, and fails where one spills registers."""

import argparse
import os
import sys
from concurrent.futures import ProcessPoolExecutor

# Before Triton is imported.
os.environ["TRITON_INTERPRET"] = "0"

from tests.cubins.cases import cases
from tests.cubins.compilation import Cubin, compile_case
from tests.sass import shown

ARCHITECTURES = (80, 90, 100)


def compiled(index: int, architecture: int) -> list[Cubin]:
    return compile_case(cases()[index], architecture)


def faults(cubin: Cubin, wide_loads: tuple[str, ...]) -> list[str]:
    """What is wrong with a compiled kernel."""
    found = []
    if cubin.spilled:
        found.append(f"{cubin.spilled} loads and stores of spilled registers")
    if cubin.kernel in wide_loads and 16 not in cubin.loads:
        found.append("no 16-byte load")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.cubins", description=__doc__)
    parser.add_argument("--only", default="", metavar="TEXT", help="the cases that have TEXT in their name")
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHITECTURES, help="compute capabilities, such as 90")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    options = parser.parse_args()

    chosen = [(index, case) for index, case in enumerate(cases()) if options.only in case.name]
    failed = False
    print(f"{'sm':>4} {'warps':>5} {'regs':>4} {'shared':>7} {'spills':>6}  {'loads':24} kernel, case")
    with ProcessPoolExecutor(options.jobs) as pool:
        work = [(case, pool.submit(compiled, i, sm)) for i, case in chosen for sm in options.arch]
        for case, result in work:
            for cubin in result.result():
                wrong = faults(cubin, case.wide_loads)
                failed |= bool(wrong)
                print(
                    f"{cubin.architecture:>4} {cubin.warps:>5} {cubin.registers:>4} {cubin.shared_bytes:>7} "
                    f"{cubin.spilled:>6}  {shown(cubin.loads):24} {cubin.kernel}, {cubin.case}"
                    + "".join(f"  FAILED: {fault}" for fault in wrong),
                    flush=True,
                )
    return int(failed or not chosen)


if __name__ == "__main__":
    sys.exit(main())
