"""The four steps of a recipe through the command: in order, again, out of order, with every kind of model and data."""

import json
import shutil

import torch
from safetensors.torch import load_file

from ggro_hf.cli import main
from ggro_hf.training import sp_prm
from ggro_hf.training.partial_file import read_partial
from tests.ggro_hf.training.conftest import (
    QUICK,
    STEPS,
    bare_tokenizer,
    files,
    rows,
    write_rows,
)
from tests.ggro_hf.training.preference_data import (
    causal_classifier,
)


def test_four_steps_in_order_and_again(prm, tmp_path):
    command, output = prm(), tmp_path / "out"
    printed = {step: command(step) for step in STEPS}
    assert "rows read" in printed["data"] and "8 pairs are held out" in printed["data"]
    assert "of 16 pairs have a comparison that counts" in printed["weights"]
    assert "train_loss" in printed["train"] and "eval_agreement" in printed["train"]
    assert "AR_RM-SC" in printed["agreement"] and "before" in printed["agreement"] and "after" in printed["agreement"]
    assert {path.name for path in (output / "agreement").iterdir()} >= {
        "agreement.txt",
        "agreement.json",
        "agreement.png",
        "reward-gap.png",
        "consistency.png",
    }
    assert {row["line"] for row in map(json.loads, (output / "reference.jsonl").open())} == {
        partial.pair.row for partial in read_partial(output / "data" / "train.jsonl")
    }
    done = files(output)
    again = {step: command(step) for step in STEPS}
    # The first time the trainer prints its log before.
    assert all(printed[step].endswith(text) for step, text in again.items())
    drawn = {path for path in done if path.parent.name == "agreement" and not path.name.startswith("rewards-")}
    again = files(output)
    assert again.keys() == done.keys()
    assert [path for path in done if path not in drawn and again[path] != done[path]] == []


def test_no_step_before_its_predecessor(prm, tmp_path):
    command = prm()
    for step in ("weights", "train", "agreement"):
        assert "run `ggro prm data` first" in command.refused(step)
    command("data")
    assert "run `ggro prm weights` first" in command.refused("train")
    assert "run `ggro prm train` first" in command.refused("agreement")
    assert not (tmp_path / "out" / "checkpoints").exists()
    # The ablation needs no weights.
    ablation = command.change(weights={"mode": "none"})
    assert "mode is none" in ablation("weights")
    ablation("train")


def test_other_settings_are_refused_with_what_differs(prm, sources, tmp_path):
    command = prm()
    command("data", "weights", "train")
    before = files(tmp_path / "out")
    shorter = command.change(data=command.values["data"] | {"max_tokens": 50})
    for step in STEPS:
        message = shorter.refused(step)
        assert "out/data was made with other settings (data.max_tokens was None, is 50)" in message
        assert "choose another output, or delete it" in message
    message = command.change(partial={"segments": 2}).refused("train")
    assert "partial.segments was 5, is 2" in message
    other = command.change(weights={"reference": str(sources / "causal")})
    for step in ("weights", "train"):
        assert "reference was" in other.refused(step)
    slower = command.change(train={"arguments": command.values["train"]["arguments"] | {"learning_rate": 1e-4}})
    message = slower.refused("train")
    assert (
        "out/checkpoints was made with other settings (train.arguments.learning_rate was 0.001, is 0.0001)" in message
    )
    assert files(tmp_path / "out") == before
    # What the message says to delete is all there is to delete.
    shutil.rmtree(tmp_path / "out" / "checkpoints")
    assert "run `ggro prm train` first" in slower.refused("agreement")
    slower("train", "agreement")


def test_a_wrong_argument_may_be_corrected(prm, tmp_path):
    command = prm(arguments=QUICK | {"load_best_model_at_end": True})
    command("data", "weights")
    assert command.refused("train").startswith("train: arguments: ")
    right = command.change(
        train={"arguments": command.values["train"]["arguments"] | {"load_best_model_at_end": False}}
    )
    right("train")


def test_a_metric_that_is_not_measured(prm):
    measured = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "load_best_model_at_end": True}
    command = prm(arguments=QUICK | measured | {"metric_for_best_model": "accuracy"}, weights={"mode": "none"})
    command("data")
    message = command.refused("train")
    assert message.startswith("train: arguments: ") and "eval_accuracy" in message and "eval_agreement_2" in message


def test_a_wrong_lora_table_may_be_corrected(prm):
    command = prm()
    command("data", "weights")
    train = command.values["train"]
    message = command.change(train=train | {"lora": {"rank": 4}}).refused("train")
    assert message.startswith("train.lora: ") and "rank" in message
    message = command.change(train=train | {"lora": {"r": 4, "target_modules": ["nothing"]}}).refused("train")
    assert message.startswith("train.lora: ")
    command.change(train=train | {"lora": {"r": 4}})("train")


def test_modes_of_weighting(prm, sources, tmp_path, capsys):
    losses = {}
    for mode in ("reference", "mask", "none"):
        output = str(tmp_path / mode)
        command = prm().change(output=output, weights={"mode": mode, "reference": str(sources / "reference")})
        command("data", "weights")
        losses[mode] = command("train")
        record = json.loads((tmp_path / mode / "checkpoints" / "record.json").read_text())
        assert record["done"] and record["settings"]["weights"]["mode"] == mode
        assert (tmp_path / mode / "reference.jsonl").exists() == (mode != "none")
    assert len(set(losses.values())) == 3


def test_rewards_of_another_data_set_are_refused(prm, tmp_path):
    first = prm()
    first("data", "weights")
    second = first.change(output=str(tmp_path / "second"), seed=4)
    second("data")
    shutil.copy(tmp_path / "out" / "reference.jsonl", tmp_path / "second" / "reference.jsonl")
    for step in ("weights", "train"):
        message = second.refused(step)
        assert "holds the rewards of another data set: its fingerprint is" in message
        for directory in ("out", "second"):
            record = json.loads((tmp_path / directory / "data" / "record.json").read_text())
            assert record["fingerprint"] in message
    (tmp_path / "second" / "reference.jsonl").write_text("")
    assert "repeat `ggro prm weights`" in second.refused("train")


def test_a_reference_with_a_tokenizer_of_its_own(prm, sources):
    command = prm(weights={"reference": str(sources / "bare")}, partial={"method": "tlt"})
    assert "have a comparison that counts" in command("data", "weights")
    command("train")


def test_a_tokenizer_without_padding_or_end(prm, sources, tmp_path):
    command = prm(model="bare", weights={"mode": "none"})
    message = command.refused("data")
    assert str(sources / "bare") in message and "padding token; set tokenizer.pad_token" in message
    shutil.copytree(sources / "bare", tmp_path / "padded")
    tokenizer = bare_tokenizer()
    tokenizer.pad_token = "~"
    tokenizer.save_pretrained(tmp_path / "padded")
    command.change(model={"name": str(tmp_path / "padded")})("data", "train", "agreement")


def test_models_are_measured_in_the_dtype_of_the_training(prm, tmp_path):
    command = prm(weights={"mode": "none"})
    command.change(train={"dtype": "bfloat16", **command.values["train"]})("data", "train", "agreement")
    assert load_file(tmp_path / "out" / "model" / "model.safetensors")["score.weight"].dtype == torch.bfloat16
    for path in (tmp_path / "out" / "agreement").glob("rewards-*.jsonl"):
        assert json.loads(path.read_text().splitlines()[0])["settings"]["dtype"] == "bfloat16"


def test_stopped_by_the_keyboard(prm, monkeypatch, capsys):
    command = prm()

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(sp_prm, "select", interrupt)
    assert main(["prm", "data", str(command.path)]) == 130
    assert capsys.readouterr().err.endswith("ggro: stopped; repeat the command to continue\n")


def test_an_encoder_in_words_joined_anew(prm, tmp_path):
    words = {"unit": "word", "rejoin_words": True, "min_length": 2}
    command = prm(model="encoder", partial=words, weights={"reference": "", "mode": "none"})
    command.values["weights"] = {"mode": "none"}
    command = command.change()
    assert "responses, words" in command("data")
    command("train", "agreement")
    lengths = {
        length for partial in read_partial(tmp_path / "out" / "data" / "train.jsonl") for length in partial.lengths
    }
    assert max(length for length in lengths if length is not None) <= 12 and 1 not in lengths


def test_a_chat_format(prm, sources, tmp_path):
    messages = [
        {"role": "user", "content": "Who is it?"},
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": "And then?"},
    ]
    values = rows(20)
    for row in values[:10]:
        row["prompt"] = messages
    values[4]["prompt"] = [{"role": "system", "content": "Be kind."}, *messages]
    data = {"source": write_rows(tmp_path / "chats.jsonl", values), "held_out_pairs": 4}
    chatty = {"name": str(sources / "chatty"), "format": "chat"}
    command = prm(data=data).change(model=chatty, weights={"mode": "mask", "reference": str(sources / "chatty")})
    printed = command("data")
    assert "refused by the chat template  1 (row 5)" in printed
    command("weights", "train", "agreement")
    said = command.change(output=str(tmp_path / "a"), model={"name": str(sources / "causal")}).refused("data")
    assert "chats.jsonl (train): the prompt of row 1 is a list of messages" in said and '"dialogue"' in said
    for text in ("{prompt}", "{response", "{a} {response}"):
        unread = command.change(output=str(tmp_path / "a"), model={"name": str(sources / "causal"), "format": text})
        assert unread.refused("data").startswith(f"model: format {text!r}: ")
    message = command.change(output=str(tmp_path / "b"), model={"name": str(sources / "causal"), "format": "chat"})
    assert message.refused("data").startswith('model: format is "chat", but the tokenizer has no chat template')
    other = command.change(output=str(tmp_path / "c"), weights={"reference": str(sources / "reference")})
    other("data")
    message = other.refused("weights")
    assert message.startswith(f"reference {str(sources / 'reference')!r}: row ") and "no chat template" in message


def test_held_out_pairs_of_another_source(prm, tmp_path):
    held_out = rows(9)[6:]
    held_out.append({"prompt": "a", "chosen": "same", "rejected": "same"})
    data = {"held_out": write_rows(tmp_path / "test.jsonl", held_out)}
    command = prm()
    command = command.change(data={"source": command.values["data"]["source"], **data})
    assert "3 pairs are held out" in command("data")
    assert len(read_partial(tmp_path / "out" / "data" / "train.jsonl")) == 24
    measured = read_partial(tmp_path / "out" / "data" / "held_out.jsonl")
    assert [partial.pair.row for partial in measured] == [1, 2, 3]
    assert all(partial.lengths == (2, 5, None) for partial in measured)


def test_held_out_pairs_are_not_trained_on(prm, tmp_path):
    command = prm()
    command("data")
    trained, measured = (
        {partial.pair.row for partial in read_partial(tmp_path / "out" / "data" / f"{name}.jsonl")}
        for name in ("train", "held_out")
    )
    assert len(measured) == 8 and len(trained) == 16 and not trained & measured
    too_many = command.change(output=str(tmp_path / "b"), data=command.values["data"] | {"held_out_pairs": 24})
    assert "held_out_pairs is 24, but there are only 24 pairs" in too_many.refused("data")


def test_agreement_without_held_out_pairs(prm):
    command = prm()
    command = command.change(data={"source": command.values["data"]["source"]}, weights={"mode": "none"})
    assert "0 pairs are held out" in command("data")
    command("train")
    assert "no pairs are held out" in command.refused("agreement")


def test_agreement_with_people_a_judge_and_other_models(prm, sources, tmp_path, monkeypatch):
    command = prm(weights={"mode": "none"})
    command("data", "train")
    rewards = tmp_path / "out" / "agreement"
    command("agreement")
    assert len(list(rewards.glob("rewards-*.jsonl"))) == 2
    lengths, compare = (
        {"lengths": [2, 5]},
        {"compare": {"a/b": str(sources / "encoder"), "bare": str(sources / "bare")}},
    )
    judged = command.change(agreement=lengths | compare | {"judge": str(sources / "reference")})
    table = judged("agreement")
    assert "AR_SC-HP" in table and "a/b" in table and "bare" in table
    assert len(list(rewards.glob("rewards-*.jsonl"))) == 5
    verdicts = [
        {"row": partial.pair.row, "length": length, "preference": 1}
        for partial in read_partial(tmp_path / "out" / "data" / "held_out.jsonl")
        for length in partial.lengths
    ]
    people = write_rows(tmp_path / "people.jsonl", verdicts)

    def never(*_, **__):
        raise AssertionError("a model was loaded whose rewards are there")

    with monkeypatch.context() as patched:
        patched.setattr(sp_prm, "scorer_of", never)
        command.change(agreement=lengths | {"preferences": people})("agreement")
    for record in json.loads((rewards / "agreement.json").read_text()):
        assert record["sc_hp_mean"] == 1.0 and record["rm_hp_mean"] == record["rm_sc_mean"]
    (tmp_path / "people.jsonl").write_text('{"row": 1}\n')
    asked = command.change(agreement=lengths | {"preferences": people})
    assert "people.jsonl, line 1: has no field 'length'" in asked.refused("agreement")
    asked = command.change(agreement=lengths | {"preferences": str(tmp_path / "none.jsonl")})
    assert "none.jsonl" in asked.refused("agreement")
    asked = command.change(agreement=lengths | {"compare": {"none": str(tmp_path / "none")}})
    assert f"{str(tmp_path / 'none')!r}: there is no such directory" in asked.refused("agreement")


def test_a_model_that_was_replaced_is_measured_anew(prm, sources, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(sources / "reference", copy)
    command = prm(weights={"mode": "none"}, agreement={"lengths": [2, 5], "compare": {"copy": str(copy)}})
    first = command("data", "train", "agreement")
    causal_classifier(seed=20).save_pretrained(copy)
    assert command("agreement") != first
