"""How often a reward model orders partial responses as it orders the finished ones, and as a judge does."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ggro_hf.evaluation.metrics import MeanInterval, mean_interval
from ggro_hf.pairs import PairRewards

Preferences = Mapping[tuple[int, int | None], int | None]
"""By row and length of a comparison: 1 where the chosen response's beginning is preferred, -1 where the other one's is,
0 for a tie, None for a verdict that could not be read."""


@dataclass(frozen=True, slots=True)
class AgreementRow:
    """Agreement rates at one length: means over pairs with 95 % intervals.

    The rates are those of the SP-PRM paper. Its h, a human's preference or a judge's, is known for some pairs, or none.
    """

    length: int | None
    """In tokens or words; None for the finished responses."""
    pairs: int
    preferences: int
    """Pairs with a preference."""
    unparsed: int
    """Pairs whose verdict could not be read."""
    rm_sc: MeanInterval
    """AR_RM-SC: share of pairs with r(chosen) > r(rejected). A tie disagrees."""
    reward_gap: MeanInterval
    """Mean of abs(r(chosen) - r(rejected))."""
    sc_hp: MeanInterval | None
    """AR_SC-HP: share of pairs with h(chosen) > h(rejected). A tie disagrees. None without preferences."""
    rm_hp: MeanInterval | None
    """AR_RM-HP: share of pairs that r and h order alike. A tie agrees with a tie alone. None without preferences."""


Curves = Mapping[str, Sequence[AgreementRow]]
"""Agreement by length of several reward models, by their labels."""


def agreement_by_length(rewards: Sequence[PairRewards], preferences: Preferences | None = None) -> list[AgreementRow]:
    """Agreement rates at every length that occurs, ascending, the finished responses last.

    A pair counts once at a length. `preferences` may hold other rows and lengths too.

    Raises:
        ValueError: no rewards; a row comes twice, has unequal numbers of lengths and rewards or one that is not finite;
            a preference is none of 1, 0, -1 and None, or all of them are for other rows and lengths.
    """
    gaps = _gaps_by_length(rewards)
    known = {} if preferences is None else preferences
    for (row, length), preference in known.items():
        if preference not in (1, 0, -1, None):
            raise ValueError(
                f"preferences: row {row}, length {length} is {preference!r}, but must be 1 (chosen is better), "
                "0 (tie), -1 (rejected is better) or None (unknown)"
            )
    if known and not any((row, length) in known for length, of_rows in gaps.items() for row in of_rows):
        raise ValueError(
            f"preferences has {len(known)} entries, but none for a row and length of the rewards; pass those of the "
            "same pairs and lengths, counted in the same unit"
        )
    lengths = sorted(gaps, key=lambda length: math.inf if length is None else length)
    return [_agreement(length, gaps[length], known) for length in lengths]


def agreement_records(curves: Curves) -> list[dict[str, Any]]:
    """The rows of every curve as plain JSON values, intervals as `[low, high]`."""
    return [
        {
            "model": label,
            "length": row.length,
            "pairs": row.pairs,
            "preferences": row.preferences,
            "unparsed": row.unparsed,
            **_interval_record("rm_sc", row.rm_sc),
            **_interval_record("sc_hp", row.sc_hp),
            **_interval_record("rm_hp", row.rm_hp),
            **_interval_record("reward_gap", row.reward_gap),
        }
        for label, rows in curves.items()
        for row in rows
    ]


def format_agreement(curves: Curves) -> str:
    """A text table: a line per length and model, rates in percent, 95 % intervals in brackets."""
    judged = any(row.preferences for rows in curves.values() for row in rows)
    header = ["length", "model", "pairs", "AR_RM-SC %"]
    header += ["judged", "unparsed", "AR_SC-HP %", "AR_RM-HP %"] if judged else []
    lines = [[*header, "reward gap"]]
    by_length = sorted(
        ((row, label) for label, rows in curves.items() for row in rows),
        key=lambda entry: math.inf if entry[0].length is None else entry[0].length,
    )
    for row, label in by_length:
        line = ["finished" if row.length is None else str(row.length), label, str(row.pairs), _percent(row.rm_sc)]
        if judged:
            line += [str(row.preferences), str(row.unparsed), _percent(row.sc_hp), _percent(row.rm_hp)]
        gap = row.reward_gap
        lines.append([*line, f"{gap.mean:.3g} [{gap.low:.3g}, {gap.high:.3g}]"])
    return _table(lines)


def _gaps_by_length(rewards: Sequence[PairRewards]) -> dict[int | None, dict[int, float]]:
    """By length and row: reward of the chosen response less that of the rejected one."""
    gaps: dict[int | None, dict[int, float]] = {}
    seen = set()
    for pair in rewards:
        if pair.row in seen:
            raise ValueError(f"rewards: row {pair.row} comes twice; pass the rewards of one model, each pair once")
        seen.add(pair.row)
        if not len(pair.lengths) == len(pair.chosen) == len(pair.rejected):
            raise ValueError(
                f"rewards: row {pair.row} has {len(pair.lengths)} lengths, {len(pair.chosen)} rewards of the chosen "
                f"and {len(pair.rejected)} of the rejected response, but needs one of each for a length"
            )
        for length, chosen, rejected in zip(pair.lengths, pair.chosen, pair.rejected, strict=True):
            if not (math.isfinite(chosen) and math.isfinite(rejected)):
                raise ValueError(
                    f"rewards: row {pair.row}, length {length} has the rewards {chosen} and {rejected}, but both must "
                    "be finite; score that pair again"
                )
            gaps.setdefault(length, {})[pair.row] = chosen - rejected
    if not gaps:
        raise ValueError("rewards holds no comparison; pass those of at least one pair with a length")
    return gaps


def _agreement(length: int | None, gaps: Mapping[int, float], preferences: Preferences) -> AgreementRow:
    verdicts = {row: preferences[row, length] for row in gaps if (row, length) in preferences}
    judged = {row: verdict for row, verdict in verdicts.items() if verdict is not None}
    return AgreementRow(
        length,
        pairs=len(gaps),
        preferences=len(judged),
        unparsed=len(verdicts) - len(judged),
        rm_sc=_mean(float(gap > 0) for gap in gaps.values()),
        reward_gap=_mean(map(abs, gaps.values())),
        sc_hp=mean_interval(float(verdict > 0) for verdict in judged.values()),
        rm_hp=mean_interval(float(_sign(gaps[row]) == verdict) for row, verdict in judged.items()),
    )


def _mean(values: Iterable[float]) -> MeanInterval:
    interval = mean_interval(values)
    assert interval is not None
    return interval


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)


def _interval_record(name: str, interval: MeanInterval | None) -> dict[str, Any]:
    return {f"{name}_mean": interval and interval.mean, f"{name}_ci95": interval and [interval.low, interval.high]}


def _percent(interval: MeanInterval | None) -> str:
    if interval is None:
        return "-"
    return f"{100 * interval.mean:.1f} [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"


def _table(lines: Sequence[Sequence[str]]) -> str:
    """Columns of equal width; all but the second, the names, set to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column == 1 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
