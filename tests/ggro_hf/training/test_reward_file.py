"""Rewards kept by row: the same whether a run was killed or not, and never those of other data."""

import json
import resource
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from ggro_hf.jsonl import RowFile, RowFileError
from ggro_hf.training.prefix_reader import PrefixReader
from ggro_hf.training.reward_file import read_scores, score_to_file
from ggro_hf.training.scoring import PrefixScorer
from ggro_hf.training.units import Words
from tests.ggro_hf.small_models import small_reward, small_tokenizer
from tests.ggro_hf.training.preference_data import partial_pairs

SETTINGS = {"data": "0123456789abcdef", "reference": "tiny", "revision": None, "dtype": "float32"}


def small_scorer():
    tokenizer = small_tokenizer()
    model = small_reward("gemma3", seed=1, vocabulary=len(tokenizer), dtype=torch.float32)
    return PrefixScorer(model, PrefixReader.for_model(model, tokenizer, Words()))


class Counted:
    """A scorer that says which rows it was given, and is stopped after some calls."""

    def __init__(self, scorer, calls=None):
        self.scorer = scorer
        self.calls = calls
        self.rows = []

    def score(self, pairs):
        if self.calls is not None and len(self.rows) == self.calls:
            raise KeyboardInterrupt
        self.rows.append([partial.pair.row for partial in pairs])
        return self.scorer.score(pairs)


@pytest.fixture(scope="module")
def scorer():
    return small_scorer()


@pytest.fixture(scope="module")
def whole(scorer, tmp_path_factory):
    """What a run that nothing disturbs returns and writes."""
    path = tmp_path_factory.mktemp("whole") / "rewards.jsonl"
    return score_to_file(lambda: scorer, partial_pairs(), path, SETTINGS, step="weights", chunk=4), path.read_bytes()


def test_rewards_are_those_of_the_scorer_and_are_read_again_as_they_were(scorer, whole, tmp_path):
    rewards, content = whole
    pairs = partial_pairs()
    assert list(rewards) == list(range(1, 12))
    for partial, own in zip(pairs, scorer.score(pairs), strict=True):
        stored = rewards[partial.pair.row]
        assert (stored.row, stored.lengths) == (own.row, partial.lengths)
        assert stored.chosen == pytest.approx(own.chosen, abs=1e-5)
        assert stored.rejected == pytest.approx(own.rejected, abs=1e-5)
    path = tmp_path / "rewards.jsonl"
    path.write_bytes(content)
    assert read_scores(path, pairs, SETTINGS, step="weights") == rewards
    first = json.loads(content.splitlines()[0])
    assert first == {
        "line": 1,
        "lengths": [2],
        "chosen": list(rewards[1].chosen),
        "rejected": list(rewards[1].rejected),
        "settings": SETTINGS,
    }


def test_a_finished_file_needs_no_model(whole, tmp_path):
    rewards, content = whole
    path = tmp_path / "rewards.jsonl"
    path.write_bytes(content)
    never = Counted(None)
    assert score_to_file(lambda: never, partial_pairs(), path, SETTINGS, step="weights", chunk=4) == rewards
    assert never.rows == []
    assert path.read_bytes() == content


@pytest.mark.parametrize("calls", [0, 1, 2])
def test_an_interrupted_run_continues_with_what_is_missing(scorer, whole, tmp_path, calls):
    rewards, content = whole
    path = tmp_path / "rewards.jsonl"
    with pytest.raises(KeyboardInterrupt):
        score_to_file(lambda: Counted(scorer, calls), partial_pairs(), path, SETTINGS, step="weights", chunk=4)
    assert len(path.read_bytes().splitlines()) == 4 * calls
    with pytest.raises(RowFileError, match=rf"rewards of {4 * calls} of 11 pairs, row {4 * calls + 1} is the first"):
        read_scores(path, partial_pairs(), SETTINGS, step="weights")
    rest = Counted(scorer)
    assert score_to_file(lambda: rest, partial_pairs(), path, SETTINGS, step="weights", chunk=4) == rewards
    assert rest.rows == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11]][calls:]
    assert path.read_bytes() == content


def test_a_file_torn_within_a_slice_is_completed_to_the_same_bytes(scorer, whole, tmp_path):
    rewards, content = whole
    path = tmp_path / "rewards.jsonl"
    lines = content.splitlines(keepends=True)
    for complete in range(len(lines)):
        for torn in (0, 1, len(lines[complete]) - 1):
            path.write_bytes(b"".join(lines[:complete]) + lines[complete][:torn])
            rest = Counted(scorer)
            resumed = score_to_file(lambda rest=rest: rest, partial_pairs(), path, SETTINGS, step="weights", chunk=4)
            assert resumed == rewards
            # The slice is scored as a whole, in the company that its rewards had before.
            assert rest.rows[0] == list(range(1, 12))[complete // 4 * 4 :][:4]
            assert path.read_bytes() == content


def test_a_run_killed_by_the_system_continues(scorer, whole, tmp_path):
    rewards, _ = whole
    path = tmp_path / "rewards.jsonl"
    script = (
        "import os, signal, sys\n"
        "from tests.ggro_hf.training.test_reward_file import *\n"
        "class Killed(Counted):\n"
        "    def score(self, pairs):\n"
        "        if len(self.rows) == 2: os.kill(os.getpid(), signal.SIGKILL)\n"
        "        return super().score(pairs)\n"
        "killed = Killed(small_scorer())\n"
        "score_to_file(lambda: killed, partial_pairs(), sys.argv[1], SETTINGS, step='weights', chunk=4)\n"
    )
    killed = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert len(path.read_bytes().splitlines()) == 8
    resumed = score_to_file(lambda: scorer, partial_pairs(), path, SETTINGS, step="weights", chunk=4)
    # Two processes may round differently.
    for row, own in resumed.items():
        assert own.chosen == pytest.approx(rewards[row].chosen, abs=1e-5)
    assert [json.loads(line)["line"] for line in path.read_bytes().splitlines()] == list(range(1, 12))


def test_a_full_disk_is_named_and_a_later_run_continues(scorer, whole, tmp_path):
    rewards, content = whole
    path = tmp_path / "rewards.jsonl"
    lines = content.splitlines(keepends=True)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Ends within the second slice.
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(b"".join(lines[:5])) + 9, before[1]))
    try:
        with pytest.raises(OSError, match=r"rewards\.jsonl"):
            score_to_file(lambda: scorer, partial_pairs(), path, SETTINGS, step="weights", chunk=4)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_bytes() == b"".join(lines[:4])
    assert score_to_file(lambda: scorer, partial_pairs(), path, SETTINGS, step="weights", chunk=4) == rewards
    assert path.read_bytes() == content


def test_a_disk_that_fails_to_keep_a_row(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"

    def full(_):
        raise OSError(28, "No space left on device")

    with RowFile(path, SETTINGS) as rows:
        rows.append(1, {"text": "é"})
        kept = path.read_bytes()
        with monkeypatch.context() as patch:
            patch.setattr("ggro_hf.jsonl.os.fsync", full)
            with pytest.raises(OSError, match=r"\[Errno 28\] No space left on device: .*rows\.jsonl"):
                rows.append(2, {"text": "é"})
        assert list(rows.rows) == [1]
        assert path.read_bytes() == kept
        rows.append(2, {"text": "é"})
    with RowFile(path, SETTINGS) as rows:
        assert list(rows.rows) == [1, 2]


def test_another_data_set_and_other_settings_are_named(whole, tmp_path):
    path = tmp_path / "rewards.jsonl"
    path.write_bytes(whole[1])
    pairs = partial_pairs()
    for settings, message in (
        (
            {**SETTINGS, "data": "fedcba9876543210", "dtype": "x"},
            "fingerprint is 0123456789abcdef, this one's is fedcba98",
        ),
        ({**SETTINGS, "reference": "other"}, "reference was 'tiny', is 'other'"),
    ):
        with pytest.raises(RowFileError, match=message):
            score_to_file(lambda: None, pairs, path, settings, step="weights")
        with pytest.raises(RowFileError, match=message):
            read_scores(path, pairs, settings, step="weights")
    assert path.read_bytes() == whole[1]


def test_somebody_elses_file_is_left_alone(tmp_path):
    path = tmp_path / "notes"
    for content in (b'{"prompt": "a"}\n', b"notes"):
        path.write_bytes(content)
        for use in (
            lambda: score_to_file(lambda: None, partial_pairs(), path, SETTINGS, step="weights"),
            lambda: read_scores(path, partial_pairs(), SETTINGS, step="weights"),
        ):
            with pytest.raises(RowFileError, match="not written by `ggro prm weights`; choose another file"):
                use()
        assert path.read_bytes() == content


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lengths": [3]}, r"row 1: rewards at lengths \[3\], but the data has \[2\]"),
        ({"chosen": []}, "row 1: 'chosen' must be a number for each of 1 lengths"),
        ({"rejected": ["1"]}, "row 1: 'rejected' must be a number"),
        ({"rejected": [True]}, "row 1: 'rejected' must be a number"),
        ({"chosen": None}, "row 1: 'chosen' must be a number"),
    ],
)
def test_an_edited_row_is_named(whole, tmp_path, change, message):
    path = tmp_path / "rewards.jsonl"
    first, rest = whole[1].split(b"\n", 1)
    path.write_bytes(json.dumps(json.loads(first) | change).encode() + b"\n" + rest)
    with pytest.raises(RowFileError, match=message):
        score_to_file(lambda: None, partial_pairs(), path, SETTINGS, step="weights")
    path.write_bytes(first.replace(b'"chosen": [', b'"chosen": [1e999], "x": [') + b"\n" + rest)
    with pytest.raises(RowFileError, match="row 1: 'chosen' must be a number"):
        read_scores(path, partial_pairs(), SETTINGS, step="weights")


def test_rows_of_several_processes_reading_at_once_and_a_second_writer(whole, tmp_path):
    rewards, content = whole
    path = tmp_path / "rewards.jsonl"
    path.write_bytes(content + b'{"line": 12, "len')
    with RowFile(path, SETTINGS):
        assert read_scores(path, partial_pairs(), SETTINGS, step="weights") == rewards
        with pytest.raises(RowFileError, match="another run"):
            score_to_file(lambda: None, partial_pairs(), path, SETTINGS, step="weights")


def test_reading_what_is_not_there_makes_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing"):
        read_scores(tmp_path / "missing", partial_pairs(), SETTINGS, step="weights")
    assert not list(tmp_path.iterdir())


def test_rows_that_occur_twice_and_slices_of_nothing_are_refused(tmp_path):
    with pytest.raises(ValueError, match="row 3 occurs twice"):
        score_to_file(lambda: None, partial_pairs([1, 3, 3]), tmp_path / "x", SETTINGS, step="weights")
    with pytest.raises(ValueError, match="chunk is 0"):
        score_to_file(lambda: None, partial_pairs(), tmp_path / "x", SETTINGS, step="weights", chunk=0)


def test_damaged_weights_stop_with_the_row_named_and_keep_what_was_scored(tmp_path):
    broken = small_scorer()
    pairs = partial_pairs()
    with torch.no_grad():
        # Only row 6 has this word.
        token = broken.reader.tokenizer("~", add_special_tokens=False)["input_ids"][0]
        broken.model.get_input_embeddings().weight[token] = torch.nan
    pairs[5] = replace(pairs[5], pair=replace(pairs[5].pair, rejected="an ~"))
    path = tmp_path / "rewards.jsonl"
    with pytest.raises(ValueError, match="row 6: the reward is nan"):
        score_to_file(lambda: broken, pairs, path, SETTINGS, step="weights", chunk=4)
    assert len(path.read_bytes().splitlines()) == 4
