"""What the kernels are to reach on an H100, and whether results do: `python -m benchmarks.targets kernels.json`."""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ggro_hf.report.benchmarks import COLD, GRAPH, OURS, BenchmarkReport, BenchmarkRow


@dataclass(frozen=True)
class Target:
    """A bound of one figure of one row of the report."""

    op: str
    case: str
    dtype: str
    mode: str
    provider: str
    what: str
    figure: Callable[[BenchmarkRow], float | None]
    least: float | None = None
    most: float | None = None

    def judged(self, report: BenchmarkReport) -> str:
        """One line: met, missed or not measured, and the figure."""
        bound = f">= {self.least:g}" if self.least is not None else f"<= {self.most:g}"
        where = f"{self.op} {self.case} {self.dtype}, {self.mode}: {self.what} {bound}"
        row = next((row for row in report.rows if self._is_of(row)), None)
        value = None if row is None else self.figure(row)
        if value is None:
            return f"not measured  {where}"
        met = (self.least is None or value >= self.least) and (self.most is None or value <= self.most)
        return f"{'met' if met else 'missed':12}  {where}: {value:.3g}"

    def _is_of(self, row: BenchmarkRow) -> bool:
        wanted = (self.op, self.case, self.dtype, self.mode, self.provider)
        return (row.op, row.case, row.dtype, row.mode, row.provider) == wanted


def _entropy_topk() -> list[Target]:
    many, one = (("entropy_topk", f"{rows} x 128256", "bfloat16") for rows in (64, 1))
    return [
        Target(*many, COLD, "eager", "times as fast as eager", lambda row: row.ratio, least=8),
        Target(*many, COLD, OURS, "% of the bandwidth of a copy", lambda row: row.bandwidth_percent, least=60),
        Target(*one, GRAPH, OURS, "microseconds", lambda row: row.median_us, most=15),
    ]


TARGETS = _entropy_topk()


def lines(report: BenchmarkReport) -> list[str]:
    """One per target; none for results that are not a GPU's."""
    if "gpu" not in report.machine:
        return []
    return [f"targets of an H100, on {report.machine['gpu']}:", *(target.judged(report) for target in TARGETS)]


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, whatever is missed: to say so is what it is for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.targets", description=__doc__)
    parser.add_argument("results", type=Path, metavar="kernels.json")
    print("\n".join(lines(BenchmarkReport.load(parser.parse_args(argv).results))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
