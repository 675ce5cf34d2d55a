"""Agreement rates of reward models as PNG files, after Figures 1, 2 and 5 of the SP-PRM paper. Needs matplotlib."""

from collections.abc import Callable, Sequence
from pathlib import Path

from ggro_hf.evaluation.agreement import AgreementRow, Curves
from ggro_hf.evaluation.metrics import MeanInterval

try:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator
except ImportError as error:
    raise ImportError(f"plots need matplotlib ({error}); pip install 'ggro-kernels[train]'") from error

_DPI = 150
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C564B", "#333333", "#7B61C4", "#A0A000")
_PANELS_BESIDE = 3
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")

_SHARE = "agreement of pairs"

_Interval = Callable[[AgreementRow], MeanInterval | None]

_RATES: dict[str, _Interval] = {
    "AR_RM-SC": lambda row: row.rm_sc,
    "AR_SC-HP": lambda row: row.sc_hp,
    "AR_RM-HP": lambda row: row.rm_hp,
}


def draw_agreement(curves: Curves, directory: Path, *, unit: str = "token") -> list[Path]:
    """Write `agreement.png`, `reward-gap.png` and, of several models, `consistency.png`; bands are 95 % intervals.

    `agreement.png` has a panel per model with its rates by length (Figure 1); `reward-gap.png` the reward gap of all
    models (Figure 2); `consistency.png` AR_RM-SC of all models, such as before and after training (Figure 5). Finished
    responses are apart, on the right.

    Args:
        curves: agreement by length of each model, by its label.
        directory: where the files go; it must exist.
        unit: what lengths are counted in.

    Raises:
        ValueError: there is no model, or one has no rows.
        OSError: a file cannot be written.
    """
    if not curves:
        raise ValueError("curves is empty; pass the agreement of at least one model")
    for label, rows in curves.items():
        if not rows:
            raise ValueError(f"curves: {label!r} has no rows; pass those of agreement_by_length")
    figures = {"agreement": _rates(curves, unit), "reward-gap": _gaps(curves, unit)}
    if len(curves) > 1:
        figures["consistency"] = _consistency(curves, unit)
    return [_save(figure, directory / f"{name}.png") for name, figure in figures.items()]


def _rates(curves: Curves, unit: str) -> Figure:
    columns = min(len(curves), _PANELS_BESIDE)
    rows = -(-len(curves) // columns)
    figure = Figure(figsize=(2.2 + 4.2 * columns, 0.8 + 3.6 * rows), layout="constrained")
    figure.suptitle("Agreement of rewards (RM), score consistency (SC) and preferences (HP)", fontsize=11)
    panels = list(figure.subplots(rows, columns, sharey=True, squeeze=False).flat)
    used, unused = panels[: len(curves)], panels[len(curves) :]
    for panel in unused:
        panel.remove()
    for panel, (label, own) in zip(used, curves.items(), strict=True):
        for index, (name, interval) in enumerate(_RATES.items()):
            _curve(panel, own, interval, _end(curves), index, name)
        panel.set_title(label, fontsize=10)
        _rate_axis(panel)
        _length_axis(panel, curves, unit)
    for panel in used[::columns]:
        panel.set_ylabel(_SHARE, fontsize=9)
    _legend(figure, used)
    return figure


def _gaps(curves: Curves, unit: str) -> Figure:
    title = "Mean distance of the rewards of chosen and rejected beginnings"
    figure, panel = _models(curves, unit, title, lambda row: row.reward_gap)
    panel.set_ylim(bottom=0)
    panel.set_ylabel("reward gap", fontsize=9)
    return figure


def _consistency(curves: Curves, unit: str) -> Figure:
    title = "Score consistency: the chosen beginning has the higher reward (AR_RM-SC)"
    figure, panel = _models(curves, unit, title, lambda row: row.rm_sc)
    panel.set_ylabel(_SHARE, fontsize=9)
    _rate_axis(panel)
    return figure


def _models(curves: Curves, unit: str, title: str, interval: _Interval) -> tuple[Figure, Axes]:
    """One panel with a curve per model."""
    figure = Figure(figsize=(6.8, 4.6), layout="constrained")
    figure.suptitle(title, fontsize=11)
    panel = figure.subplots()
    for index, (label, rows) in enumerate(curves.items()):
        _curve(panel, rows, interval, _end(curves), index, label)
    _length_axis(panel, curves, unit)
    _legend(figure, [panel])
    return figure, panel


def _curve(panel: Axes, rows: Sequence[AgreementRow], interval: _Interval, end: float, index: int, name: str) -> None:
    """A line with its band over the lengths, and a point with its interval for the finished responses at `end`."""
    color, marker = _COLORS[index % len(_COLORS)], _MARKERS[index % len(_MARKERS)]
    known = [(row.length, value) for row in rows if (value := interval(row)) is not None]
    partial = [(length, value) for length, value in known if length is not None]
    if partial:
        lengths = [length for length, _ in partial]
        low, high = [value.low for _, value in partial], [value.high for _, value in partial]
        panel.plot(
            lengths,
            [value.mean for _, value in partial],
            color=color,
            marker=marker,
            # Of many lengths the line alone is easier to read.
            markersize=3.5 if len(lengths) <= 30 else 0,
            lw=1.4,
            label=name,
        )
        panel.fill_between(lengths, low, high, color=color, alpha=0.15, linewidth=0)
    for value in (value for length, value in known if length is None):
        # Points of several curves beside each other, not on each other.
        at = end * (1 + 0.012 * index)
        error = [[max(0.0, value.mean - value.low)], [max(0.0, value.high - value.mean)]]
        label = None if partial else name
        panel.errorbar(
            at,
            value.mean,
            yerr=error,
            color=color,
            marker=marker,
            markersize=5,
            capsize=3,
            lw=1.2,
            ls="none",
            label=label,
        )


def _lengths(curves: Curves) -> list[int]:
    return sorted({row.length for rows in curves.values() for row in rows if row.length is not None})


def _end(curves: Curves) -> float:
    """Where on the axis the finished responses are: behind all lengths."""
    return 1.15 * max(_lengths(curves), default=1)


def _length_axis(panel: Axes, curves: Curves, unit: str) -> None:
    lengths, end = _lengths(curves), _end(curves)
    longest = lengths[-1] if lengths else 0
    ticks = MaxNLocator(8, integer=True, steps=[1, 2, 5, 10]).tick_values(0, longest)
    ticks = [tick for tick in ticks if 0 < tick <= longest]
    if any(row.length is None for rows in curves.values() for row in rows):
        ticks.append(end)
        if lengths:
            panel.axvline((longest + end) / 2, color="#9AA0A6", linewidth=0.8, linestyle=":")
    panel.set_xlim(left=0)
    panel.xaxis.set_major_locator(FixedLocator(ticks))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: "finished" if value == end else f"{value:g}"))
    panel.set_xlabel(f"length of the responses' beginnings [{unit}s]", fontsize=9)
    panel.tick_params(labelsize=8)
    panel.grid(True, axis="y", color="#E3E5E8", linewidth=0.7)
    panel.spines[["top", "right"]].set_visible(False)


def _rate_axis(panel: Axes) -> None:
    panel.axhline(0.5, color="black", linewidth=0.8, linestyle="--")
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))


def _legend(figure: Figure, panels: Sequence[Axes]) -> None:
    """One legend for all panels."""
    handles = {
        label: handle for panel in panels for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, fontsize=9, frameon=False)


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=_DPI)
    return path
