"""The four steps of a recipe when they are killed, given damaged or wrong files, or run out of something."""

import errno
import json
import math
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ggro_hf.jsonl import RowFile
from ggro_hf.training import fine_tune, sp_prm
from ggro_hf.training.recipe import recipe_from
from ggro_hf.training.step import StepError
from tests.ggro_hf.training.conftest import (
    STEPS,
    referenced,
    rows,
)


class Killed(BaseException):
    """Ends a step like a kill: nothing catches it."""


def test_killed_between_and_within_the_steps(prm, tmp_path, monkeypatch):
    whole = prm()
    expected = whole(*STEPS)
    command = whole.change(output=str(tmp_path / "killed"))
    output = tmp_path / "killed"

    def killed(*_, **__):
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(sp_prm, "statistics", killed)
        with pytest.raises(Killed):
            command("data")
    assert "run `ggro prm data` first" in command.refused("weights")
    assert not list(output.rglob("*.tmp"))
    # Nothing was finished: other settings may be taken.
    command.change(partial={"segments": 2})("data")
    assert "partial.segments was 2, is 5" in command.refused("data")
    shutil.rmtree(output)
    command("data")
    plain = RowFile.extend

    def torn(self, results):
        plain(self, list(results)[:5])
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(RowFile, "extend", torn)
        with pytest.raises(Killed):
            command("weights")
    assert "has rewards of 5 of 16 pairs" in command.refused("train")
    with (output / "reference.jsonl").open("a") as file:
        file.write('{"line": 1')
    command("weights")
    with monkeypatch.context() as patched:
        patched.setattr(fine_tune, "_save", killed)
        with pytest.raises(Killed):
            command("train")
    assert "run `ggro prm train` first" in command.refused("agreement")
    command("train")
    assert command("agreement") == expected
    one, other = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("out", "killed"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_damaged_files_say_what_to_delete(prm, tmp_path):
    command, data = prm(weights={"mode": "none"}), tmp_path / "out" / "data"
    for damage in ("", "{", "[]", '{"settings": 3, "done": true}', '{"settings": {}}', "\ufffe"):
        command("data")
        whole = (data / "record.json").read_text()
        (data / "record.json").write_text(damage)
        for step in ("data", "train"):
            message = command.refused(step)
            assert str(data / "record.json") in message and f"delete {data}" in message
        (data / "record.json").write_text(whole)
    for name in ("train", "held_out"):
        path = data / f"{name}.jsonl"
        whole = path.read_bytes()
        for content in (whole[:-20], whole.replace(b"cat", b"dog", 1), b"", None):
            if content is None:
                path.unlink()
            else:
                path.write_bytes(content)
            message = command.refused("train")
            assert str(path) in message and f"delete {data} and run `ggro prm data` again" in message
        path.write_bytes(whole)
    command("train")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("labels", "has 2 labels, but a reward is one number"),
        ("language model", "has 2 labels, but a reward is one number"),
        ("mute", "comes without a tokenizer"),
        ("none", "there is no such directory; give a directory or a hub id"),
        (".", "no config.json in it"),
    ],
)
def test_models_that_are_no_reward_models(name, message, prm, sources, tmp_path):
    command = prm(model=name)
    said = command.refused("data")
    assert message in said and str(sources / name) in said
    assert not (tmp_path / "out").exists()
    command = prm(weights={"reference": str(sources / name)})
    command("data")
    said = command.refused("weights")
    assert message in said and str(sources / name) in said


def test_a_model_of_the_hub_that_is_not_there(prm, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    command = prm().change(model={"name": "nobody/nothing-at-all"})
    message = command.refused("data")
    assert "nobody/nothing-at-all" in message


def test_a_reference_model_with_damaged_weights(prm, sources, tmp_path):
    command = prm(weights={"reference": str(sources / "broken")})
    command("data")
    message = command.refused("weights")
    assert message.startswith(f"reference {str(sources / 'broken')!r}: row ") and "the reward is nan" in message
    truncated = tmp_path / "truncated"
    shutil.copytree(sources / "reference", truncated)
    content = (truncated / "model.safetensors").read_bytes()
    (truncated / "model.safetensors").write_bytes(content[:-100])
    assert str(truncated) in command.change(weights={"reference": str(truncated)}).refused("weights")


def test_a_loss_that_is_no_number_ends_the_training(prm, tmp_path):
    command = prm(model="broken", weights={"mode": "none"})
    command("data")
    message = command.refused("train")
    assert message.startswith("loss is nan at step 0 (rows ") and "non_finite_batch_0.safetensors" in message
    assert (tmp_path / "out" / "checkpoints" / "non_finite_batch_0.safetensors").is_file()
    assert not (tmp_path / "out" / "model").exists()


def test_several_processes_are_for_training_alone(prm, monkeypatch):
    command = prm()
    monkeypatch.setenv("WORLD_SIZE", "2")
    for step in ("data", "weights", "agreement"):
        assert f"ggro prm {step} is for one process" in command.refused(step)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (b"", "holds no rows"),
        (b'{"prompt": "a", "chosen": "b"}\n', "line 1: no 'rejected', but 'prompt', 'chosen'"),
        (
            b'{"prompt": "a", "chosen": "b", "rejected": "b"}\n',
            "no preference pair of 1 is left: 1 identical responses",
        ),
        (b'\n{"prompt": "a", "chosen": " ", "rejected": "b"}\n', "is left: 1 empty response"),
        (b'{"prompt": "a", "chosen": 3, "rejected": "b"}\n', "line 1: 'chosen' is a int; wanted a text"),
        (b"not json\n", "line 1: not valid JSON"),
    ],
)
def test_pairs_that_cannot_be_used(lines, message, prm, tmp_path):
    path = tmp_path / "odd.jsonl"
    path.write_bytes(lines)
    said = prm(data={"source": str(path)}).refused("data")
    assert message in said and "odd.jsonl" in said
    assert not list(tmp_path.glob("out/data/*.jsonl"))


def test_a_model_whose_context_is_too_short(prm):
    command = prm()
    data = command.values["data"]
    message = command.change(data=data | {"max_tokens": 3}).refused("data")
    assert "no preference pair of 24 is left: 24 over-long" in message


def test_rows_of_other_systems_and_duplicates(prm, tmp_path):
    values = rows(12)
    text = "\r\n".join(json.dumps(value) for value in [*values, values[0], values[0]]) + "\r\n\r\n"
    (tmp_path / "odd.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode())
    printed = prm(data={"source": str(tmp_path / "odd.jsonl"), "held_out_pairs": 3})("data", "weights")
    assert "of 11 pairs have" in printed


def test_a_full_disk(prm, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    command = prm()
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        assert "train.jsonl" in command.refused("data") and "No space left" in command.refused("data")
    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", full)
        message = command.refused("data")
        assert "No space left" in message and "record.json" in message
    command("data")
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        message = command.refused("weights")
        assert "No space left" in message and "reference.jsonl" in message
    command("weights")
    with monkeypatch.context() as patched:
        # As torch.save says it.
        def enforce(*_, **__):
            raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")

        patched.setattr(torch, "save", enforce)
        message = command.refused("train")
        assert "cannot write a checkpoint to" in message and "make room on the disk" in message
    command("train")


def test_too_little_memory(prm, monkeypatch):
    command = prm(weights={"mode": "none"})
    command("data")

    def too_much(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee docs")

    monkeypatch.setattr(sp_prm, "fine_tune", too_much)
    message = command.refused("train")
    assert message.startswith("CUDA out of memory. Tried to allocate 2.00 GiB. Lower per_device_train_batch_size")


def test_the_library_raises_what_the_command_says(sources, tmp_path):
    recipe = recipe_from(referenced(sources, tmp_path / "out"))
    with pytest.raises(StepError, match="run `ggro prm data` first"):
        sp_prm.make_weights(recipe, "cpu")
    with pytest.raises(StepError, match="run `ggro prm data` first"):
        sp_prm.train(recipe)
    assert math.isinf(recipe_from(referenced(sources, "x", weights={"mode": "none", "clamp": math.inf})).weights.clamp)
