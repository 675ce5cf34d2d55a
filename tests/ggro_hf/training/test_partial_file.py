"""The file of partial pairs: it gives back what was written, or says which line is not as it was."""

import json
import resource
from dataclasses import replace
from pathlib import Path

import pytest

from ggro_hf.pairs import PartialPair, PreferencePair
from ggro_hf.training.partial_file import fingerprint, read_partial, write_partial
from ggro_hf.training.units import Tokens, Words
from tests.ggro_hf.small_models import small_tokenizer

PARTIALS = [
    PartialPair(PreferencePair(1, "Why?\u2028\n", "Because é 😀.", "No."), (1, 3, 3, None)),
    PartialPair(PreferencePair(4, [{"role": "user", "content": "a"}], 'b"\\', "c\x00"), (2,)),
    PartialPair(PreferencePair(9, "x", "y", "z"), (None,)),
]


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "partial.jsonl"
    write_partial(path, PARTIALS[:1])
    write_partial(path, PARTIALS)
    assert read_partial(path) == PARTIALS == read_partial(str(path))
    assert list(tmp_path.iterdir()) == [path]
    rows = [json.loads(line) for line in path.read_text().split("\n")[:-1]]
    assert [row["row"] for row in rows] == [1, 4, 9] and rows[0]["lengths"] == [1, 3, 3, None]
    with pytest.raises(ValueError, match="there are no partial pairs to write"):
        write_partial(path, [])


def test_every_torn_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "partial.jsonl"
    write_partial(path, PARTIALS)
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"partial\.jsonl") as raised:
            read_partial(path)
        line = content[:length].count(b"\n")
        whole = not length or content[length - 1 : length] == b"\n"
        assert (f"ends with line {line}, which is not its last" if whole else f"line {line + 1}: ") in str(raised.value)


@pytest.mark.parametrize(
    ("edit", "line"),
    [
        (lambda lines: [lines[0].replace("Because", "because"), *lines[1:]], 1),
        (lambda lines: [lines[0], lines[1].replace("[2]", "[3]"), lines[2]], 2),
        (lambda lines: [lines[0], lines[1].replace('"row": 4', '"row": 5'), lines[2]], 2),
        (lambda lines: [lines[0], lines[1].replace('"last": false', '"last": true'), lines[2]], 2),
        (lambda lines: [lines[0], lines[2]], 2),
        (lambda lines: lines[1:], 1),
        (lambda lines: [lines[1], lines[0], lines[2]], 1),
        (lambda lines: [lines[0], lines[0], *lines[1:]], 2),
        (lambda lines: [*lines, lines[2]], 4),
        (lambda lines: [lines[0], "\n", *lines[1:]], 2),
        (lambda lines: ['{"row": 1, "prompt": "a", "chosen": "b", "rejected": "c", "lengths": [1]}\n'], 1),
        (lambda lines: ["prompt,chosen\n"], 1),
    ],
)
def test_edited_files_are_refused(tmp_path: Path, edit, line: int) -> None:
    path = tmp_path / "partial.jsonl"
    write_partial(path, PARTIALS)
    lines = [text + "\n" for text in path.read_text().split("\n")[:-1]]
    edited = edit(lines)
    assert edited != lines
    path.write_text("".join(edited))
    with pytest.raises(
        ValueError, match=rf"partial\.jsonl, line {line}: .*; the file is torn, was edited or is another"
    ):
        read_partial(path)


def test_a_disk_that_is_full_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "partial.jsonl"
    write_partial(path, PARTIALS[2:])
    many = [replace(PARTIALS[0], pair=replace(PARTIALS[0].pair, row=row, chosen="x" * 1000)) for row in range(1, 100)]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"cannot write the partial pairs: File too large: .*partial\.jsonl"):
            write_partial(path, many)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert read_partial(path) == PARTIALS[2:]
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(FileNotFoundError, match="no/partial"):
        write_partial(tmp_path / "no" / "partial.jsonl", PARTIALS)


def test_fingerprints_tell_data_sets_and_units_apart() -> None:
    tokenizer, other = small_tokenizer(), small_tokenizer()
    other.add_tokens(["Because"])
    first = PARTIALS[0]
    differing = [
        PARTIALS[:2],
        PARTIALS[::-1],
        [replace(first, lengths=(1, 3, None)), *PARTIALS[1:]],
        [replace(first, pair=replace(first.pair, row=2)), *PARTIALS[1:]],
        [replace(first, pair=replace(first.pair, prompt="Why?\n")), *PARTIALS[1:]],
        [replace(first, pair=replace(first.pair, chosen="No.", rejected=first.pair.chosen)), *PARTIALS[1:]],
    ]
    units = [Words(), Words(rejoin=True), Tokens(tokenizer), Tokens(other)]
    made = [fingerprint(PARTIALS, unit) for unit in units] + [fingerprint(data, units[0]) for data in differing]
    assert len(set(made)) == len(made)
    assert all(len(one) == 16 and int(one, 16) >= 0 for one in made)
    assert fingerprint(list(PARTIALS), Tokens(small_tokenizer())) == made[2]
    # Padding and cutting are states of a tokenizer, not its vocabulary.
    tokenizer(["a", "bb"], padding=True, truncation=True, max_length=4)
    assert fingerprint(PARTIALS, Tokens(tokenizer)) == made[2]


def test_the_fingerprint_is_that_of_the_file_read_again(tmp_path: Path) -> None:
    write_partial(tmp_path / "a.jsonl", PARTIALS)
    assert fingerprint(read_partial(tmp_path / "a.jsonl"), Words()) == fingerprint(PARTIALS, Words())
