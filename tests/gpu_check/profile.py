"""The step that says how fast our kernels move memory on the headline shapes."""

import csv
import json
import sys
import time
from itertools import groupby
from pathlib import Path
from typing import Any

from tests.gpu_check.check import CUT, FAILED, LEFT_OUT, NOTHING_TO_DO, PASSED, Check, Result

METRICS = {
    "microseconds": "gpu__time_duration.sum",
    "read": "dram__bytes_read.sum",
    "written": "dram__bytes_write.sum",
    "dram_percent": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "registers": "launch__registers_per_thread",
    "occupancy_percent": "sm__warps_active.avg.pct_of_peak_sustained_active",
}
HEADLINES = [sys.executable, "-m", "tests.gpu_check.headlines"]

# A machine that forbids the counters says so at once.
NCU_SHARE = 0.6

Kernel = dict[str, Any]
"""case, kernel, microseconds, bytes, dram_percent, registers, occupancy_percent; None where nobody knows."""


def profile(check: Check, seconds: float) -> Result:
    """Counted by ncu; where it may not, times of torch's profiler and the bytes that the shapes need."""
    check.forget("counters.csv", "kernels.profile.json", "kernels.profile.csv")
    end = time.monotonic() + seconds
    kernels, obstacle = by_ncu(check, NCU_SHARE * seconds)
    if obstacle is None:
        keep(kernels, check.folder)
        return Result("profile", PASSED, "counted by ncu", details=summary(kernels))
    output = check.folder / "kernels.profile.json"
    code = check.run("profile", [*HEADLINES, "--timed", str(output)], end - time.monotonic())
    if code == 0:
        kernels = json.loads(output.read_text(encoding="utf-8"))
        keep(kernels, check.folder)
        note = f"no counters: {obstacle}; times by torch's profiler, bytes as the shapes need them"
        return Result("profile", LEFT_OUT, note, details=summary(kernels))
    status = {None: CUT, NOTHING_TO_DO: LEFT_OUT}.get(code, FAILED)
    return Result("profile", status, f"no counters: {obstacle}; no times either: see profile.log")


def by_ncu(check: Check, seconds: float) -> tuple[list[Kernel], str | None]:
    """What ncu counted, or why it could not."""
    program = check.tool("ncu")
    if program is None:
        return [], "ncu not found: it comes with the CUDA toolkit"
    table = check.folder / "counters.csv"
    command = [program, "--profile-from-start", "off", "--nvtx", "--csv", "--page", "raw", "--print-units", "base"]
    # The clocks are left as they are, as they are for the benchmarks.
    command += ["--clock-control", "none", "--metrics", ",".join(METRICS.values()), "--log-file", str(table)]
    code = check.run("profile", [*command, *HEADLINES], seconds)
    text = table.read_text(encoding="utf-8", errors="replace") if table.exists() else ""
    errors = [line for line in f"{text}\n{check.log('profile')}".splitlines() if line.startswith("==ERROR==")]
    if errors:
        return [], errors[0].removeprefix("==ERROR==").strip()
    if code != 0:
        return [], "ncu ran out of time" if code is None else f"ncu: exit code {code}"
    kernels = counted(text)
    return kernels, None if kernels else "ncu saw no kernel"


def counted(text: str) -> list[Kernel]:
    """The kernels of ncu's table: a header, the units, then a row for each."""
    lines = text.splitlines()
    start = next((index for index, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    kernels = []
    for row in list(csv.DictReader(lines[start:]))[1:]:
        value = {name: number(row.get(metric)) for name, metric in METRICS.items()}
        moved = [value[name] for name in ("read", "written") if value[name] is not None]
        nanoseconds = value["microseconds"]
        kernels.append(
            {
                "case": range_of(row),
                "kernel": row["Kernel Name"],
                "microseconds": None if nanoseconds is None else nanoseconds / 1e3,
                "bytes": sum(moved) if moved else None,
                **{name: value[name] for name in ("dram_percent", "registers", "occupancy_percent")},
            }
        )
    return kernels


def number(cell: str | None) -> float | None:
    """Of "1,234.5"; None of "n/a"."""
    try:
        return float((cell or "").replace(",", ""))
    except ValueError:
        return None


def range_of(row: dict[str, str]) -> str:
    """The name in `17  "<default domain>:entropy_topk[...]:none:none:..."`; a case has no colon in its name."""
    cells = [cell for name, cell in row.items() if name and "Push/Pop_Range" in name and cell]
    return cells[0].partition("domain>:")[2].partition(":")[0] if cells else ""


def keep(kernels: list[Kernel], folder: Path) -> None:
    """As JSON and CSV."""
    (folder / "kernels.profile.json").write_text(json.dumps(kernels, indent=1) + "\n", encoding="utf-8")
    with (folder / "kernels.profile.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(kernels[0]) if kernels else ["case"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(kernels)


def summary(kernels: list[Kernel]) -> tuple[str, ...]:
    """A line for every case, then one for each of its kernels."""
    lines = []
    for case, group in groupby(kernels, key=lambda kernel: kernel["case"]):
        members = list(group)
        microseconds = sum(kernel["microseconds"] or 0.0 for kernel in members)
        moved = sum(kernel["bytes"] or 0 for kernel in members)
        rate = f", {1e-3 * moved / microseconds:.0f} GB/s" if microseconds else ""
        lines.append(f"{case}: {microseconds:.1f} us, {1e-6 * moved:.1f} MB{rate}")
        for kernel in members:
            parts = [
                f"{kernel['microseconds']:.1f} us" if kernel["microseconds"] is not None else "",
                f"{kernel['dram_percent']:.0f} % of DRAM" if kernel["dram_percent"] is not None else "",
                f"{kernel['registers']:.0f} registers" if kernel["registers"] is not None else "",
                f"occupancy {kernel['occupancy_percent']:.0f} %" if kernel["occupancy_percent"] is not None else "",
            ]
            lines.append(f"  {short(kernel['kernel'])}: {', '.join(filter(None, parts))}")
    return tuple(lines)


def short(kernel: str) -> str:
    """A name without what all of ours have, in at most 90 characters."""
    return kernel.removeprefix("void ").replace("ggro::cuda::", "").replace("(anonymous namespace)::", "")[:90]
