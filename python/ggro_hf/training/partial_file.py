"""Partial pairs in a file that does not pass for another: fingerprints, and refusal of what was torn or edited."""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ggro_hf.jsonl import parse_object
from ggro_hf.pairs import PartialPair, PreferencePair
from ggro_hf.training.units import Tokens, Unit, Words

_DIGITS = 16


def fingerprint(partials: Sequence[PartialPair], unit: Unit) -> str:
    """16 hexadecimal digits of SHA-256 over rows, prompts, responses and lengths, and over what counts the lengths:
    the unit, and of tokens the vocabulary.
    """
    counted: list[Any] = [unit.name]
    if isinstance(unit, Words):
        counted.append(unit.rejoin)
    if isinstance(unit, Tokens):
        counted.append(sorted(unit.tokenizer.get_vocab().items()))
    digest = hashlib.sha256(_encoded(counted))
    for partial in partials:
        digest.update(_encoded(_record(partial)))
    return digest.hexdigest()[:_DIGITS]


def write_partial(path: str | Path, partials: Sequence[PartialPair]) -> None:
    """Write partial pairs as JSON lines: all of them, or nothing where the write fails or is killed.

    A line holds `row`, `prompt`, `chosen`, `rejected`, `lengths`, whether it is the `last`, and a `check` over it and
    the check of the line before. Raises ValueError where there are no pairs; OSError, the path named, where the disk
    refuses.
    """
    path = Path(path)
    if not partials:
        raise ValueError(f"there are no partial pairs to write to {path}")
    temporary = path.with_name(f".{path.name}.tmp")
    check = ""
    try:
        with open(temporary, "wb") as file:
            for number, partial in enumerate(partials, start=1):
                record = {**_record(partial), "last": number == len(partials)}
                check = _check(record, check)
                file.write(_encoded({**record, "check": check}))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, f"cannot write the partial pairs: {error.strerror}", str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def read_partial(path: str | Path) -> list[PartialPair]:
    """Read what `write_partial` has written. Raises ValueError, the line named, where it is torn or was edited; OSError
    where it cannot be read.
    """
    partials: list[PartialPair] = []
    check, last = "", False
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                if not line.endswith(b"\n"):
                    raise ValueError("is torn")
                record = parse_object(line)
                stored = record.pop("check", None)
                if stored != _check(record, check):
                    raise ValueError("is not as it was written, or the line before it is missing")
                partials.append(_partial(record))
                check, last = stored, record["last"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{path}, line {number}: {error}; the file is torn, was edited or is another; write it anew"
                ) from None
    if not last:
        raise ValueError(f"{path} ends with line {len(partials)}, which is not its last; write it anew")
    return partials


def _record(partial: PartialPair) -> dict[str, Any]:
    pair = partial.pair
    return {
        "row": pair.row,
        "prompt": pair.prompt,
        "chosen": pair.chosen,
        "rejected": pair.rejected,
        "lengths": partial.lengths,
    }


def _partial(record: dict[str, Any]) -> PartialPair:
    pair = PreferencePair(record["row"], record["prompt"], record["chosen"], record["rejected"])
    return PartialPair(pair, tuple(record["lengths"]))


def _check(record: dict[str, Any], before: str) -> str:
    return hashlib.sha256(before.encode() + _encoded(record)).hexdigest()[:_DIGITS]


def _encoded(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode() + b"\n"
