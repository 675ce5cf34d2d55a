"""README's table of the kernels, from the committed results: `python -m benchmarks.readme`."""

import sys
from pathlib import Path

from benchmarks.session import ROOT
from ggro_hf.report.benchmarks import (
    COLD,
    GRAPH,
    OURS,
    BenchmarkReport,
    BenchmarkRow,
    baseline_ratios,
    by_contest,
    microseconds,
    setting_name,
    share_of_ceiling,
    times,
)

BEGIN, END = "<!-- kernels: written by `make readme-table` -->", "<!-- kernels: end -->"


def with_table(readme: str, reports: list[BenchmarkReport]) -> str:
    """The text with what is between the markers written anew.

    Raises:
        ValueError: the markers are not there, once each and in order.
    """
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md must have the lines {BEGIN!r} and {END!r}, in this order; put them back")
    return before + begin + "\n" + "\n".join(map(markdown, reports)) + end + after


def markdown(report: BenchmarkReport) -> str:
    """One machine's table: the cases that the registry marks as shown, the numbers of threads or modes side by side."""
    machine, versions = report.machine, report.versions
    settings: list[int | str]
    if "gpu" in machine:
        settings, where = [COLD, GRAPH], f"{machine['gpu']} ({machine['kind']})"
        measured = f"a copy within its memory moves {report.ceiling(None).gb_per_s:.0f} GB/s"
        used = f"torch {versions['torch']}, triton {versions['triton']}"
    else:
        settings = [ceiling.threads for ceiling in report.ceilings if ceiling.threads is not None]
        where, used = f"{machine['cpu']} ({machine['kind']}, {machine['isa']})", f"torch {versions['torch']}"
        read = " and ".join(f"{ceiling.gb_per_s:.1f}" for ceiling in report.ceilings)
        measured = f"`amax` of 256 MiB reads {read} GB/s on {' and '.join(map(setting_name, settings))}"
    lines = [
        f"{where}, {used}, commit {report.commit}; {measured}.",
        "",
        "| op | case | dtype | "
        + " | ".join(f"{setting_name(setting)} | faster than | of ceiling" for setting in settings)
        + " |",
        "|---" * (3 + 3 * len(settings)) + "|",
    ]
    cases: dict[tuple[str, str, str], dict[int | str, dict[str, BenchmarkRow]]] = {}
    for contest in by_contest(row for row in report.rows if row.shown):
        row = contest[OURS]
        cases.setdefault((row.op, row.case, row.dtype), {})[row.setting] = contest
    last_op = ""
    for (op, case, dtype), contests in cases.items():
        cells = [f"`{op}`" if op != last_op else "", case, dtype]
        for setting in settings:
            cells += _cells(contests[setting], report) if setting in contests else [""] * 3
        lines.append("| " + " | ".join(cells) + " |")
        last_op = op
    return "\n".join(lines) + "\n"


def _cells(contest: dict[str, BenchmarkRow], report: BenchmarkReport) -> list[str]:
    row = contest[OURS]
    others = [f"{name} {times(ratio)}" for name, ratio in baseline_ratios(contest).items()]
    return [microseconds(row.median_us), ", ".join(others), share_of_ceiling(row, report.ceiling(row.threads))]


def committed_reports() -> list[BenchmarkReport]:
    """The results in benchmarks/results, by machine."""
    return [BenchmarkReport.load(path) for path in sorted(Path(ROOT, "benchmarks", "results").glob("*/kernels.json"))]


def main() -> int:
    """Rewrite README.md."""
    path = ROOT / "README.md"
    path.write_text(with_table(path.read_text(encoding="utf-8"), committed_reports()), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
