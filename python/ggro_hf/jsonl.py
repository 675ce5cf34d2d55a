"""JSON-lines files: prompts in, and a file of result rows that a killed run can continue."""

import fcntl
import json
import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Self

from ggro_hf.prompts import Prompt

# Every row begins with its line number: that tells a torn row of ours from the last line of somebody's other file.
_ROW_START = b'{"line": '


class RowFileError(ValueError):
    """A file of rows that cannot be continued; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class PromptLine:
    """Line `number` (from 1) of an input file: its prompt, and all of its fields as they came."""

    number: int
    prompt: Prompt
    fields: dict[str, Any]


@dataclass(frozen=True, slots=True)
class BadLine:
    """A line of an input file that holds no prompt, and why."""

    number: int
    reason: str


def read_prompt_lines(path: str | Path, reserved: Collection[str] = ()) -> Iterator[PromptLine | BadLine]:
    """Read `{"prompt": text}` or `{"messages": [{"role": ..., "content": ...}, ...]}`, one a line.

    Empty lines are skipped. Other fields are kept; those named in `reserved` make the line a bad one, since a result
    will have that name. Raises OSError where the file cannot be read.
    """
    reserved = {"line", "settings", *reserved}
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                fields = _parse_object(line)
                if clash := reserved & fields.keys():
                    raise ValueError(f"field {min(clash)!r} has the name of a result; rename it")
                yield PromptLine(number, _prompt_of(fields), fields)
            except ValueError as error:
                yield BadLine(number, str(error))


class RowFile:
    """Result rows that survive a kill: each is written once, flushed and synced to the disk before the next begins.

    Every row carries `line` (of its input), its prompt and the `settings` it was made with. Opening an existing file
    takes its rows up again: a torn last line is cut off; rows made with other settings, or a file that holds anything
    else, raise RowFileError and the file stays untouched. A lock keeps a second run out.
    """

    def __init__(self, path: str | Path, settings: dict[str, Any]) -> None:
        self.path = Path(path)
        self._settings = settings
        self._file: BinaryIO = open(self.path, "a+b")  # noqa: SIM115 - closed by close()
        try:
            self._lock()
            self.rows = self._take_up()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file and let go of its lock."""
        self._file.close()

    def row_of(self, line: PromptLine) -> dict[str, Any] | None:
        """The row already written for an input line; raises RowFileError where that line held another prompt then."""
        row = self.rows.get(line.number)
        if row is not None and row.get(_prompt_key(line.prompt)) != line.prompt:
            raise RowFileError(
                f"{self.path} answers another prompt for line {line.number} of the input: the input has changed since; "
                "write to a new --output file"
            )
        return row

    def append(self, line: PromptLine, result: dict[str, Any]) -> dict[str, Any]:
        """Write the row of an input line and return it once it is on the disk."""
        row = {"line": line.number, **line.fields, **result, "settings": self._settings}
        self._file.write(json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.rows[line.number] = row
        return row

    def count(self) -> int:
        """Number of complete rows in the file itself, right even where `append` was interrupted half-way."""
        self._file.flush()
        return self.path.read_bytes().count(b"\n")

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RowFileError(
                f"{self.path} is being written by another run; wait for it or choose another file"
            ) from None

    def _take_up(self) -> dict[int, dict[str, Any]]:
        self._file.seek(0)
        content = self._file.read()
        complete, newline, torn = content.rpartition(b"\n")
        rows = {}
        for number, line in enumerate(complete.split(b"\n") if newline else [], start=1):
            row = self._check_row(number, line)
            rows[row["line"]] = row
        if torn:
            if not (torn.startswith(_ROW_START) or _ROW_START.startswith(torn)):
                raise RowFileError(f"{self.path} was not written by `ggro generate`; choose another --output file")
            self._file.truncate(len(content) - len(torn))
        return rows

    def _check_row(self, number: int, line: bytes) -> dict[str, Any]:
        try:
            row = _parse_object(line)
        except ValueError as error:
            raise RowFileError(
                f"{self.path}, line {number}: {error}; "
                "delete that line to have it done again, or choose another --output file"
            ) from None
        if not isinstance(row.get("line"), int) or not isinstance(row.get("settings"), dict):
            raise RowFileError(f"{self.path} was not written by `ggro generate`; choose another --output file")
        if row["settings"] != self._settings:
            raise RowFileError(
                f"{self.path} was written with other settings ({_differing(row['settings'], self._settings)}); "
                "repeat them to continue, or choose another --output file"
            )
        return row


def _parse_object(line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line.decode("utf-8-sig"), parse_constant=_refuse_constant)
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 ({error.reason} at byte {error.start + 1})") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON ({error.msg} at column {error.colno})") from None
    except UnicodeEncodeError:
        raise ValueError("holds half of a surrogate pair, which is no character") from None
    if not isinstance(value, dict):
        raise ValueError(f'holds a {type(value).__name__}, but must be an object such as {{"prompt": "..."}}')
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not valid JSON")


def _prompt_of(fields: dict[str, Any]) -> Prompt:
    given = [key for key in ("prompt", "messages") if key in fields]
    if len(given) != 1:
        raise ValueError(
            'needs one of "prompt" and "messages"' + (", not both" if given else f", has {_names(fields)}")
        )
    prompt = fields[given[0]]
    if given == ["prompt"]:
        if not isinstance(prompt, str):
            raise ValueError(f'"prompt" is a {type(prompt).__name__}, but must be text')
        if not prompt.strip():
            raise ValueError("the prompt is empty")
        return prompt
    if not isinstance(prompt, list) or not all(_is_message(message) for message in prompt):
        raise ValueError('"messages" must be a list of {"role": "...", "content": "..."}')
    if not prompt or not any(message["content"].strip() for message in prompt):
        raise ValueError("the prompt is empty")
    return prompt


def _is_message(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(key), str) for key in ("role", "content"))


def _prompt_key(prompt: Prompt) -> str:
    return "prompt" if isinstance(prompt, str) else "messages"


def _names(fields: dict[str, Any]) -> str:
    return ", ".join(map(repr, fields)) or "no fields"


def _differing(then: dict[str, Any], now: dict[str, Any]) -> str:
    keys = sorted(key for key in then.keys() | now.keys() if then.get(key) != now.get(key))
    return ", ".join(f"{key} was {then.get(key)!r}, is {now.get(key)!r}" for key in keys)
