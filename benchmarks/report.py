"""From timings to the report: medians, ratios, bandwidths, and what they were measured with."""

import csv
import os
import platform
import re
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy

from benchmarks import ceilings
from benchmarks.gpu.session import NO_TIME, GpuSession
from benchmarks.registry import OURS, Case, dtype_name, load_cases
from benchmarks.session import ROOT, Session, SessionError, Timings
from ggro_hf.report.benchmarks import COLD, MODES, BenchmarkReport, BenchmarkRow, Ceiling

# AMD's families and models, as far as a result has been kept or is likely to be.
_ZEN = ((26, 0x00, 0xFF, "zen5"), (25, 0x10, 0x1F, "zen4"), (25, 0x60, 0x7F, "zen4"), (25, 0xA0, 0xAF, "zen4"))

Rates = dict[tuple[str, str], tuple[float, float]]
"""Bytes and operations per second, by op and dtype."""

Peaks = Mapping[tuple[str, str], int]
"""Extra bytes, by the case's name and provider."""


def build_report(session: Session, peaks: Peaks) -> BenchmarkReport:
    """The report of a session."""
    timings = session.timings
    limits = [measured_ceiling(timings, threads) for threads in sorted({threads for _, threads, _ in timings})]
    rows = []
    for case in load_cases():
        for ceiling in limits:
            rows += case_rows(case, ceiling, timings, peaks)
    return _report(session.capabilities, {"kind": machine_kind()}, limits, rows, [])


def build_gpu_report(session: GpuSession) -> BenchmarkReport:
    """The report of a session on a GPU.

    Raises:
        SessionError: the ceilings were not measured, without which the rest says little.
    """
    timings: Timings = {}
    peaks: dict[tuple[str, str], int] = {}
    notes = []
    for case, measured in session.measured.items():
        timings |= {(case, mode, provider): seconds for (mode, provider), seconds in measured.timings.items()}
        peaks |= {(case, provider): size for provider, size in measured.extra_bytes.items()}
        notes += [f"{case}, {who}: {reason}" for who, reason in measured.failures.items()]
    notes += [f"{case}: {NO_TIME}" for case in session.left_out]
    missing = [case.name for case in ceilings.GPU_CASES if (case.name, COLD, "torch") not in timings]
    if missing:
        raise SessionError(f"{missing[0]} was not measured, which the others are compared with: {'; '.join(notes)}")
    limit = measured_gpu_ceiling(timings)
    rows = []
    for case in load_cases(gpu=True):
        for mode in MODES:
            # Memory is the same in every mode.
            rows += case_rows(case, limit, timings, peaks if mode == COLD else {}, mode)
    ops = session.capabilities["ops"].items()
    by_cuda = [op.partition("::")[2] for op, devices in ops if devices.get("cuda") == "native"]
    machine = {"kind": gpu_kind(session.machine["gpu"]), **session.machine, "cuda_kernels": " ".join(by_cuda)}
    return _report(session.capabilities, machine, [limit], rows, notes)


def _report(
    capabilities: dict[str, Any],
    machine: dict[str, Any],
    limits: list[Ceiling],
    rows: list[BenchmarkRow],
    notes: list[str],
) -> BenchmarkReport:
    processor = {
        "cpu": cpu_info().get("model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "isa": capabilities["native"]["isa"],
    }
    return BenchmarkReport(
        machine={"kind": machine["kind"], **processor, **machine},
        versions={
            "ggro": capabilities["versions"]["ggro_kernels"],
            "torch": capabilities["versions"]["torch"],
            "triton": installed("triton"),
            "python": capabilities["versions"]["python"],
        },
        commit=commit(),
        ceilings=limits,
        rows=rows,
        notes=notes,
    )


def measured_ceiling(timings: Timings, threads: int) -> Ceiling:
    """What benchmarks/ceilings.py measured on a number of threads."""
    rates = _rates(ceilings.CASES, timings, threads)
    return Ceiling(
        threads=threads,
        read_gb_per_s=rates[ceilings.READ, "float32"][0] / 1e9,
        matmul_gflop_per_s=_matmul_rates(rates),
    )


def measured_gpu_ceiling(timings: Timings) -> Ceiling:
    """What benchmarks/ceilings.py measured on a GPU."""
    rates = _rates(ceilings.GPU_CASES, timings, COLD)
    return Ceiling(
        threads=None,
        read_gb_per_s=None,
        matmul_gflop_per_s=_matmul_rates(rates),
        copy_gb_per_s=rates[ceilings.COPY, "bfloat16"][0] / 1e9,
    )


def _rates(cases: list[Case], timings: Timings, setting: int | str) -> Rates:
    rates = {}
    for case in cases:
        seconds = float(numpy.median(timings[case.name, setting, "torch"]))
        rates[case.op, dtype_name(case.dtype)] = (case.bytes / seconds, case.flops / seconds)
    return rates


def _matmul_rates(rates: Rates) -> dict[str, float]:
    return {name: flops / 1e9 for (op, name), (_, flops) in rates.items() if op == ceilings.MATMUL}


def case_rows(
    case: Case, ceiling: Ceiling, timings: Timings, peaks: Peaks, mode: str | None = None
) -> list[BenchmarkRow]:
    """The rows of one case on one number of threads, or in one mode on a GPU, ours first."""
    rows = []
    setting = ceiling.threads if mode is None else mode
    assert setting is not None
    ours = timings.get((case.name, setting, OURS))
    for provider in case.available_providers():
        seconds = timings.get((case.name, setting, provider.name))
        if not ours or not seconds:
            continue
        p20, median, p80 = numpy.percentile(seconds, [20, 50, 80])
        gb_per_s = case.bytes / median / 1e9
        row = BenchmarkRow(
            op=case.op,
            case=case.label,
            shape=dict(case.shape),
            dtype=dtype_name(case.dtype),
            threads=ceiling.threads,
            provider=provider.name,
            timings=len(seconds),
            median_us=_rounded(1e6 * median),
            p20_us=_rounded(1e6 * p20),
            p80_us=_rounded(1e6 * p80),
            ratio=None if provider.name == OURS else _rounded(median / numpy.median(ours)),
            bytes=case.bytes,
            flops=case.flops,
            gb_per_s=None if provider.part else _rounded(gb_per_s),
            bandwidth_percent=None if provider.part else _rounded(100 * gb_per_s / ceiling.gb_per_s),
            gflop_per_s=None if provider.part else _rounded(case.flops / median / 1e9),
            peak_extra_bytes=peaks.get((case.name, provider.name)),
            part=provider.part,
            shown=case.shown,
            mode=mode,
        )
        rows.append(row)
    return rows


def write(report: BenchmarkReport, directory: Path) -> None:
    """`kernels.json` and `kernels.csv`, a row per case, number of threads or mode, and provider."""
    directory.mkdir(parents=True, exist_ok=True)
    report.save(directory / "kernels.json")
    columns = [name for name in BenchmarkRow.__dataclass_fields__ if name not in ("part", "shown")]
    origin = {**report.machine, **report.versions, "commit": report.commit}
    with (directory / "kernels.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*columns, *origin])
        for row in report.rows:
            cells = {name: getattr(row, name) for name in columns}
            cells["shape"] = " ".join(f"{name}={size}" for name, size in row.shape.items())
            writer.writerow([*cells.values(), *origin.values()])


def machine_kind() -> str:
    """A name for machines whose results may be compared, such as cpu-zen4."""
    info = cpu_info()
    family, model = int(info.get("cpu family", 0)), int(info.get("model", 0))
    if info.get("vendor_id") == "AuthenticAMD":
        for zen_family, first, last, name in _ZEN:
            if family == zen_family and first <= model <= last:
                return f"cpu-{name}"
    vendor = {"AuthenticAMD": "amd", "GenuineIntel": "intel"}.get(info.get("vendor_id", ""), platform.machine())
    return f"cpu-{vendor}-{family}-{model}" if family else f"cpu-{vendor}"


def gpu_kind(name: str) -> str:
    """The same for a GPU, such as nvidia-h100-80gb-hbm3, of the name that torch gives it."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def cpu_info() -> dict[str, str]:
    """The first processor of /proc/cpuinfo; empty where there is none."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def commit() -> str:
    """The commit measured, with "+" where the sources differ from it; "unknown" outside a repository."""
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        return head + "+" * bool(_git("status", "--porcelain", "--untracked-files=no", "--", "csrc", "ggro_kernels"))
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def installed(package: str) -> str | None:
    """The version of a package, None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git(*arguments: str) -> str:
    result: Any = subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True)
    return result.stdout.strip()


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")
