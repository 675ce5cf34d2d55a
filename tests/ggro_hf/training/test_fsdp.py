"""Two processes that share a model by FSDP, started with the configurations of docs/accelerate, train as one does."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ggro_hf.training import sp_prm
from ggro_hf.training.recipe import read_recipe
from tests.ggro_hf.small_models import small_tokenizer
from tests.ggro_hf.training.preference_data import causal_classifier, preference_pairs

ROOT = Path(__file__).parents[3]
CONFIGURATIONS = ROOT / "docs" / "accelerate"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A directory with preference pairs and a reward model."""
    root = tmp_path_factory.mktemp("source")
    rows = [{"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected} for pair in preference_pairs(40)]
    (root / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    causal_classifier().save_pretrained(root / "model")
    small_tokenizer().save_pretrained(root / "model")
    return root


def prepared(source, output, *, batch, optimizer, lora=False):
    """A recipe file whose data are made."""
    path = output.with_suffix(".toml")
    path.write_text(
        f"""output = {json.dumps(str(output))}
seed = 3
[model]
name = {json.dumps(str(source / "model"))}
[data]
source = {json.dumps(str(source / "pairs.jsonl"))}
held_out_pairs = 8
[weights]
mode = "none"
[agreement]
lengths = [2, 5]
[train.arguments]
use_cpu = true
per_device_train_batch_size = {batch}
save_steps = 4
eval_steps = 1000
disable_tqdm = true
{optimizer}
{"[train.lora]" if lora else ""}
{"r = 4" if lora else ""}
{"lora_dropout = 0.0" if lora else ""}
""",
        encoding="utf-8",
    )
    sp_prm.make_data(read_recipe(path))
    return path


def launch(configuration, recipe):
    """Train in two processes; what they wrote to stderr."""
    start = ["-m", "accelerate.commands.launch", "--config_file", configuration, "--num_processes", 2]
    done = subprocess.run(
        [sys.executable, *map(str, start), "-m", "tests.ggro_hf.training.fsdp_on_cpu", "prm", "train", str(recipe)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / 'python'}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


def weights_of(output):
    return load_file(output / "model" / "model.safetensors")


def difference(one, other):
    assert one.keys() == other.keys()
    return max((values - other[name]).abs().max() for name, values in one.items())


# SGD: Adam would hide a factor.
SGD = 'optim = "sgd"\nlearning_rate = 0.05\nmax_grad_norm = 0.0'
ADAM = 'optim = "adamw_torch"\nlearning_rate = 1e-3'


@pytest.mark.parametrize("lora", [False, True])
def test_sharded_training_gives_the_weights_of_one_process(source, tmp_path, lora):
    one = prepared(source, tmp_path / "one", batch=4, optimizer=SGD, lora=lora)
    sp_prm.train(read_recipe(one))
    two = prepared(source, tmp_path / "two", batch=2, optimizer=SGD, lora=lora)
    launch(CONFIGURATIONS / "fsdp.yaml", two)
    # Only a sharded model is saved so.
    assert list((tmp_path / "two" / "checkpoints").glob("checkpoint-*/pytorch_model_fsdp.bin"))
    assert difference(weights_of(tmp_path / "one"), load_file(source / "model" / "model.safetensors")) > 1e-3
    assert difference(weights_of(tmp_path / "one"), weights_of(tmp_path / "two")) < 1e-5


def test_sharded_training_continues_from_a_checkpoint_in_parts_to_the_same_weights(source, tmp_path):
    configuration = tmp_path / "fsdp.yaml"
    text = (CONFIGURATIONS / "fsdp.yaml").read_text(encoding="utf-8")
    assert "FULL_STATE_DICT" in text
    configuration.write_text(text.replace("FULL_STATE_DICT", "SHARDED_STATE_DICT"), encoding="utf-8")
    recipe = prepared(source, tmp_path / "out", batch=2, optimizer=ADAM)
    launch(configuration, recipe)
    whole = weights_of(tmp_path / "out")
    # As a kill in the second half leaves it.
    shutil.rmtree(tmp_path / "out" / "model")
    shutil.rmtree(tmp_path / "out" / "checkpoints" / "checkpoint-8")
    launch(configuration, recipe)
    continued = weights_of(tmp_path / "out")
    assert difference(whole, load_file(source / "model" / "model.safetensors")) > 1e-3
    assert all(torch.equal(whole[name], continued[name]) for name in whole)
