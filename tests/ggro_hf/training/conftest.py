"""`ggro prm` on small models for the tests of its steps, and the files that they read."""

import json

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ggro_hf.cli import main
from tests.ggro_hf.small_models import small_policy, small_reward, small_tokenizer
from tests.ggro_hf.training.preference_data import (
    VOCABULARY,
    causal_classifier,
    encoder_classifier,
    preference_pairs,
)
from tests.ggro_hf.training.recipes import tables, write_toml

STEPS = ("data", "weights", "train", "agreement")
QUICK = {"num_train_epochs": 1, "max_steps": 2, "report_to": [], "eval_strategy": "no", "eval_on_start": False}

CHAT = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "<{{ m['role'] }}>{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def bare_tokenizer():
    """Bytes alone: other ids than the small tokenizer's, no padding, no begin and no end of a sequence."""
    vocabulary = {token: index for index, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A directory with preference pairs and models of all kinds."""
    root = tmp_path_factory.mktemp("sources")
    write_rows(root / "pairs.jsonl", rows(24))
    tokenizer, chatty = small_tokenizer(), small_tokenizer()
    chatty.chat_template = CHAT
    bare = small_reward("llama", seed=4, vocabulary=VOCABULARY, dtype=torch.float32, pad_token_id=None)
    broken = causal_classifier(seed=5)
    with torch.no_grad():
        broken.score.weight[0, 0] = float("nan")
    labels = small_reward("llama", seed=6, vocabulary=VOCABULARY, dtype=torch.float32)
    labels.config.num_labels = 2
    for name, model, its in (
        ("causal", causal_classifier(), tokenizer),
        ("reference", causal_classifier(seed=7), tokenizer),
        ("encoder", encoder_classifier(tokenizer), tokenizer),
        ("chatty", causal_classifier(seed=8), chatty),
        ("bare", bare, bare_tokenizer()),
        ("broken", broken, tokenizer),
        ("labels", labels, tokenizer),
        ("language model", small_policy(seed=0, vocabulary=VOCABULARY, dtype=torch.float32), tokenizer),
        ("mute", causal_classifier(), None),
    ):
        model.save_pretrained(root / name)
        if its is not None:
            its.save_pretrained(root / name)
    return root


def rows(count):
    return [
        {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected} for pair in preference_pairs(count)
    ]


def write_rows(path, values):
    path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
    return str(path)


def referenced(sources, output, **changes):
    """Tables with a reference model, trained for two steps."""
    return tables(
        sources, output, **{"weights": {"reference": str(sources / "reference")}, "arguments": QUICK} | changes
    )


class Command:
    """`ggro prm` on a recipe."""

    def __init__(self, capsys, path, values):
        self.capsys = capsys
        self.values = values
        self.path = write_toml(path, values)

    def __call__(self, *steps):
        """What the last of the steps prints."""
        for step in steps:
            self.capsys.readouterr()
            code = main(["prm", step, str(self.path)])
            printed = self.capsys.readouterr()
            assert code == 0, printed.err
        return printed.out

    def refused(self, step):
        """The one line in which a step gives up."""
        self.capsys.readouterr()
        code = main(["prm", step, str(self.path)])
        printed = self.capsys.readouterr()
        assert code == 2, printed.out
        assert "Traceback" not in printed.err
        *before, last = printed.err.rstrip().splitlines()
        assert last.startswith("ggro: error: "), printed.err
        # Progress bars may stand before it.
        assert not any("error" in line.lower() for line in before), printed.err
        return last.removeprefix("ggro: error: ")

    def change(self, **changes):
        """The same recipe but for these tables."""
        return Command(self.capsys, self.path.with_name(f"changed {self.path.name}"), self.values | changes)


@pytest.fixture
def prm(sources, tmp_path, capsys):
    """Makes a command of the changes to a recipe; its output is `tmp_path / "out"`."""

    def make(**changes):
        return Command(capsys, tmp_path / "recipe.toml", referenced(sources, tmp_path / "out", **changes))

    return make


def files(directory):
    """When every file under a directory was written."""
    return {path: path.stat().st_mtime_ns for path in sorted(directory.rglob("*")) if path.is_file()}
