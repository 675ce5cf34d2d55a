"""`ggro bench`: show and draw results of the kernel benchmarks."""

import argparse
from pathlib import Path
from typing import Any

from ggro_hf.cli.errors import CommandError, one_line
from ggro_hf.report.benchmarks import BenchmarkReport, format_report


def register(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "bench",
        help="show and draw benchmark results",
        description="Print the results of the kernel benchmarks (`make bench` in the repository) as a table.",
    )
    parser.set_defaults(run=run)
    parser.add_argument("results", type=Path, metavar="RESULTS.json", help="kernels.json of a run")
    parser.add_argument("--plot", type=Path, metavar="DIR", help="also draw speed-ups and rooflines as PNG files")


def run(args: argparse.Namespace) -> int:
    """Print the table, then draw."""
    try:
        report = BenchmarkReport.load(args.results)
    except (OSError, ValueError) as error:
        raise CommandError(one_line(error)) from error
    print(format_report(report))
    if args.plot is not None:
        try:
            from ggro_hf.report.benchmark_plots import draw
        except ImportError as error:
            raise CommandError(f"--plot needs matplotlib ({error}); pip install 'ggro-kernels[bench]'") from error
        try:
            args.plot.mkdir(parents=True, exist_ok=True)
            files = draw(report, args.plot)
        except OSError as error:
            raise CommandError(f"--plot {str(args.plot)!r} cannot be written: {one_line(error)}") from error
        print("\nwrote " + ", ".join(map(str, files)))
    return 0
