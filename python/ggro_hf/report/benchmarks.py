"""Results of the kernel benchmarks: the file they are kept in, and a table of them."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

OURS = "ggro"

COLD, WARM, GRAPH = MODES = ("cold L2", "warm L2", "graph")
"""How a call is timed on a GPU: its inputs not in the L2 cache, or left there by a call before; within a CUDA graph of
many calls, where launching costs nothing."""


@dataclass(frozen=True, slots=True)
class Ceiling:
    """What the machine did with plain torch, in the same run, on some number of threads or on its GPU."""

    threads: int | None
    """None on a GPU."""
    read_gb_per_s: float | None
    """`amax` of 256 MiB of fp32; None on a GPU."""
    matmul_gflop_per_s: dict[str, float]
    """A large matrix product, by dtype."""
    copy_gb_per_s: float | None = None
    """A GPU's copy of 512 MiB within its memory, bytes read and bytes written; None on a CPU."""

    @property
    def gb_per_s(self) -> float:
        """The bandwidth that results are compared with."""
        bandwidth = self.read_gb_per_s if self.copy_gb_per_s is None else self.copy_gb_per_s
        assert bandwidth is not None
        return bandwidth


@dataclass(frozen=True, slots=True)
class BenchmarkRow:
    """One provider on one case and number of threads, or mode on a GPU. Times are per call."""

    op: str
    case: str
    """The shape as text."""
    shape: dict[str, int]
    dtype: str
    threads: int | None
    """None on a GPU."""
    provider: str
    timings: int
    median_us: float
    p20_us: float
    p80_us: float
    ratio: float | None
    """Median over that of our kernel: above 1, ours is faster."""
    bytes: int
    """Least traffic of the op, whatever the provider moves."""
    flops: int
    gb_per_s: float | None
    """None for a provider that does a part of the work only, as are the next two."""
    bandwidth_percent: float | None
    """`gb_per_s` over the ceiling's; above 100 where the data fit a cache."""
    gflop_per_s: float | None
    peak_extra_bytes: int | None
    """Growth of the process, or of the GPU's memory in use, while the call runs, its result included; None where it was
    not measured."""
    part: bool
    """The provider does a part of the work only."""
    shown: bool
    """Part of README's table."""
    mode: str | None = None
    """On a GPU, one of `MODES`."""

    @property
    def setting(self) -> int | str:
        """The number of threads, or the mode on a GPU."""
        setting = self.threads if self.mode is None else self.mode
        assert setting is not None
        return setting

    def ceiling_us(self, ceiling: Ceiling) -> tuple[float, str]:
        """The time that the machine's ceilings allow, and which of them binds: "bandwidth" or "matmul"."""
        reading = self.bytes / (1e3 * ceiling.gb_per_s)
        # A kernel of 16-bit inputs may compute in fp32 where that is faster.
        rates = ceiling.matmul_gflop_per_s
        computing = self.flops / (1e3 * max(rates[name] for name in {self.dtype, "float32"} if name in rates))
        return max((reading, "bandwidth"), (computing, "matmul"))


@dataclass(frozen=True, slots=True)
class BenchmarkReport:
    """One run of the suite."""

    machine: dict[str, Any]
    """kind, cpu, cores, isa; of a GPU also gpu and what describes it."""
    versions: dict[str, str | None]
    commit: str
    ceilings: list[Ceiling]
    rows: list[BenchmarkRow]
    notes: list[str] = field(default_factory=list)
    """What was not measured, and why."""

    def ceiling(self, threads: int | None) -> Ceiling:
        """The ceiling on a number of threads; on a GPU, of None."""
        return next(ceiling for ceiling in self.ceilings if ceiling.threads == threads)

    def save(self, path: Path) -> None:
        """Write as JSON."""
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> "BenchmarkReport":
        """Read what `save` wrote.

        Raises:
            OSError: the file cannot be read.
            ValueError: it is not a results file.
        """
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            ceilings = [Ceiling(**ceiling) for ceiling in data.pop("ceilings")]
            rows = [BenchmarkRow(**row) for row in data.pop("rows")]
            return cls(**data, ceilings=ceilings, rows=rows)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not a results file of `python -m benchmarks` ({error})") from error


def by_contest(rows: Iterable[BenchmarkRow]) -> list[dict[str, BenchmarkRow]]:
    """The rows of every case and setting, by provider, in the order of the file."""
    contests: dict[tuple[str, str, str, int | str], dict[str, BenchmarkRow]] = {}
    for row in rows:
        contests.setdefault((row.op, row.case, row.dtype, row.setting), {})[row.provider] = row
    return list(contests.values())


def baseline_ratios(contest: Mapping[str, BenchmarkRow]) -> dict[str, float]:
    """How many times as long as our kernel each baseline takes; parts of the work count together, as one baseline."""
    ratios = {name: row.ratio for name, row in contest.items() if row.ratio is not None and not row.part}
    parts = [row.ratio for row in contest.values() if row.ratio is not None and row.part]
    return ratios | ({"sum of parts": sum(parts)} if parts else {})


def setting_name(setting: int | str) -> str:
    """`1 thread`, `2 threads`, or the mode."""
    return setting if isinstance(setting, str) else f"{setting} thread{'s' * (setting > 1)}"


def microseconds(value: float) -> str:
    """`51 us`, `2.46 ms`, `1.20 s`: three digits."""
    for unit, size in (("s", 1e6), ("ms", 1e3)):
        if value >= size:
            return f"{_three_digits(value / size)} {unit}"
    return f"{_three_digits(value)} us"


def times(ratio: float) -> str:
    """`0.97x`, `12.8x`, `656x`."""
    return f"{_three_digits(ratio)}x"


def share_of_ceiling(row: BenchmarkRow, ceiling: Ceiling) -> str:
    """`52 %` of the bandwidth, or `71 % (matmul)` where arithmetic binds."""
    floor, binding = row.ceiling_us(ceiling)
    return f"{100 * floor / row.median_us:.0f} %" + (" (matmul)" if binding == "matmul" else "")


def megabytes(size: int) -> str:
    """`0.4 MB`, `131 MB`."""
    return f"{size / 1e6:.{0 if size >= 1e7 else 1}f} MB"


def format_report(report: BenchmarkReport) -> str:
    """A table for the terminal, one block per op."""
    machine, versions = report.machine, report.versions
    where = f"{machine['cpu']}, {machine['cores']} cores, {machine['isa'] or 'no native kernels'}"
    if "gpu" in machine:
        where = f"{machine['gpu']}, {machine['gpu_gib']} GiB, {machine['l2_mib']:.0f} MiB of L2"
    used = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    lines = [f"{where}; {used}; commit {report.commit}", *(f"NOT MEASURED: {note}" for note in report.notes)]
    for ceiling in report.ceilings:
        rates = ", ".join(f"{name} {rate:.0f}" for name, rate in ceiling.matmul_gflop_per_s.items())
        bandwidth = f"{'read' if ceiling.copy_gb_per_s is None else 'copy'} {ceiling.gb_per_s:.1f} GB/s"
        on = "" if ceiling.threads is None else f", {ceiling.threads} thread(s)"
        lines.append(f"ceilings{on}: {bandwidth}; GFLOP/s {rates}")
    for op, contests in groupby(by_contest(report.rows), key=lambda contest: next(iter(contest.values())).op):
        lines += ["", op, *_op_table(report, list(contests))]
    return "\n".join(lines)


def _op_table(report: BenchmarkReport, contests: list[dict[str, BenchmarkRow]]) -> list[str]:
    baselines = list(dict.fromkeys(name for contest in contests for name in baseline_ratios(contest)))
    rows = [row for contest in contests for row in contest.values()]
    measured = list(dict.fromkeys(row.provider for row in rows if row.peak_extra_bytes is not None))
    setting = "threads" if all(row.mode is None for row in rows) else "timed"
    header = ["case", "dtype", setting, OURS, "p20 - p80", *baselines, "GB/s", "GFLOP/s", "of ceiling"]
    table = [header + ["extra memory: " + " / ".join(measured)] * bool(measured)]
    for contest in contests:
        row = contest[OURS]
        cells = [row.case, row.dtype, str(row.setting), microseconds(row.median_us)]
        cells.append(f"{microseconds(row.p20_us)} - {microseconds(row.p80_us)}")
        ratios = baseline_ratios(contest)
        cells += [times(ratios[name]) if name in ratios else "" for name in baselines]
        cells += [f"{row.gb_per_s:.1f}", f"{row.gflop_per_s:.1f}", share_of_ceiling(row, report.ceiling(row.threads))]
        peaks = [other.peak_extra_bytes for other in contest.values()]
        table.append([*cells, " / ".join(megabytes(peak) for peak in peaks if peak is not None)])
    widths = [max(len(line[column]) for line in table if column < len(line)) for column in range(len(header))]
    return ["  ".join(_aligned(line, [*widths, 0])).rstrip() for line in table]


def _aligned(line: list[str], widths: list[int]) -> list[str]:
    left = 2
    return [
        cell.ljust(width) if column < left else cell.rjust(width)
        for column, (cell, width) in enumerate(zip(line, widths, strict=False))
    ]


def _three_digits(value: float) -> str:
    return f"{value:.{0 if value >= 99.95 else 1 if value >= 9.995 else 2}f}"
