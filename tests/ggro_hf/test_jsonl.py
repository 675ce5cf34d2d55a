"""Prompt files with bad lines, and row files that are torn, foreign, locked or from another run."""

import json

import pytest

from ggro_hf.jsonl import BadLine, PromptLine, RowFile, RowFileError, read_prompt_lines, row_of

SETTINGS = {"method": "ggro", "max_new_tokens": 8}


def line(number, prompt="Hello", **fields):
    return PromptLine(number, prompt, {"prompt": prompt, **fields})


def append(rows, answered, result):
    return rows.append(answered.number, {**answered.fields, **result})


def read(tmp_path, content, **options):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(content)
    return list(read_prompt_lines(path, **options))


def test_prompts_and_messages_are_read_with_their_line_numbers_and_fields(tmp_path):
    content = b'\xef\xbb\xbf{"prompt": "a", "id": 7}\r\n\n{"messages": [{"role": "user", "content": "\xc3\xa9"}]}'
    first, second = read(tmp_path, content)
    assert first == PromptLine(1, "a", {"prompt": "a", "id": 7})
    assert (second.number, second.prompt) == (3, [{"role": "user", "content": "é"}])


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{"prompt": ', "not valid JSON"),
        (b'{"prompt": "\xff"}', "not UTF-8"),
        (b"[1]", "holds a list"),
        (b"{}", 'needs one of "prompt" and "messages", has no fields'),
        (b'{"text": "a"}', "has 'text'"),
        (b'{"prompt": "a", "messages": []}', "not both"),
        (b'{"prompt": 3}', '"prompt" is a int'),
        (b'{"prompt": " \\n"}', "the prompt is empty"),
        (b'{"messages": []}', "the prompt is empty"),
        (b'{"messages": [{"role": "user"}]}', '"messages" must be a list of'),
        (b'{"messages": "a"}', '"messages" must be a list of'),
        (b'{"prompt": "a", "x": NaN}', "NaN is not valid JSON"),
        (b'{"prompt": "\\ud800"}', "surrogate"),
        (b'{"prompt": "a", "reward": 1}', "'reward' has the name of a result"),
        (b'{"prompt": "a", "line": 1}', "'line' has the name of a result"),
    ],
)
def test_a_bad_line_is_named_and_the_next_one_is_read(tmp_path, content, reason):
    bad, good = read(tmp_path, content + b'\n{"prompt": "b"}\n', reserved=("reward",))
    assert isinstance(bad, BadLine)
    assert bad.number == 1
    assert reason in bad.reason
    assert good == PromptLine(2, "b", {"prompt": "b"})


def test_rows_are_on_the_disk_before_the_file_is_closed_and_are_taken_up_again(tmp_path):
    path = tmp_path / "rows.jsonl"
    with RowFile(path, SETTINGS) as rows:
        append(rows, line(3, "Grüße", label="x"), {"text": "é\n"})
        (written,) = path.read_text(encoding="utf-8").splitlines()
    assert json.loads(written) == {"line": 3, "prompt": "Grüße", "label": "x", "text": "é\n", "settings": SETTINGS}
    with RowFile(path, SETTINGS) as rows:
        assert row_of(rows, line(3, "Grüße"))["text"] == "é\n"
        assert row_of(rows, line(4)) is None


def test_a_last_line_torn_anywhere_is_cut_off(tmp_path):
    path = tmp_path / "rows.jsonl"
    with RowFile(path, SETTINGS) as rows:
        append(rows, line(1), {"text": "é"})
        first = path.read_bytes()
        append(rows, line(2), {"text": "é"})
    second = path.read_bytes()[len(first) :]
    for length in range(1, len(second)):
        path.write_bytes(first + second[:length])
        with RowFile(path, SETTINGS) as rows:
            assert list(rows.rows) == [1]
            append(rows, line(2), {"text": "é"})
        assert path.read_bytes() == first + second


def test_a_damaged_line_in_the_middle_is_named_and_nothing_is_touched(tmp_path):
    path = tmp_path / "rows.jsonl"
    with RowFile(path, SETTINGS) as rows:
        append(rows, line(1), {})
        append(rows, line(2), {})
    content = path.read_bytes().replace(b'"line": 1', b'"line": ?') + b'{"line'
    path.write_bytes(content)
    with pytest.raises(RowFileError, match="line 1: not valid JSON"):
        RowFile(path, SETTINGS)
    assert path.read_bytes() == content


def test_other_settings_are_refused_by_name(tmp_path):
    path = tmp_path / "rows.jsonl"
    with RowFile(path, SETTINGS) as rows:
        append(rows, line(1), {})
    with pytest.raises(RowFileError, match=r"max_new_tokens was 8, is 9, seed was None, is 1"):
        RowFile(path, {**SETTINGS, "max_new_tokens": 9, "seed": 1})


@pytest.mark.parametrize(
    "content", [b"some notes", b'{"prompt": "a"}\n', b'{"prompt": "a"}', b"[]\n", b'{"line": 1}\n']
)
def test_a_file_of_something_else_is_refused_and_left_alone(tmp_path, content):
    path = tmp_path / "notes"
    path.write_bytes(content)
    with pytest.raises(RowFileError, match="another --output file"):
        RowFile(path, SETTINGS)
    assert path.read_bytes() == content


def test_a_changed_input_is_refused(tmp_path):
    path = tmp_path / "rows.jsonl"
    with RowFile(path, SETTINGS) as rows:
        append(rows, line(1, "then"), {})
        for prompt in ("now", [{"role": "user", "content": "then"}]):
            with pytest.raises(RowFileError, match="another prompt for line 1"):
                row_of(rows, PromptLine(1, prompt, {}))


def test_a_second_run_on_the_same_file_is_kept_out(tmp_path):
    path = tmp_path / "rows.jsonl"
    with RowFile(path, SETTINGS), pytest.raises(RowFileError, match="another run"):
        RowFile(path, SETTINGS)
    RowFile(path, SETTINGS).close()
