"""Preference pairs in the forms in which data sets come, and what is said about rows that hold none."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from ggro_hf.pairs import PreferencePair
from ggro_hf.training.preferences import DIFFERENT_PROMPTS, NO_ANSWER, read_preferences

QUESTION = [{"role": "user", "content": "Why?"}]
SYSTEM = [{"role": "system", "content": "Be brief."}]


def answer(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)
    return path


def read_one(tmp_path: Path, row: dict[str, Any], **options: Any) -> PreferencePair:
    selection = read_preferences(write_rows(tmp_path / "pairs.jsonl", [row]), **options)
    assert not selection.dropped and selection.rows == 1
    return selection.pairs[0]


PLAIN = {"prompt": "Why?", "chosen": "Because é.", "rejected": " No."}


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        (PLAIN, "Why?"),
        (PLAIN | {"prompt": SYSTEM + QUESTION, "score": 3}, SYSTEM + QUESTION),
        ({"prompt": "Why?", "chosen": answer("Because é."), "rejected": answer(" No.")}, "Why?"),
        ({"prompt": QUESTION, "chosen": answer("Because é."), "rejected": answer(" No.")}, QUESTION),
        ({"chosen": QUESTION + answer("Because é."), "rejected": QUESTION + answer(" No.")}, QUESTION),
        # The question is repeated beside the conversation, which may begin before it.
        (
            {"prompt": "Why?", "chosen": QUESTION + answer("Because é."), "rejected": QUESTION + answer(" No.")},
            "Why?",
        ),
        (
            {
                "prompt": "Why?",
                "chosen": SYSTEM + QUESTION + answer("Because é."),
                "rejected": SYSTEM + QUESTION + answer(" No."),
            },
            SYSTEM + QUESTION,
        ),
        # Only role and content are kept of a message.
        (
            {
                "chosen": [{**QUESTION[0], "weight": None}, *answer("Because é.")],
                "rejected": [{**QUESTION[0], "weight": 1}, *answer(" No.")],
            },
            QUESTION,
        ),
        (
            {
                "chosen": "\n\nHuman: Why?\n\nAssistant: Because é.",
                "rejected": "\n\nHuman: Why?\n\nAssistant:  No.",
            },
            QUESTION,
        ),
        (
            {
                "prompt": "\n\nHuman: Why?\n\nAssistant:",
                "chosen": " Because é.",
                "rejected": "  No.",
            },
            QUESTION,
        ),
    ],
)
def test_forms(tmp_path: Path, row: dict[str, Any], prompt: Any) -> None:
    assert read_one(tmp_path, row) == PreferencePair(1, prompt, "Because é.", " No.")


def test_turns_of_a_long_dialogue(tmp_path: Path) -> None:
    before = "\n\nHuman: Hi: a list\n\n1. Human: no\n\nAssistant: Yes?\n\nIndeed.\n\nHuman:Why?\n\nAssistant:"
    pair = read_one(tmp_path, {"chosen": before + " So.\n\nAnd so on. ", "rejected": before})
    assert pair.prompt == [
        {"role": "user", "content": "Hi: a list\n\n1. Human: no"},
        {"role": "assistant", "content": "Yes?\n\nIndeed."},
        {"role": "user", "content": "Why?"},
    ]
    assert (pair.chosen, pair.rejected) == ("So.\n\nAnd so on. ", "")


def test_text_that_only_speaks_of_turns_stays(tmp_path: Path) -> None:
    row = PLAIN | {"prompt": "\n\nHuman: Why?", "chosen": "\n\nAssistant: x"}
    assert read_one(tmp_path, row) == PreferencePair(1, row["prompt"], row["chosen"], " No.")


def test_other_column_names(tmp_path: Path) -> None:
    row = {"question": "Why?", "prompt": 3, "good": "Because.", "rejected": "No."}
    pair = read_one(tmp_path, row, fields={"prompt": "question", "chosen": "good"})
    assert pair == PreferencePair(1, "Why?", "Because.", "No.")
    with pytest.raises(ValueError, match=r"names 'best', but there are only 'prompt', 'chosen', 'rejected'"):
        read_preferences(tmp_path / "pairs.jsonl", fields={"best": "good"})


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"chosen": QUESTION + answer("a"), "rejected": SYSTEM + QUESTION + answer("b")}, DIFFERENT_PROMPTS),
        ({"prompt": "What?", "chosen": QUESTION + answer("a"), "rejected": QUESTION + answer("b")}, DIFFERENT_PROMPTS),
        (
            {
                "chosen": "\n\nHuman: Why?\n\nAssistant: a",
                "rejected": "\n\nHuman: Why?\n\nAssistant: b\n\nHuman: c\n\nAssistant: d",
            },
            DIFFERENT_PROMPTS,
        ),
        ({"chosen": "\n\nHuman: Why?\n\nAssistant: a", "rejected": "\n\nHuman: Why?"}, NO_ANSWER),
        ({"prompt": "Why?", "chosen": answer("a"), "rejected": QUESTION}, NO_ANSWER),
    ],
)
def test_dropped_rows(tmp_path: Path, row: dict[str, Any], reason: str) -> None:
    selection = read_preferences(write_rows(tmp_path / "pairs.jsonl", [PLAIN, row, PLAIN, row]))
    assert selection.dropped == {reason: [2, 4]}
    assert [pair.row for pair in selection.pairs] == [1, 3]
    assert selection.rows == 4


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a", "rejected": "b"}', "no 'chosen', but 'prompt', 'rejected'"),
        ('{"prompt": "a", "chosen": null, "rejected": "b"}', "no 'chosen'"),
        ("{}", "no 'chosen', but no fields"),
        ('{"prompt": 1, "chosen": "a", "rejected": "b"}', "'prompt' is a int; wanted a text or a list"),
        ('{"prompt": "a", "chosen": 0.5, "rejected": "b"}', "'chosen' is a float"),
        ('{"prompt": "a", "chosen": {"role": "assistant"}, "rejected": "b"}', "'chosen' is a dict"),
        ('{"prompt": "a", "chosen": ["b"], "rejected": ["c"]}', "'chosen': message 1 is 'b'; wanted"),
        ('{"prompt": "a", "chosen": [], "rejected": []}', "'chosen' is an empty list"),
        ('{"prompt": "a", "chosen": "b", "rejected": [{"role": "assistant", "content": "c"}]}', "wanted both alike"),
        ('{"chosen": "b", "rejected": "c"}', "no 'prompt', and 'chosen' is no conversation"),
        (
            '{"chosen": [{"role": "assistant", "content": "b"}], "rejected": [{"role": "assistant", "content": "c"}]}',
            "no prompt, and the responses are one message each",
        ),
        ('["a", "b"]', "holds a list, but must be an object"),
        ('{"prompt": "a", "chosen": "b"', "not valid JSON"),
        ('{"prompt": "a", "chosen": "\\ud800", "rejected": "b"}', "half of a surrogate pair"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(PLAIN) + "\n\n" + line + "\n")
    with pytest.raises(ValueError, match=r"pairs\.jsonl, line 3: ") as raised:
        read_preferences(path)
    assert message in str(raised.value)


def test_a_named_prompt_must_be_there(tmp_path: Path) -> None:
    path = write_rows(
        tmp_path / "pairs.jsonl", [{"chosen": QUESTION + answer("a"), "rejected": QUESTION + answer("b")}]
    )
    with pytest.raises(ValueError, match="line 1: no 'question'"):
        read_preferences(path, fields={"prompt": "question"})


def numbered(first: int, count: int) -> list[dict[str, Any]]:
    return [{"prompt": "p", "chosen": f"good {row}", "rejected": "bad"} for row in range(first, first + count)]


def chosen_by_row(source: str | Path, **options: Any) -> dict[int, str]:
    return {pair.row: pair.chosen for pair in read_preferences(source, **options).pairs}


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.json.gz", "a.parquet"])
def test_kinds_of_files(tmp_path: Path, name: str) -> None:
    # More rows than a batch of a parquet file.
    rows = numbered(1, 1500)
    path = write_rows(tmp_path / name, rows) if "json" in name else write_parquet(tmp_path / name, rows)
    expected = {row: f"good {row}" for row in range(1, 1501)}
    assert chosen_by_row(path) == chosen_by_row(str(path)) == expected


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def test_messages_in_parquet(tmp_path: Path) -> None:
    row = {"chosen": SYSTEM + QUESTION + answer("a"), "rejected": SYSTEM + QUESTION + answer("b"), "score": 1.5}
    selection = read_preferences(write_parquet(tmp_path / "a.parquet", [row]))
    assert selection.pairs == [PreferencePair(1, SYSTEM + QUESTION, "a", "b")]


def test_bad_rows_of_parquet_are_named(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", [PLAIN, PLAIN | {"chosen": None}])
    with pytest.raises(ValueError, match=r"a\.parquet, row 2: no 'chosen'"):
        read_preferences(path)
    with pytest.raises(ValueError, match=r"a\.parquet has no column 'x', but 'prompt', 'chosen', 'rejected'; name"):
        read_preferences(path, fields={"chosen": "x"})


def test_a_directory_is_read_in_order_and_numbered_through(tmp_path: Path) -> None:
    write_rows(tmp_path / "part-2.jsonl.gz", numbered(6, 2))
    write_parquet(tmp_path / "part-1.parquet", numbered(4, 2))
    write_rows(tmp_path / "part-0.jsonl", numbered(1, 2))
    # An empty line counts, as an editor counts it.
    (tmp_path / "part-0.jsonl").write_text((tmp_path / "part-0.jsonl").read_text() + "\n")
    (tmp_path / "README.md").write_text("no data")
    assert chosen_by_row(tmp_path) == {
        1: "good 1",
        2: "good 2",
        4: "good 4",
        5: "good 5",
        6: "good 6",
        7: "good 7",
    }
    (tmp_path / "part-1.parquet").unlink()
    write_rows(tmp_path / "part-1.jsonl", [PLAIN, {}])
    with pytest.raises(ValueError, match=r"part-1\.jsonl, line 2: no 'chosen'"):
        read_preferences(tmp_path)


def test_files_named_after_splits(tmp_path: Path) -> None:
    write_rows(tmp_path / "train-00000-of-00002.jsonl", numbered(1, 1))
    write_rows(tmp_path / "train-00001-of-00002.jsonl", numbered(2, 1))
    write_rows(tmp_path / "test.jsonl", numbered(9, 1))
    assert chosen_by_row(tmp_path) == {1: "good 1", 2: "good 2"}
    assert chosen_by_row(tmp_path, split="test") == {1: "good 9"}
    with pytest.raises(ValueError, match=r"no file of the split 'validation', but test\.jsonl, train-00000"):
        read_preferences(tmp_path, split="validation")


def test_sources_that_hold_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no \.jsonl"):
        read_preferences(tmp_path)
    (tmp_path / "a.jsonl").write_text("\n\n")
    with pytest.raises(ValueError, match="holds no rows"):
        read_preferences(tmp_path / "a.jsonl")
    (tmp_path / "a.csv").write_text("prompt,chosen,rejected\n")
    with pytest.raises(ValueError, match=r"a\.csv is of no kind that is read"):
        read_preferences(tmp_path / "a.csv")
    for missing in (tmp_path / "no", str(tmp_path / "no"), "no.jsonl", "./no", Path("owner/name")):
        with pytest.raises(FileNotFoundError, match="no such file or directory"):
            read_preferences(missing)


def test_damaged_files(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl.gz", numbered(1, 5000))
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(ValueError, match=r"a\.jsonl\.gz is damaged behind line \d+"):
        read_preferences(path)
    path.write_bytes(b"plain text\n")
    with pytest.raises(ValueError, match="is damaged behind line 0"):
        read_preferences(path)
    path = write_parquet(tmp_path / "a.parquet", numbered(1, 10))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"a\.parquet is damaged or no parquet file"):
        read_preferences(path)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """A hub with the data set owner/pairs, loaded by datasets from the disk; what it was asked for."""
    datasets = pytest.importorskip("datasets")
    load = datasets.load_dataset
    (tmp_path / "repository").mkdir()
    rows = [{"chosen": QUESTION + answer(f"a{row}"), "rejected": QUESTION + answer("b"), "id": row} for row in range(3)]
    write_rows(tmp_path / "repository" / "train.jsonl", rows)
    asked = []

    def from_disk(source: str, **options: Any) -> Any:
        asked.append((source, dict(options)))
        if source != "owner/pairs":
            raise ConnectionError("not reached")
        options.pop("revision")
        return load(str(tmp_path / "repository"), cache_dir=str(tmp_path / "cache"), **options)

    monkeypatch.setattr(datasets, "load_dataset", from_disk)
    return asked


def test_hub(hub: list[tuple[str, dict[str, Any]]], tmp_path: Path) -> None:
    selection = read_preferences("owner/pairs", revision="v1")
    assert hub == [("owner/pairs", {"split": "train", "revision": "v1"})]
    assert selection.pairs == [PreferencePair(row + 1, QUESTION, f"a{row}", "b") for row in range(3)]
    with pytest.raises(ValueError, match=r"owner/pairs \(train\), row 1: 'id' is a int"):
        read_preferences("owner/pairs", fields={"prompt": "id"})
    with pytest.raises(ValueError, match=r"owner/pairs \(train\) has no column 'c', but 'chosen', 'rejected', 'id'"):
        read_preferences("owner/pairs", fields={"chosen": "c"})
    with pytest.raises(
        OSError, match="'owner/other' is no file or directory here, and the hub does not give it: not re"
    ):
        read_preferences("owner/other")


@pytest.mark.parametrize(("module", "source"), [("datasets", "owner/pairs"), ("pyarrow", "a.parquet")])
def test_missing_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, source: str) -> None:
    (tmp_path / "a.parquet").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(ImportError, match=r"pip install 'ggro-kernels\[train\]'"):
        read_preferences(source)
