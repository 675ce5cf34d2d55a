"""Speed-ups and rooflines of the kernel benchmarks as PNG files. Needs matplotlib."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from ggro_hf.report.benchmarks import (
    COLD,
    OURS,
    BenchmarkReport,
    BenchmarkRow,
    Ceiling,
    baseline_ratios,
    by_contest,
    microseconds,
    setting_name,
    times,
)

_DPI = 150
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C564B", "#333333", "#7B61C4", "#A0A000")
_MARKERS = {"float32": "o", "bfloat16": "s", "float16": "^"}
_OTHERS = "#9AA0A6"


def draw(report: BenchmarkReport, directory: Path) -> list[Path]:
    """Write `speedup-OP.png` for every op with a baseline, and one `roofline-N.png` for N threads, or "gpu".

    Raises:
        OSError: a file cannot be written.
    """
    files = []
    for op in dict.fromkeys(row.op for row in report.rows):
        contests = [contest for contest in by_contest(report.rows) if next(iter(contest.values())).op == op]
        if any(len(contest) > 1 for contest in contests):
            files.append(_save(_speedups(op, contests, report), directory / f"speedup-{op}.png"))
    for ceiling in report.ceilings:
        # What comes from a GPU's cache has another roof.
        rows = [row for row in report.rows if row.threads == ceiling.threads and row.mode in (None, COLD)]
        if rows:
            name = f"roofline-{ceiling.threads or 'gpu'}.png"
            files.append(_save(_roofline(rows, ceiling, report), directory / name))
    return files


def _speedups(op: str, contests: list[dict[str, BenchmarkRow]], report: BenchmarkReport) -> Figure:
    """A panel per number of threads or mode, a group of bars per case, a bar per baseline."""
    settings = list(dict.fromkeys(contest[OURS].setting for contest in contests))
    baselines = list(dict.fromkeys(name for contest in contests for name in baseline_ratios(contest)))
    cases = list(dict.fromkeys((contest[OURS].case, contest[OURS].dtype) for contest in contests))
    height = 0.8 / len(baselines)
    rows = len(cases) * max(len(baselines), 1.5)
    figure = Figure(figsize=(4 + 4 * len(settings), 1.9 + 0.24 * rows), layout="constrained")
    figure.suptitle(f"{op}: how many times faster than its baselines\n{_origin(report)}", fontsize=11)
    ratios = [ratio for contest in contests for ratio in baseline_ratios(contest).values()]
    panels = figure.subplots(1, len(settings), sharey=True, squeeze=False)[0]
    for panel, setting in zip(panels, settings, strict=True):
        for contest in (contest for contest in contests if contest[OURS].setting == setting):
            position = cases.index((contest[OURS].case, contest[OURS].dtype))
            for name, ratio in baseline_ratios(contest).items():
                index = baselines.index(name)
                y = position + (index - (len(baselines) - 1) / 2) * height
                # From 1, on a scale where twice as fast and half as fast are bars of one length.
                panel.barh(y, ratio - 1, 0.9 * height, left=1, color=_COLORS[index], label=name)
                panel.annotate(
                    times(ratio), (max(ratio, 1.0), y), (3, 0), textcoords="offset points", va="center", fontsize=8
                )
        panel.axvline(1, color="black", linewidth=1)
        _scale(panel, ratios)
        panel.set_title(setting_name(setting), fontsize=10)
        panel.set_xlabel("time of the baseline / time of ggro", fontsize=9)
        panel.tick_params(labelsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    ours = {(c[OURS].case, c[OURS].dtype, c[OURS].setting): microseconds(c[OURS].median_us) for c in contests}
    labels = [
        f"{case}, {dtype}\n" + " / ".join(ours.get((case, dtype, setting), "-") for setting in settings)
        for case, dtype in cases
    ]
    panels[0].set_yticks(range(len(cases)), labels)
    panels[0].set_ylim(len(cases) - 0.5, -0.5)
    handles = {
        label: handle for panel in panels for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    return figure


def _scale(panel: Axes, ratios: list[float]) -> None:
    """One logarithmic scale for all panels, with ticks at 1, 2, 5, 10 and so on; of a wide range, at powers of ten."""
    low, high = min(0.8, 0.8 * min(ratios)), 1.3 * max(*ratios, 2.0)
    # Room for the number beside the longest bar.
    high *= (high / low) ** 0.12
    panel.set_xscale("log")
    panel.set_xlim(low, high)
    panel.xaxis.set_major_locator(LogLocator(subs=(1.0,) if high / low > 300 else (1.0, 2.0, 5.0)))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))


def _roofline(rows: list[BenchmarkRow], ceiling: Ceiling, report: BenchmarkReport) -> Figure:
    """Arithmetic per byte against arithmetic per second, on both axes by powers of ten."""
    figure = Figure(figsize=(10, 6.2), layout="constrained")
    figure.suptitle(f"Roofline, {setting_name(ceiling.threads or COLD)}\n{_origin(report)}", fontsize=11)
    panel = figure.subplots()
    intensities = [row.flops / row.bytes for row in rows]
    low, high = min(intensities) / 3, max(*intensities, 1000.0) * 3
    for (dtype, peak), style in zip(ceiling.matmul_gflop_per_s.items(), ("-", "--", ":"), strict=False):
        ridge = peak / ceiling.gb_per_s
        panel.plot([ridge, high], [peak, peak], style, color="black", linewidth=1.2)
        panel.annotate(
            f"{dtype} matmul, {peak:.0f} GFLOP/s",
            (high, peak),
            (-4, 4),
            textcoords="offset points",
            ha="right",
            fontsize=8,
        )
    bandwidth = ceiling.gb_per_s
    ridge = max(ceiling.matmul_gflop_per_s.values()) / bandwidth
    slope = f"{'read' if ceiling.copy_gb_per_s is None else 'copy'} {bandwidth:.1f} GB/s"
    panel.plot([low, ridge], [low * bandwidth, ridge * bandwidth], "k", lw=1.2, label=slope)
    for index, op in enumerate(dict.fromkeys(row.op for row in rows)):
        for row in (row for row in rows if row.op == op):
            if row.gflop_per_s is None:
                continue
            mine = row.provider == OURS
            panel.plot(
                row.flops / row.bytes,
                row.gflop_per_s,
                _MARKERS.get(row.dtype, "D"),
                color=_COLORS[index % len(_COLORS)] if mine else _OTHERS,
                markerfacecolor=None if mine else "none",
                markersize=7 if mine else 4.5,
                alpha=1.0 if mine else 0.7,
                zorder=3 if mine else 2,
            )
        panel.plot([], [], "o", color=_COLORS[index % len(_COLORS)], label=op)
    for dtype in dict.fromkeys(row.dtype for row in rows):
        panel.plot([], [], _MARKERS.get(dtype, "D"), color="black", markerfacecolor="none", label=dtype)
    panel.plot([], [], "o", color=_OTHERS, markerfacecolor="none", markersize=4.5, label="baselines")
    panel.set(xscale="log", yscale="log", xlim=(low, high))
    panel.set_xlabel("operations per byte of least traffic")
    panel.set_ylabel("GFLOP/s")
    panel.grid(True, which="major", color="#E3E5E8", linewidth=0.7)
    panel.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", fontsize=9, frameon=False)
    return figure


def _origin(report: BenchmarkReport) -> str:
    machine, versions = report.machine, report.versions
    where = machine["gpu"] if "gpu" in machine else f"{machine['cpu']}, {machine['isa']}"
    return f"{where}, torch {versions['torch']}, commit {report.commit}"


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=_DPI)
    return path
