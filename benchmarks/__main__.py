"""Kernels against their baselines: `python -m benchmarks`.

Runs the kernel tests, then every case of the registry, its providers taking turns; prints a table and writes JSON and
CSV. With one thread the clock is the CPU time of the process, with more it is wall time. "Of ceiling" is the share of
the read bandwidth, or of the rate of a large matrix product where arithmetic binds, both measured in the same run.

`--device cuda` runs the cases of a GPU's size there, timed by CUDA events, without launches: with a cold L2 cache, and
what fits it also with a warm one and within a CUDA graph. The bandwidth is that of a copy within its memory. Ours are
the CUDA kernels where the op has them and they run, with the Triton kernels beside them; else the Triton kernels.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks import gate, report, session, targets
from benchmarks.base import compare
from benchmarks.gpu import session as gpu_session
from benchmarks.memory import measure_peaks
from benchmarks.registry import load_cases
from ggro_hf.report.benchmarks import BenchmarkReport, format_report

# Settings of `--quick`, which is to end within a minute.
QUICK_ROUNDS, QUICK_SECONDS = 3, 0.2


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m benchmarks", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--op", nargs="+", metavar="NAME", help="only these ops")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where (cpu)")
    parser.add_argument("--threads", nargs="+", type=int, metavar="N", help="numbers of threads (1 2, --quick: 1)")
    parser.add_argument("--quick", action="store_true", help="one case per op, few rounds, no kernel tests")
    parser.add_argument("--untested", action="store_true", help="no kernel tests: they have just been run")
    parser.add_argument(
        "--memory", action="store_true", help="also peak extra memory, each provider in a fresh process"
    )
    parser.add_argument(
        "--budget", type=float, metavar="SECONDS", help="on a GPU: no new case after so long, the most important first"
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
        if not load_cases(arguments.op, gpu=arguments.device == "cuda"):
            parser.error(f"ggro_kernels has no {' or '.join(arguments.op or ())} yet")
    except ValueError as error:
        parser.error(str(error))
    if arguments.base and (arguments.output or arguments.memory):
        parser.error("--base prints a comparison only: leave --output and --memory out")
    if arguments.device == "cuda":
        if arguments.threads or arguments.base or arguments.memory:
            parser.error("--threads, --base and --memory are for the CPU; on a GPU memory is always measured")
        if not torch.cuda.is_available():
            parser.error("--device cuda needs an NVIDIA GPU, and torch sees none")
    elif arguments.budget is not None:
        parser.error("--budget is for --device cuda")
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 done, 1 red tests or a provider that fails."""
    arguments = parse(argv)
    try:
        results = on_gpu(arguments) if arguments.device == "cuda" else on_cpu(arguments)
    except (gate.RedTests, session.SessionError) as error:
        print(f"benchmarks: error: {error}", file=sys.stderr)
        return 1
    if results is None:
        return 0
    print("\n".join(["", format_report(results), *targets.lines(results)]))
    full = not (arguments.quick or arguments.op or arguments.threads)
    kept = session.ROOT / "benchmarks" / "results" / results.machine["kind"]
    output = arguments.output or (kept if full else None)
    if output is not None:
        report.write(results, output)
        print(f"\nwrote {output}/kernels.json and kernels.csv")
    return 0


def on_cpu(arguments: argparse.Namespace) -> BenchmarkReport | None:
    """The results; None of a comparison, which is printed."""
    if tests_come_first(arguments):
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
        return None
    measured = session.run(settings)
    peaks = measure_peaks(arguments.op, quick=arguments.quick) if arguments.memory else {}
    return report.build_report(measured, peaks)


def on_gpu(arguments: argparse.Namespace) -> BenchmarkReport:
    """The results."""
    if tests_come_first(arguments):
        gate.require_green_tests(gate.KERNEL_TESTS, "-k", "triton or cuda")
    settings = gpu_session.Settings(arguments.op, arguments.quick, budget=arguments.budget or float("inf"))
    if arguments.quick:
        settings = replace(settings, rounds=QUICK_ROUNDS, seconds=QUICK_SECONDS)
    return report.build_gpu_report(gpu_session.run(settings))


def tests_come_first(arguments: argparse.Namespace) -> bool:
    """Whether the kernel tests are run."""
    if arguments.quick:
        print("--quick: kernel tests left out", flush=True)
    return not (arguments.quick or arguments.untested)


if __name__ == "__main__":
    sys.exit(main())
