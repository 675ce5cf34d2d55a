"""Rewards of partial responses, computed once and kept by row in a file that survives a kill."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ggro_hf.jsonl import OtherSettingsError, RowFile, RowFileError, RowOwner, read_rows
from ggro_hf.pairs import PairRewards, PartialPair
from ggro_hf.training.scoring import PrefixScorer


def score_to_file(
    make_scorer: Callable[[], PrefixScorer],
    partials: Sequence[PartialPair],
    path: str | Path,
    settings: dict[str, Any],
    *,
    step: str,
    chunk: int = 32,
) -> dict[int, PairRewards]:
    """Rewards of all partial responses by row, scored once and kept in a JSON-lines file.

    What the file holds is not computed again, and a killed run that is repeated ends with the same rewards: pairs are
    scored in slices of `chunk`, which are the same in every run.

    Args:
        make_scorer: called where something is left to score.
        settings: what the rewards depend on, kept with each: "data", the fingerprint of the partial pairs, and what
            names the model.
        step: of `ggro prm`, for messages and the progress bar.

    Raises:
        RowFileError: the file is another data set's or another model's, is damaged, or in use.
        OSError: the file cannot be read or written, as on a full disk; a later run continues.
        ValueError: a pair exceeds the model's context, has a reward that is no number, or a row twice.
    """
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}, but must be at least 1")
    settings = json.loads(json.dumps(settings))
    by_row = _by_row(partials)
    try:
        file = RowFile(path, settings, _owner(step))
    except OtherSettingsError as error:
        raise _explained(error, path, step) from None
    with file:
        rewards = {row: _rewards_in(path, file.rows[row], by_row[row]) for row in by_row if row in file.rows}
        scorer = None
        with tqdm(total=len(partials), initial=len(rewards), unit="pair", desc=step) as bar:
            for start in range(0, len(partials), chunk):
                part = partials[start : start + chunk]
                if all(partial.pair.row in rewards for partial in part):
                    continue
                scorer = scorer or make_scorer()
                new = {scored.row: scored for scored in scorer.score(part) if scored.row not in rewards}
                file.extend((row, _record(scored)) for row, scored in new.items())
                rewards |= new
                bar.update(len(new))
    return {row: rewards[row] for row in by_row}


def read_scores(
    path: str | Path, partials: Sequence[PartialPair], settings: dict[str, Any], *, step: str
) -> dict[int, PairRewards]:
    """What `score_to_file` has written with these settings; processes may read at a time.

    Raises RowFileError as it does, and where pairs are missing; OSError where the file cannot be read.
    """
    by_row = _by_row(partials)
    try:
        rows = read_rows(path, json.loads(json.dumps(settings)), _owner(step))
    except OtherSettingsError as error:
        raise _explained(error, path, step) from None
    missing = [row for row in by_row if row not in rows]
    if missing:
        raise RowFileError(
            f"{path} has rewards of {len(by_row) - len(missing)} of {len(by_row)} pairs, row {missing[0]} is the first "
            f"without; repeat `ggro prm {step}`, which continues"
        )
    return {row: _rewards_in(path, rows[row], partial) for row, partial in by_row.items()}


def _owner(step: str) -> RowOwner:
    return RowOwner(f"`ggro prm {step}`", "choose another file for the rewards")


def _by_row(partials: Sequence[PartialPair]) -> dict[int, PartialPair]:
    by_row: dict[int, PartialPair] = {}
    for partial in partials:
        row = partial.pair.row
        if row in by_row:
            raise ValueError(f"row {row} occurs twice in the data, but rewards are kept by row; number the rows anew")
        by_row[row] = partial
    return by_row


def _record(scored: PairRewards) -> dict[str, Any]:
    return {"lengths": list(scored.lengths), "chosen": list(scored.chosen), "rejected": list(scored.rejected)}


def _rewards_in(path: str | Path, record: dict[str, Any], partial: PartialPair) -> PairRewards:
    """The rewards that a row of the file holds."""
    row = partial.pair.row
    mend = "delete that line to have it scored again"
    if record.get("lengths") != list(partial.lengths):
        raise RowFileError(
            f"{path}, row {row}: rewards at lengths {record.get('lengths')}, but the data has {list(partial.lengths)}; "
            + mend
        )
    for name in ("chosen", "rejected"):
        values = record.get(name)
        if (
            not isinstance(values, list)
            or len(values) != len(partial.lengths)
            or not all(type(value) in (int, float) and math.isfinite(value) for value in values)
        ):
            raise RowFileError(
                f"{path}, row {row}: {name!r} must be a number for each of {len(partial.lengths)} lengths; {mend}"
            )
    return PairRewards(row, partial.lengths, tuple(map(float, record["chosen"])), tuple(map(float, record["rejected"])))


def _explained(error: OtherSettingsError, path: str | Path, step: str) -> RowFileError:
    """Of all settings that may differ, the data is the one to name first."""
    then, now = error.then.get("data"), error.now.get("data")
    if then == now:
        return error
    return RowFileError(
        f"{path} holds the rewards of another data set: its fingerprint is {then}, this one's is {now}; "
        f"{_owner(step).elsewhere}, or delete this one"
    )
