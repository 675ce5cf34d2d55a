"""Training from a recipe: killed and continued, over processes, with LoRA; what it leaves, and how it gives up."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, TrainingArguments

from ggro_hf.cli import main
from ggro_hf.rewards import EncoderReward, RewardModel, load_reward
from ggro_hf.training import sp_prm
from ggro_hf.training.fine_tune import TrainingSettings, last_checkpoint
from ggro_hf.training.presets import PRESETS
from ggro_hf.training.recipe import recipe_from
from ggro_hf.training.step import StepError
from tests.ggro_hf.small_models import small_policy, small_tokenizer
from tests.ggro_hf.training.preference_data import (
    VOCABULARY,
    causal_classifier,
    encoder_classifier,
    preference_pairs,
)
from tests.ggro_hf.training.recipes import tables, write_toml

TOKENIZER = small_tokenizer()
ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A directory with preference pairs, a causal and an encoder reward model, and a policy."""
    root = tmp_path_factory.mktemp("sources")
    rows = [{"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected} for pair in preference_pairs(40)]
    (root / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    models = {
        "causal": causal_classifier(),
        "other": causal_classifier(seed=7),
        "encoder": encoder_classifier(TOKENIZER),
        "policy": small_policy(seed=0, vocabulary=VOCABULARY, gain=2.0, dtype=torch.float32),
    }
    for name, model in models.items():
        model.save_pretrained(root / name)
        TOKENIZER.save_pretrained(root / name)
    return root


def prepared(sources, output, **changes):
    recipe = recipe_from(tables(sources, output, **changes))
    sp_prm.make_data(recipe)
    sp_prm.make_weights(recipe, "cpu")
    return recipe


def weights_of(output):
    return load_file(output / "model" / "model.safetensors")


def assert_same(one, other, tolerance=0.0):
    assert one.keys() == other.keys()
    for name, values in one.items():
        assert (values.double() - other[name].double()).abs().max() <= tolerance, name


def command(*arguments):
    return [sys.executable, "-m", "ggro_hf", *map(str, arguments)]


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / 'python'}{os.pathsep}{ROOT}"}


def test_the_trained_model_is_read_by_rewards_and_by_transformers(sources, tmp_path):
    recipe = prepared(sources, tmp_path / "out")
    before = (sources / "causal" / "model.safetensors").read_bytes()
    sp_prm.train(recipe)
    trained = recipe.output / "model"
    assert {path.name for path in trained.iterdir()} >= {"model.safetensors", "config.json", "tokenizer.json"}
    assert not list(trained.glob("*.bin"))
    assert (sources / "causal" / "model.safetensors").read_bytes() == before
    reward = load_reward(trained, TOKENIZER)
    assert isinstance(reward, RewardModel)
    ids = TOKENIZER("Once there was a cat")["input_ids"]
    plain = AutoModelForSequenceClassification.from_pretrained(trained)
    with torch.no_grad():
        expected = plain(torch.tensor([ids])).logits.item()
    assert reward.score(ids) == pytest.approx(expected, rel=1e-5)
    assert reward.score(ids) != pytest.approx(RewardModel.from_pretrained(sources / "causal").score(ids), rel=1e-3)
    assert list((recipe.output / "checkpoints" / "runs").rglob("events.out.tfevents.*"))


def test_every_decoder_takes_the_result(sources, tmp_path, capsys):
    recipe = prepared(sources, tmp_path / "out")
    sp_prm.train(recipe)
    models = ["--policy", str(sources / "policy"), "--reward", str(recipe.output / "model")]
    for method in ("args", "cbs", "tbs", "best-of-n", "ggro"):
        code = main(["generate", *models, "--method", method, "--prompt", "Who is", "--max-new-tokens", "6"])
        assert code == 0, capsys.readouterr().err
    for method in ("cards", "rejection-sampling"):
        options = ["--method", method, "--reward-threshold", "-100", "--max-new-tokens", "6"]
        assert main(["generate", *models, "--prompt", "Who is", *options]) == 0, capsys.readouterr().err


def test_an_encoder_is_trained_and_read_again(sources, tmp_path):
    recipe = prepared(sources, tmp_path / "out", model="encoder")
    sp_prm.train(recipe)
    assert isinstance(load_reward(recipe.output / "model", TOKENIZER), EncoderReward)


def test_a_killed_training_ends_with_the_same_weights(sources, tmp_path):
    arguments = {"num_train_epochs": 3, "save_steps": 2, "eval_steps": 24, "save_total_limit": 3}
    whole = prepared(sources, tmp_path / "whole", arguments=arguments)
    sp_prm.train(whole)
    killed = tables(sources, tmp_path / "killed", arguments=arguments)
    prepared(sources, tmp_path / "killed", arguments=arguments)
    recipe = write_toml(tmp_path / "recipe.toml", killed)
    process = subprocess.Popen(
        command("prm", "train", recipe), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    checkpoints = tmp_path / "killed" / "checkpoints"
    deadline = time.monotonic() + 120
    while last_checkpoint(checkpoints) is None and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    output = process.communicate()[0].decode()
    assert process.returncode == -signal.SIGKILL, output
    assert not (tmp_path / "killed" / "model").exists()
    # A checkpoint that the kill has torn: without its state, which comes last.
    torn = checkpoints / "checkpoint-1000"
    torn.mkdir()
    (torn / "model.safetensors").write_bytes(b"torn")
    done = subprocess.run(command("prm", "train", recipe), env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert_same(weights_of(tmp_path / "whole"), weights_of(tmp_path / "killed"))
    # Done is done.
    before = (tmp_path / "killed" / "model" / "model.safetensors").stat().st_mtime_ns
    assert main(["prm", "train", str(recipe)]) == 0
    assert (tmp_path / "killed" / "model" / "model.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize("lora", [None, {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0}])
def test_two_processes_train_as_one(sources, tmp_path, lora):
    # SGD: Adam would hide a factor.
    shared = {"optim": "sgd", "learning_rate": 0.05, "max_grad_norm": 0.0, "eval_steps": 1000, "save_steps": 1000}
    results, metrics = {}, {}
    for name, size in (("one", 4), ("two", 2)):
        values = tables(
            sources, tmp_path / name, arguments=shared | {"per_device_train_batch_size": size, "num_train_epochs": 1}
        )
        if lora is not None:
            values["train"]["lora"] = lora
        recipe = recipe_from(values)
        sp_prm.make_data(recipe)
        if name == "one":
            sp_prm.train(recipe)
        else:
            path = write_toml(tmp_path / "two.toml", values)
            # What `accelerate launch` starts too, which knows several processes on CPUs only through MPI.
            launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
            done = subprocess.run(
                [sys.executable, *launch, "-m", "ggro_hf", "prm", "train", str(path)],
                env=environment(),
                capture_output=True,
                text=True,
                timeout=120,
            )
            assert done.returncode == 0, done.stderr[-3000:]
        results[name] = weights_of(tmp_path / name)
        record = json.loads((tmp_path / name / "checkpoints" / "record.json").read_text())
        metrics[name] = {key: value for key, value in record["metrics"].items() if "agreement" in key or "gap" in key}
    start = load_file(sources / "causal" / "model.safetensors")
    moved = max((results["one"][name] - start[name]).abs().max() for name in start)
    assert moved > 1e-3
    assert_same(results["one"], results["two"], 1e-5)
    assert len(metrics["one"]) == 5
    assert metrics["two"] == pytest.approx(metrics["one"], rel=1e-4)


def test_lora_trains_few_weights_and_leaves_a_merged_model(sources, tmp_path):
    values = tables(sources, tmp_path / "out")
    values["train"]["lora"] = {"r": 4, "lora_alpha": 8}
    recipe = recipe_from(values)
    sp_prm.make_data(recipe)
    sp_prm.train(recipe)
    start, merged = load_file(sources / "causal" / "model.safetensors"), weights_of(recipe.output)
    assert start.keys() == merged.keys()
    changed = {name for name in start if not torch.equal(start[name], merged[name])}
    assert "score.weight" in changed and "model.embed_tokens.weight" not in changed
    assert any("q_proj" in name for name in changed)
    adapter = recipe.output / "adapter"
    assert (adapter / "adapter_model.safetensors").is_file()
    from peft import PeftModel

    base = AutoModelForSequenceClassification.from_pretrained(sources / "causal")
    adapted = PeftModel.from_pretrained(base, adapter).eval()
    plain = AutoModelForSequenceClassification.from_pretrained(recipe.output / "model")
    ids = torch.tensor([TOKENIZER("Once there was a cat")["input_ids"]])
    with torch.no_grad():
        assert torch.allclose(adapted(ids).logits, plain(ids).logits, atol=1e-5)
    assert isinstance(load_reward(recipe.output / "model", TOKENIZER), RewardModel)


def test_a_full_disk_ends_in_one_line_and_can_be_continued(sources, tmp_path):
    values = tables(sources, tmp_path / "out", arguments={"save_steps": 2})
    recipe = recipe_from(values)
    sp_prm.make_data(recipe)
    path = write_toml(tmp_path / "recipe.toml", values)
    limited = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, resource.RLIM_INFINITY)); "
        "from ggro_hf.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", limited, "prm", "train", str(path)], env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("ggro: error: ")
    assert "Traceback" not in done.stderr
    assert not (recipe.output / "model").exists()
    sp_prm.train(recipe)
    assert weights_of(recipe.output)


def test_settings_may_change_where_a_training_failed_before_its_first_checkpoint(sources, tmp_path):
    prepared(sources, tmp_path / "out")
    with pytest.raises(ValueError, match="fp16"):
        sp_prm.train(recipe_from(tables(sources, tmp_path / "out", arguments={"fp16": True, "bf16": True})))
    sp_prm.train(recipe_from(tables(sources, tmp_path / "out", arguments={"max_steps": 1})))
    assert weights_of(tmp_path / "out")
    with pytest.raises(StepError, match=r"train.arguments.max_steps was 1, is 2"):
        sp_prm.train(recipe_from(tables(sources, tmp_path / "out", arguments={"max_steps": 2})))


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_arguments_of_the_trainer(preset, tmp_path):
    settings = TrainingSettings(preset=preset, arguments={"use_cpu": True, "bf16": False, "learning_rate": 2e-6})
    args = settings.training_arguments(tmp_path, evaluates=False)
    assert isinstance(args, TrainingArguments)
    assert args.learning_rate == 2e-6 and args.lr_scheduler_type == "linear" and args.num_train_epochs == 1


def test_a_checkpoint_counts_once_it_is_whole(tmp_path):
    assert last_checkpoint(tmp_path) is None
    for step, state in ((2, '{"global_step": 2}'), (10, '{"global_step": 10}'), (12, '{"global_'), (14, None)):
        directory = tmp_path / f"checkpoint-{step}"
        directory.mkdir()
        if state is not None:
            (directory / "trainer_state.json").write_text(state)
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    # Within an epoch a last step would be taken twice; at its end there is none to take.
    ends = tmp_path / "checkpoint-20"
    ends.mkdir()
    for epoch, last in ((2.5, "checkpoint-10"), (3.0, "checkpoint-20")):
        (ends / "trainer_state.json").write_text(json.dumps({"global_step": 20, "max_steps": 20, "epoch": epoch}))
        assert last_checkpoint(tmp_path) == str(tmp_path / last)
    shutil.rmtree(ends)
    shutil.rmtree(tmp_path / "checkpoint-10")
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
