"""JSON-lines files: prompts in, and a file of result rows that a killed run can continue."""

import fcntl
import json
import os
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, Self

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
                fields = parse_object(line)
                if clash := reserved & fields.keys():
                    raise ValueError(f"field {min(clash)!r} has the name of a result; rename it")
                yield PromptLine(number, _prompt_of(fields), fields)
            except ValueError as error:
                yield BadLine(number, str(error))


class OtherSettingsError(RowFileError):
    """Rows made with other settings: those of `then`, where `now` were wanted."""

    def __init__(self, message: str, then: dict[str, Any], now: dict[str, Any]) -> None:
        super().__init__(message)
        self.then = then
        self.now = now


@dataclass(frozen=True, slots=True)
class RowOwner:
    """For the messages of a row file: what writes such files, and where else it could write."""

    writer: str
    elsewhere: str


GENERATE = RowOwner("`ggro generate`", "choose another --output file")


class RowFile:
    """Result rows that survive a kill: what is appended is on the disk before the next begins.

    Every row carries `line`, the number it is known by, and the `settings` it was made with. Opening an existing file
    takes its rows up again: a torn last line is cut off; rows made with other settings, or a file that holds anything
    else, raise RowFileError and the file stays untouched. A lock keeps a second run out.
    """

    def __init__(self, path: str | Path, settings: dict[str, Any], owner: RowOwner = GENERATE) -> None:
        self.path = Path(path)
        self._settings = settings
        # Unbuffered: nothing is left that close() would try to write after a disk was full.
        self._file = FileIO(self.path, "a+")
        try:
            self._lock()
            self._file.seek(0)
            content = self._file.readall()
            self.rows, whole = _parse_rows(self.path, content, settings, owner)
            if whole < len(content):
                self._file.truncate(whole)
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

    def append(self, number: int, result: dict[str, Any]) -> dict[str, Any]:
        """Write the row of a number and return it once it is on the disk; raises OSError as `extend` does."""
        self.extend([(number, result)])
        return self.rows[number]

    def extend(self, results: Iterable[tuple[int, dict[str, Any]]]) -> None:
        """Write the rows of several numbers with a single wait for the disk.

        Raises OSError, the path named, where they could not be written; the file then holds what it held before.
        """
        rows = [{"line": number, **result, "settings": self._settings} for number, result in results]
        content = b"".join(json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n" for row in rows)
        before = os.fstat(self._file.fileno()).st_size
        try:
            written = 0
            while written < len(content):
                written += self._file.write(content[written:])
            os.fsync(self._file.fileno())
        except OSError as error:
            # A row after half of another would be lost with it.
            with suppress(OSError):
                self._file.truncate(before)
            raise OSError(error.errno, error.strerror, str(self.path)) from error
        self.rows.update((row["line"], row) for row in rows)

    def count(self) -> int:
        """Number of complete rows in the file itself, right even where `append` was interrupted half-way."""
        return self.path.read_bytes().count(b"\n")

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RowFileError(
                f"{self.path} is being written by another run; wait for it or choose another file"
            ) from None


def row_of(rows: RowFile, line: PromptLine) -> dict[str, Any] | None:
    """The row already written for an input line; raises RowFileError where that line held another prompt then."""
    row = rows.rows.get(line.number)
    if row is not None and row.get(_prompt_key(line.prompt)) != line.prompt:
        raise RowFileError(
            f"{rows.path} answers another prompt for line {line.number} of the input: the input has changed since; "
            "write to a new --output file"
        )
    return row


def read_rows(path: str | Path, settings: dict[str, Any], owner: RowOwner) -> dict[int, dict[str, Any]]:
    """Rows of a `RowFile` by their numbers, without a lock and without touching it; a torn last line is left out.

    Raises RowFileError as opening it does, OSError where it cannot be read.
    """
    return _parse_rows(Path(path), Path(path).read_bytes(), settings, owner)[0]


def _parse_rows(
    path: Path, content: bytes, settings: dict[str, Any], owner: RowOwner
) -> tuple[dict[int, dict[str, Any]], int]:
    """The rows of a file's content, and how many bytes of it are whole rows."""
    complete, newline, torn = content.rpartition(b"\n")
    rows = {}
    for number, line in enumerate(complete.split(b"\n") if newline else [], start=1):
        row = _check_row(path, number, line, settings, owner)
        rows[row["line"]] = row
    if torn and not (torn.startswith(_ROW_START) or _ROW_START.startswith(torn)):
        raise RowFileError(f"{path} was not written by {owner.writer}; {owner.elsewhere}")
    return rows, len(content) - len(torn)


def _check_row(path: Path, number: int, line: bytes, settings: dict[str, Any], owner: RowOwner) -> dict[str, Any]:
    try:
        row = parse_object(line)
    except ValueError as error:
        raise RowFileError(
            f"{path}, line {number}: {error}; delete that line to have it done again, or {owner.elsewhere}"
        ) from None
    if not isinstance(row.get("line"), int) or not isinstance(row.get("settings"), dict):
        raise RowFileError(f"{path} was not written by {owner.writer}; {owner.elsewhere}")
    if row["settings"] != settings:
        raise OtherSettingsError(
            f"{path} was written with other settings ({differing(row['settings'], settings)}); "
            f"repeat them to continue, or {owner.elsewhere}",
            row["settings"],
            settings,
        )
    return row


def differing(then: Any, now: Any, where: str = "") -> str:
    """Which settings differ, and how: those of dictionaries by their keys."""
    if isinstance(then, dict) and isinstance(now, dict):
        keys = sorted(key for key in then.keys() | now.keys() if then.get(key) != now.get(key))
        return ", ".join(differing(then.get(key), now.get(key), f"{where}.{key}" if where else key) for key in keys)
    return f"{where} was {then!r}, is {now!r}"


def parse_object(line: bytes) -> dict[str, Any]:
    """The JSON object of a line; raises ValueError, the reason told, where it holds none."""
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
