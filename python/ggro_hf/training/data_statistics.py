"""What became of a preference data set: rows, what was left out and why, comparisons, lengths."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ggro_hf.pairs import PartialPair
from ggro_hf.training.partial import PartialRecipe, response_lengths
from ggro_hf.training.preferences import Selection
from ggro_hf.training.units import Unit

NO_COMPARISON = "no length to compare at"

_ROWS_SHOWN = 5


def statistics(
    selection: Selection, recipe: PartialRecipe, partials: Sequence[PartialPair], unit: Unit
) -> dict[str, Any]:
    """Counts of a data set as plain JSON values; `partials` are what `make_partial` made of the selection.

    `dropped` holds the numbers of the rows under each reason, `not_taken` how many the recipe's fraction and limit left
    out; `comparisons_per_pair`, `chosen_length` and `rejected_length` (in `unit`) hold minimum, median, mean, 95th
    percentile and maximum over the kept pairs.
    """
    taken = {pair.row for pair in recipe.take(selection.pairs)}
    kept = {partial.pair.row for partial in partials}
    dropped = {reason: sorted(rows) for reason, rows in selection.dropped.items()}
    if without := sorted(taken - kept):
        dropped[NO_COMPARISON] = without
    pairs = [partial.pair for partial in partials]
    return {
        "rows": selection.rows,
        "kept": len(partials),
        "cut": len(selection.cut & kept),
        "not_taken": len(selection.pairs) - len(taken),
        "dropped": dropped,
        "unit": unit.name,
        "comparisons": sum(len(partial.lengths) for partial in partials),
        "finished_comparisons": sum(partial.lengths.count(None) for partial in partials),
        "comparisons_per_pair": _spread([len(partial.lengths) for partial in partials]),
        "chosen_length": _spread(response_lengths(unit, [pair.chosen for pair in pairs])),
        "rejected_length": _spread(response_lengths(unit, [pair.rejected for pair in pairs])),
    }


def format_statistics(counts: dict[str, Any]) -> str:
    """What `statistics` gives, as a text for people."""
    plural = f"{counts['unit']}s"
    lines = [
        ("rows read", f"{counts['rows']}"),
        ("pairs kept", f"{counts['kept']}" + (f", {counts['cut']} of them cut" if counts["cut"] else "")),
        *((f"  left out: {reason}", _rows(rows)) for reason, rows in counts["dropped"].items()),
        *([("  left out by fraction or limit", f"{counts['not_taken']}")] if counts["not_taken"] else []),
        ("comparisons", f"{counts['comparisons']}, {counts['finished_comparisons']} of finished responses"),
    ]
    width = max(len(name) for name, _ in lines)
    spreads = {
        "comparisons per pair": counts["comparisons_per_pair"],
        f"chosen responses, {plural}": counts["chosen_length"],
        f"rejected responses, {plural}": counts["rejected_length"],
    }
    table = [["", "min", "median", "mean", "p95", "max"]]
    table += [[name, *(f"{value:.1f}".removesuffix(".0") for value in own.values())] for name, own in spreads.items()]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join(
        [
            *(f"{name.ljust(width)}  {value}" for name, value in lines),
            "",
            *("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in table),
        ]
    )


def _rows(rows: list[int]) -> str:
    shown = ", ".join(map(str, rows[:_ROWS_SHOWN]))
    return f"{len(rows)} (row {shown}{', ...' if len(rows) > _ROWS_SHOWN else ''})"


def _spread(values: Sequence[int]) -> dict[str, float]:
    if not values:
        return dict.fromkeys(("min", "median", "mean", "p95", "max"), 0.0)
    return {
        "min": float(min(values)),
        "median": float(np.median(values)),
        "mean": float(np.mean(values)),
        "p95": float(np.percentile(values, 95)),
        "max": float(max(values)),
    }
