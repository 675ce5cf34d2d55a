"""docs/sp-prm.md says what is: its keys and their defaults are those of the recipe, and its recipes can be read."""

import re
import tomllib
from dataclasses import MISSING, fields
from pathlib import Path

import pytest

from ggro_hf.training import fine_tune
from ggro_hf.training.partial import PartialRecipe
from ggro_hf.training.presets import PRESETS
from ggro_hf.training.recipe import (
    AgreementSettings,
    DataSettings,
    ModelSettings,
    Recipe,
    ReferenceSettings,
    recipe_from,
)

GUIDE = (Path(__file__).parents[3] / "docs" / "sp-prm.md").read_text(encoding="utf-8")
TABLES = {
    "[model]": ModelSettings,
    "[data]": DataSettings,
    "[partial]": PartialRecipe,
    "[weights]": ReferenceSettings,
    "[train]": fine_tune.TrainingSettings,
    "[agreement]": AgreementSettings,
}
# They are tables themselves.
STEPS = ("model", "data", "partial", "weights", "train", "agreement")


def documented(heading):
    """Key and default of every row of the table under a heading."""
    section = GUIDE.split(f"\n### {heading}\n", 1)[1].split("\n##", 1)[0]
    return dict(re.findall(r"^\| `(\w+)` \| (.+?) \|", section, re.MULTILINE))


def value_of(cell):
    """A default as the guide writes it, in TOML."""
    assert cell.startswith("`"), cell
    return tomllib.loads(f"value = {cell.strip('`')}")["value"]


def assert_defaults(cells, entries):
    assert cells.keys() == {entry.name for entry in entries}
    for entry in entries:
        default = entry.default if entry.default_factory is MISSING else entry.default_factory()
        if default is MISSING:
            assert cells[entry.name] == "required", entry.name
        elif default is None:
            assert cells[entry.name] == "none", entry.name
        elif entry.name != "seed" or cells["seed"] != "that of the file":
            value = value_of(cells[entry.name])
            assert (tuple(value) if isinstance(default, tuple) else value) == default, entry.name


@pytest.mark.parametrize("table", TABLES)
def test_the_keys_of_a_table_are_documented_with_their_defaults(table):
    assert_defaults(documented(f"`{table}`"), fields(TABLES[table]))


def test_the_keys_at_the_top_are_documented_with_their_defaults():
    assert_defaults(documented("Top of the file"), [entry for entry in fields(Recipe) if entry.name not in STEPS])


def test_the_defaults_of_the_trainer_and_of_lora_are_documented():
    assert {key: value_of(cell) for key, cell in documented("`[train.arguments]`").items()} == fine_tune._DEFAULTS
    pytest.importorskip("peft")
    from peft import LoraConfig

    lora = {key: value_of(cell) for key, cell in documented("`[train.lora]`").items()}
    assert lora == {"task_type": "SEQ_CLS", "target_modules": "all-linear"}
    assert lora.keys() <= LoraConfig.__dataclass_fields__.keys()


def merged(one, other):
    """Tables of a recipe, those of another over them."""
    both = {**one, **other}
    tables = {key for key in one.keys() & other.keys() if isinstance(one[key], dict) and isinstance(other[key], dict)}
    return both | {key: merged(one[key], other[key]) for key in tables}


def test_the_recipe_and_its_changes_can_be_read():
    whole, *changes = [tomllib.loads(block) for block in re.findall(r"```toml\n(.*?)```", GUIDE, re.DOTALL)]
    assert recipe_from(whole).output == Path("out")
    assert set(STEPS) <= whole.keys() and len(changes) >= 5
    for change in changes:
        assert recipe_from(merged(whole, change)) != recipe_from(whole)


def test_presets_are_documented():
    section = GUIDE.split("\n## Presets", 1)[1].split("\n## ", 1)[0]
    rows = re.findall(r"^\| `([\w.-]+)` \| (\S+) \| (\d+) \|", section, re.MULTILINE)
    assert {name: (float(rate), int(pairs)) for name, rate, pairs in rows} == {
        name: (preset["learning_rate"], preset["per_device_train_batch_size"] * preset["gradient_accumulation_steps"])
        for name, preset in PRESETS.items()
    }


def test_the_configurations_of_the_launch_are_read_by_accelerate():
    pytest.importorskip("accelerate")
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    known = {action.dest for action in launch_command_parser()._actions}
    names = re.findall(r"\]\((accelerate/\w+\.yaml)\)", GUIDE)
    assert len(names) == 3
    for name in names:
        config = load_config_from_file(str(Path(__file__).parents[3] / "docs" / name))
        assert (config.fsdp_config.keys() | config.deepspeed_config.keys()) <= known, name
