"""Kernels against their baselines: `python -m benchmarks`.

Runs the kernel tests, then every case of the registry, its providers taking turns; prints a table and writes JSON and
CSV. With one thread the clock is the CPU time of the process, with more it is wall time. "Of ceiling" is the share of
the read bandwidth, or of the rate of a large matrix product where arithmetic binds, both measured in the same run.
"""

import argparse
import sys
from pathlib import Path

from benchmarks import gate, report, session
from benchmarks.base import compare
from benchmarks.memory import measure_peaks
from benchmarks.registry import load_cases
from ggro_hf.report.benchmarks import format_report

# Settings of `--quick`, which is to end within a minute.
QUICK_ROUNDS, QUICK_SECONDS = 3, 0.2


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m benchmarks", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--op", nargs="+", metavar="NAME", help="only these ops")
    parser.add_argument("--threads", nargs="+", type=int, metavar="N", help="numbers of threads (1 2, --quick: 1)")
    parser.add_argument("--quick", action="store_true", help="one case per op, few rounds, no kernel tests")
    parser.add_argument(
        "--memory", action="store_true", help="also peak extra memory, each provider in a fresh process"
    )
    parser.add_argument("--base", metavar="REF", help="instead, our kernels against those of another commit")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="of kernels.json and kernels.csv (benchmarks/results/MACHINE of a full run)",
    )
    arguments = parser.parse_args(argv)
    try:
        if not load_cases(arguments.op):
            parser.error(f"ggro_kernels has no {' or '.join(arguments.op)} yet")
    except ValueError as error:
        parser.error(str(error))
    if arguments.base and (arguments.output or arguments.memory):
        parser.error("--base prints a comparison only: leave --output and --memory out")
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 done, 1 red tests or a provider that fails."""
    arguments = parse(argv)
    try:
        if arguments.quick:
            print("--quick: kernel tests left out", flush=True)
        else:
            gate.require_green_tests()
        settings = session.Settings(
            ops=arguments.op,
            threads=arguments.threads or ([1] if arguments.quick else None),
            rounds=QUICK_ROUNDS if arguments.quick else None,
            seconds=QUICK_SECONDS if arguments.quick else None,
            quick=arguments.quick,
        )
        if arguments.base:
            print(compare(arguments.base, settings))
            return 0
        measured = session.run(settings)
        peaks = measure_peaks(arguments.op, quick=arguments.quick) if arguments.memory else {}
    except (gate.RedTests, session.SessionError) as error:
        print(f"benchmarks: error: {error}", file=sys.stderr)
        return 1
    results = report.build_report(measured, peaks)
    print(f"\n{format_report(results)}")
    full = not (arguments.quick or arguments.op or arguments.threads)
    output = arguments.output or (session.ROOT / "benchmarks" / "results" / report.machine_kind() if full else None)
    if output is not None:
        report.write(results, output)
        print(f"\nwrote {output}/kernels.json and kernels.csv")
    return 0


if __name__ == "__main__":
    sys.exit(main())
