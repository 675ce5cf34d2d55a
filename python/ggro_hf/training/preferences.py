"""Preference pairs from files or the hub, in the forms in which such data sets come."""

import gzip
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from ggro_hf.jsonl import parse_object
from ggro_hf.pairs import PreferencePair
from ggro_hf.prompts import Message, Prompt, as_messages

DIFFERENT_PROMPTS = "different prompts"
NO_ANSWER = "no answer at the end"

_COLUMNS = ("prompt", "chosen", "rejected")
_SPLITS = ("train", "test", "validation", "valid", "val", "dev", "eval")
_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}

Fields = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Selection:
    """Pairs of a data set, the numbers of the rows that were left out under each reason, and of those whose responses
    were cut, which are therefore unfinished.
    """

    pairs: list[PreferencePair]
    dropped: dict[str, list[int]]
    cut: frozenset[int] = frozenset()

    @property
    def rows(self) -> int:
        """Number of rows of the data set."""
        return len(self.pairs) + sum(map(len, self.dropped.values()))


def read_preferences(
    source: str | Path,
    *,
    split: str = "train",
    revision: str | None = None,
    fields: Mapping[str, str] | None = None,
) -> Selection:
    """Read preference pairs: of a JSON-lines file (.jsonl, .json, either gzipped), a .parquet file, a directory of
    such, or a data set of the hub.

    The columns `prompt`, `chosen` and `rejected`, or those that `fields` names instead, hold one of

    - three texts; a prompt of turns "Human: ..." that ends with "Assistant:" becomes messages;
    - a prompt, text or messages, and responses that are lists of one assistant message;
    - no prompt, or the same one, and two conversations that differ in their last message, the assistant's;
    - no prompt, and two such conversations as texts "\\n\\nHuman: ... \\n\\nAssistant: ..." (HH-RLHF).

    Rows are numbered from 1, lines of a JSON-lines file by line, the files of a directory one after another in the
    order of their names. `split` is for the hub, and for a directory whose files are named after splits. Conversations
    that differ before their last message, or do not end with an answer, are dropped.

    Raises ValueError, file and row named, for other fields or types, or a file that is damaged; FileNotFoundError where
    a path leads nowhere; OSError where the hub does not give the data set; ImportError where `datasets` or `pyarrow`
    (extra `train`) is missing.
    """
    columns = _columns(fields)
    pairs = []
    dropped: dict[str, list[int]] = {}
    for row, where, values in _rows(source, split, revision, columns):
        try:
            parsed = _parse(row, values, columns, named=frozenset(fields or ()))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        if isinstance(parsed, str):
            dropped.setdefault(parsed, []).append(row)
        else:
            pairs.append(parsed)
    if not pairs and not dropped:
        raise ValueError(f"{source} holds no rows; wanted preference pairs")
    return Selection(pairs, dropped)


def _columns(fields: Mapping[str, str] | None) -> dict[str, str]:
    columns = {name: name for name in _COLUMNS} | dict(fields or {})
    if unknown := columns.keys() - set(_COLUMNS):
        raise ValueError(
            f"fields names {min(unknown)!r}, but there are only {', '.join(map(repr, _COLUMNS))} to rename"
        )
    return columns


def _rows(
    source: str | Path, split: str, revision: str | None, columns: dict[str, str]
) -> Iterator[tuple[int, str, Fields]]:
    """Number, place in words, and values of every row."""
    path = Path(source)
    if not path.exists():
        if isinstance(source, Path) or _reader_of(path) is not None or source.startswith((".", "/", "~")):
            raise FileNotFoundError(f"no preference pairs at {source}: there is no such file or directory")
        for number, values in enumerate(_hub_rows(source, split, revision, columns), start=1):
            yield number, f"{source} ({split}), row {number}", values
        return
    before = 0
    for file in _files(path, split):
        reader = _reader_of(file)
        if reader is None:
            raise ValueError(f"{file} is of no kind that is read; wanted .jsonl, .jsonl.gz, .json or .parquet")
        last = 0
        for last, word, found in reader(file, columns):
            if found is not None:
                yield before + last, f"{file}, {word} {last}", found
        before += last


def _files(path: Path, split: str) -> list[Path]:
    """The files of a directory in order: where some are named after splits, those of the split."""
    if not path.is_dir():
        return [path]
    files = sorted(file for file in path.iterdir() if file.is_file() and _reader_of(file) is not None)
    if not files:
        raise ValueError(f"{path} holds no .jsonl, .jsonl.gz, .json or .parquet file")
    named = {file: re.split(r"[-_.]", file.name)[0] for file in files}
    if not any(name in (split, *_SPLITS) for name in named.values()):
        return files
    chosen = [file for file, name in named.items() if name == split]
    if not chosen:
        raise ValueError(f"{path} holds no file of the split {split!r}, but {', '.join(file.name for file in files)}")
    return chosen


_Reader = Callable[[Path, dict[str, str]], Iterator[tuple[int, str, Fields | None]]]


def _reader_of(path: Path) -> _Reader | None:
    name = path.name.removesuffix(".gz")
    if name.endswith((".jsonl", ".json")):
        return _json_rows
    return _parquet_rows if path.name.endswith(".parquet") else None


def _json_rows(path: Path, columns: dict[str, str]) -> Iterator[tuple[int, str, Fields | None]]:
    number = 0
    try:
        with gzip.open(path) if path.name.endswith(".gz") else open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                yield number, "line", _json_values(path, number, line) if line.strip() else None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is damaged behind line {number}: {error}; fetch it again") from error


def _json_values(path: Path, number: int, line: bytes) -> Fields:
    try:
        return parse_object(line)
    except ValueError as error:
        raise ValueError(f"{path}, line {number}: {error}; wanted one JSON object a line") from None


def _parquet_rows(path: Path, columns: dict[str, str]) -> Iterator[tuple[int, str, Fields | None]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError(f"{path} needs pyarrow to be read; pip install 'ggro-kernels[train]'") from error
    try:
        with parquet.ParquetFile(path) as file:
            wanted = _wanted(str(path), file.schema_arrow.names, columns)
            batches = file.iter_batches(batch_size=1024, columns=wanted)
            rows = chain.from_iterable(batch.to_pylist() for batch in batches)
            for number, values in enumerate(rows, start=1):
                yield number, "row", values
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged or no parquet file: {error}") from error


def _hub_rows(source: str, split: str, revision: str | None, columns: dict[str, str]) -> Iterator[Fields]:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"{source!r} is no file here, and a data set of the hub needs datasets; pip install 'ggro-kernels[train]'"
        ) from error
    try:
        data = datasets.load_dataset(source, split=split, revision=revision)
    except (OSError, ValueError) as error:
        raise OSError(f"{source!r} is no file or directory here, and the hub does not give it: {error}") from error
    wanted = _wanted(f"{source} ({split})", data.column_names, columns)
    yield from data.select_columns(wanted)


def _wanted(source: str, names: Sequence[str], columns: dict[str, str]) -> list[str]:
    """The columns to read of a table with the given ones."""
    for name in ("chosen", "rejected"):
        if columns[name] not in names:
            raise ValueError(
                f"{source} has no column {columns[name]!r}, but {', '.join(map(repr, names)) or 'none'}; "
                "name the columns of prompt, chosen and rejected by fields"
            )
    return [name for name in names if name in columns.values()]


def _parse(row: int, values: Fields, columns: dict[str, str], named: frozenset[str]) -> PreferencePair | str:
    """The pair of a row, or why it is dropped."""
    found = {name: values.get(column) for name, column in columns.items()}
    for name in _COLUMNS:
        if found[name] is None and (name != "prompt" or name in named):
            have = ", ".join(map(repr, values)) or "no fields"
            raise ValueError(
                f"no {columns[name]!r}, but {have}; name the fields of prompt, chosen and rejected by fields"
            )
    prompt = _prompt(columns["prompt"], found["prompt"])
    chosen, rejected = (_response(columns[name], found[name]) for name in ("chosen", "rejected"))
    if isinstance(chosen, str) and isinstance(rejected, str):
        if prompt is None:
            return _parse_turns(row, chosen, rejected, columns)
        opened = _turns(prompt) if isinstance(prompt, str) else None
        if opened and opened[-1]["role"] == "assistant" and not opened[-1]["content"].strip():
            return PreferencePair(row, opened[:-1], chosen.removeprefix(" "), rejected.removeprefix(" "))
        return PreferencePair(row, prompt, chosen, rejected)
    if isinstance(chosen, str) or isinstance(rejected, str):
        raise ValueError(
            f"one of {columns['chosen']!r} and {columns['rejected']!r} is a text, the other a list of messages; "
            "wanted both alike"
        )
    return _parse_conversations(row, prompt, chosen, rejected)


def _parse_turns(row: int, chosen: str, rejected: str, columns: dict[str, str]) -> PreferencePair | str:
    conversations = [_turns(text) for text in (chosen, rejected)]
    for name, turns in zip(("chosen", "rejected"), conversations, strict=True):
        if turns is None:
            raise ValueError(
                f"no {columns['prompt']!r}, and {columns[name]!r} is no conversation; wanted a prompt, or texts that "
                'begin with "\\n\\nHuman: " and end with an answer behind "\\n\\nAssistant: "'
            )
    return _parse_conversations(row, None, *(turns or [] for turns in conversations))


def _parse_conversations(
    row: int, prompt: Prompt | None, chosen: list[Message], rejected: list[Message]
) -> PreferencePair | str:
    if any(messages[-1]["role"] != "assistant" for messages in (chosen, rejected)):
        return NO_ANSWER
    before = chosen[:-1]
    if before != rejected[:-1]:
        return DIFFERENT_PROMPTS
    if prompt is None:
        if not before:
            raise ValueError(
                "no prompt, and the responses are one message each; wanted a prompt or whole conversations"
            )
        prompt = before
    elif before and before != as_messages(prompt):
        # Some data sets repeat the last question beside the conversation.
        if before[-len(as_messages(prompt)) :] != as_messages(prompt):
            return DIFFERENT_PROMPTS
        prompt = before
    return PreferencePair(row, prompt, chosen[-1]["content"], rejected[-1]["content"])


def _prompt(column: str, value: object) -> Prompt | None:
    return None if value is None else _text_or_messages(column, value)


def _response(column: str, value: object) -> str | list[Message]:
    checked = _text_or_messages(column, value)
    if not isinstance(checked, str) and not checked:
        raise ValueError(f"{column!r} is an empty list; wanted a text or messages")
    return checked


def _text_or_messages(column: str, value: object) -> str | list[Message]:
    if isinstance(value, str):
        return value
    if not isinstance(value, Sequence):
        raise ValueError(f"{column!r} is a {type(value).__name__}; wanted a text or a list of messages")
    messages = []
    for number, message in enumerate(value, start=1):
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise ValueError(
                f'{column!r}: message {number} is {message!r:.80}; wanted {{"role": "...", "content": "..."}}'
            )
        messages.append({"role": message["role"], "content": message["content"]})
    return messages


def _turns(text: str) -> list[Message] | None:
    """The messages of "\\n\\nHuman: ... \\n\\nAssistant: ...", None where the text does not begin so."""
    before, *parts = _TURN.split(text)
    if before or not parts:
        return None
    return [
        {"role": _ROLES[speaker], "content": content.removeprefix(" ")}
        for speaker, content in zip(parts[::2], parts[1::2], strict=True)
    ]
