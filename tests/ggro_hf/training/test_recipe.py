"""Recipes as people write them: every mistake is named by table and key before any work begins."""

from pathlib import Path

import pytest

from ggro_hf.training.recipe import RecipeError, read_recipe, recipe_from

SMALLEST = """\
output = "runs/first"
[model]
name = "some/reward"
[data]
source = "pairs.jsonl"
[weights]
mode = "none"
"""

WHOLE = """\
output = "runs/second"
seed = 7
batch_tokens = 4096

[model]
name = "some/reward"
revision = "v2"
format = "{prompt} -> {response}"

[data]
source = "some/pairs"
split = "train_prefs"
fields = {chosen = "better", rejected = "worse"}
held_out_pairs = 100
max_tokens = 512
overlong = "cut"

[partial]
unit = "word"
rejoin_words = true
fraction = 1
limit = 1000
seed = 3

[weights]
reference = "some/reference"
dtype = "bfloat16"
clamp = inf
normalise = true

[train]
preset = "rm-gemma-2b"
[train.lora]
r = 8
target_modules = ["q_proj", "v_proj"]
[train.arguments]
learning_rate = 1e-5

[agreement]
lengths = [5, 10]
judge = "some/judge"
compare = {other = "some/other"}
"""


def recipe(text, tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    return read_recipe(path)


def test_a_small_recipe_leaves_the_rest_to_defaults(tmp_path):
    made = recipe(SMALLEST, tmp_path)
    assert made.output == Path("runs/first")
    assert (made.model.format, made.data.split, made.partial.method, made.weights.mode) == (
        "auto",
        "train",
        "sst",
        "none",
    )
    assert made.seed == made.partial.seed == made.train.seed == 0
    assert made.agreement.lengths[0] == 5 and made.train.lora is None


def test_every_table_is_read(tmp_path):
    made = recipe(WHOLE, tmp_path)
    assert (made.model.revision, made.model.format) == ("v2", "{prompt} -> {response}")
    assert made.data.fields == {"chosen": "better", "rejected": "worse"}
    assert made.data.overlong == "cut" and made.batch_tokens == 4096
    # A table's own seed goes before that of all.
    assert (made.seed, made.partial.seed, made.train.seed) == (7, 3, 7)
    assert made.partial.fraction == 1.0 and isinstance(made.partial.fraction, float)
    assert made.weights.weighting.clamp is None and made.weights.weighting.normalise
    assert made.train.lora == {"r": 8, "target_modules": ["q_proj", "v_proj"]}
    assert made.agreement.lengths == (5, 10) and made.agreement.compare == {"other": "some/other"}
    assert made.train.preset == "rm-gemma-2b" and made.train.arguments == {"learning_rate": 1e-5}


def test_arguments_go_over_the_preset(tmp_path):
    text = SMALLEST + '[train]\npreset = "rm-gemma-2b"\n[train.arguments]\nlearning_rate = 2e-5\nbf16 = false\n'
    args = recipe(text + "use_cpu = true\n", tmp_path).train.training_arguments(tmp_path, evaluates=True)
    assert args.learning_rate == 2e-5
    assert args.gradient_accumulation_steps == 5 and args.gradient_checkpointing


def test_line_ends_and_byte_order_mark_of_other_systems(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_bytes(b"\xef\xbb\xbf" + WHOLE.replace("\n", "\r\n").encode())
    assert read_recipe(path) == recipe(WHOLE, tmp_path)


def test_paths_of_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    text = SMALLEST.replace("runs/first", "~/runs").replace("some/reward", "~/reward")
    made = recipe(text + '[agreement]\ncompare = {other = "~/other"}\n', tmp_path)
    assert made.output == tmp_path / "runs"
    assert made.model.name == str(tmp_path / "reward")
    assert made.agreement.compare == {"other": str(tmp_path / "other")}


def test_what_is_no_toml(tmp_path):
    path = tmp_path / "recipe.toml"
    for content, message in (
        (b"output = runs", r"recipe\.toml is no TOML: .*line 1"),
        (b'output = "a"\noutput = "b"', r"is no TOML: .*[Oo]verwrite"),
        (b"\xff\xfeo", r"is no TOML: .*decode"),
    ):
        path.write_bytes(content)
        with pytest.raises(RecipeError, match=message):
            read_recipe(path)
    with pytest.raises(FileNotFoundError):
        read_recipe(tmp_path / "none.toml")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        # Unknown, missing, of another type.
        ("modle = 1", r"there is no key 'modle'; known are output, model"),
        ("[model2]", r"there is no key 'model2'"),
        ("[model]\nnmae = 'x'", r"model: there is no key 'nmae'; known are name, revision, format"),
        ("[model]", r"model: 'name' is missing"),
        ("[data]\nsplit = 'x'", r"data: 'source' is missing"),
        ("model = 'some/reward'", r"'model' is 'some/reward', but must be a table: \[model\]"),
        ("output = 3", r"'output' is 3; wanted a path"),
        ("output = ''", r"'output' is ''; wanted a path"),
        ("seed = '3'", r"'seed' is '3'; wanted a whole number"),
        ("seed = 1.5", r"'seed' is 1.5; wanted a whole number"),
        ("seed = true", r"'seed' is True; wanted a whole number"),
        ("batch_tokens = 0", r"batch_tokens is 0, but must be at least 1"),
        ("[model]\nname = ''", r"model: 'name' is ''; wanted a text"),
        ("[model]\nname = ['a']", r"model: 'name' is \['a'\]; wanted a text"),
        ("[data]\nsource = 'x'\nmax_tokens = 'many'", r"data: 'max_tokens' is 'many'; wanted a whole number"),
        ("[data]\nsource = 'x'\nmax_tokens = -1", r"data: max_tokens is -1, but must be at least 1"),
        ("[data]\nsource = 'x'\noverlong = 'keep'", r"data: 'overlong' is 'keep'; wanted 'drop' or 'cut'"),
        ("[data]\nsource = 'x'\nfields = 'better'", r"data: 'fields' is 'better'; wanted a table"),
        ("[data]\nsource = 'x'\nfields = {chosen = 3}", r"data: 'fields': 'chosen' is 3; wanted a text"),
        ("[data]\nsource = 'x'\nheld_out_pairs = -2", r"data: held_out_pairs is -2, but cannot be negative"),
        ("[partial]\nunit = 'letter'", r"partial: 'unit' is 'letter'; wanted 'token' or 'word'"),
        ("[partial]\nsegments = 0", r"partial: segments is 0, but must be at least 1"),
        ("[partial]\nfraction = '0.5'", r"partial: 'fraction' is '0.5'; wanted a number"),
        ("[partial]\ninclude_full = 1", r"partial: 'include_full' is 1; wanted true or false"),
        ("[weights]\nmode = 'half'", r"weights: 'mode' is 'half'; wanted 'reference' or 'mask' or 'none'"),
        ("[weights]\nmode = 'none'\nclamp = -1", r"weights: clamp is -1.0, but must be a positive number"),
        ("[weights]\nmode = 'none'\nclamp = nan", r"weights: clamp is nan"),
        ("[weights]\nmode = 'none'\ndtype = 'int8'", r"weights: 'dtype' is 'int8'; wanted 'float32' or 'bfloat16'"),
        ("[train]\npreset = 'llama'", r"train: preset is 'llama', but there are deberta-v3-large, rm-gemma-2b"),
        ("[train]\ndtype = 'half'", r"train: dtype is 'half', but must be float32, bfloat16 or float16"),
        ("[train]\nseed = 4294967296", r"train: seed is 4294967296, but must be from 0 to 2\*\*32 - 1"),
        ("[train]\nlora = true", r"train: 'lora' is True; wanted a table"),
        ("[train.arguments]\nlerning_rate = 1", r"train: arguments has 'lerning_rate', which is no argument"),
        ("[train.arguments]\noutput_dir = 'x'", r"train: arguments has 'output_dir', which is no argument"),
        ("[train.arguments]\nlearning_rate = '1e-5'", r"train: arguments: 'learning_rate' is '1e-5'; wanted a number"),
        ("[train.arguments]\neval_on_start = 'no'", r"train: arguments: 'eval_on_start' is 'no'; wanted true or false"),
        ("[train.arguments]\nmax_steps = 2.5", r"train: arguments: 'max_steps' is 2.5; wanted a whole number"),
        (
            "[train.arguments]\ngradient_accumulation_steps = 0",
            r"train: arguments: 'gradient_accumulation_steps' is 0, but must be at least 1",
        ),
        ("[agreement]\nlengths = 5", r"agreement: 'lengths' is 5; wanted a list of numbers"),
        ("[agreement]\nlengths = [5, '10']", r"agreement: 'lengths' is \[5, '10'\]; wanted a list of numbers"),
        ("[agreement]\nlengths = []", r"agreement: lengths is \[\], but must hold numbers from 1 up"),
        ("[agreement]\nlengths = [0, 5]", r"agreement: lengths is \[0, 5\], but must hold numbers from 1 up"),
        ("[agreement]\npairs = 0", r"agreement: pairs is 0, but must be at least 1"),
        ("[agreement]\npairs = -5", r"agreement: pairs is -5, but must be at least 1"),
        ("[agreement]\ncompare = ['a']", r"agreement: 'compare' is \['a'\]; wanted a table"),
        ("[agreement]\ncompare = {a = 1}", r"agreement: 'compare': 'a' is 1; wanted a text"),
        # Contradictions.
        ("seed = -1", r"(partial|train): seed is -1, but must be from 0"),
        ("[data]\nsource = 'x'\nheld_out = 'y'\nheld_out_pairs = 5", r"data: held_out and held_out_pairs both"),
        ("[weights]\nmode = 'mask'", r"weights: mode 'mask' needs reference = .* or set mode = \"none\""),
        ("[weights]\nclamp = 50", r"weights: mode 'reference' needs reference"),
        ("[partial]\nrejoin_words = true", r"partial: rejoin_words is for words, but unit is 'token'"),
        ("[agreement]\njudge = 'a'\npreferences = 'b'", r"agreement: preferences and judge both"),
        ("[agreement]\ncompare = {before = 'x'}", r"agreement: compare has the label 'before', which is taken"),
    ],
)
def test_a_mistake_is_named_by_table_and_key(change, message, tmp_path):
    """The change takes the place of the table, or of the key, of that name."""
    kept = SMALLEST.split("[")
    name = change.strip("[").split("]")[0].split(".")[0]
    if change.startswith("["):
        text = "[".join(part for part in kept if not part.startswith(f"{name}]")) + change + "\n"
    else:
        key = change.split(" ")[0]
        top = "".join(line + "\n" for line in kept[0].splitlines() if not line.startswith(f"{key} "))
        text = "[".join([f"{top}{change}\n", *(part for part in kept[1:] if not part.startswith(f"{key}]"))])
    with pytest.raises(RecipeError, match=rf"^.*recipe\.toml: {message}") as raised:
        recipe(text, tmp_path)
    assert "\n" not in str(raised.value)


def test_without_weights_a_reference_is_asked_for():
    with pytest.raises(RecipeError, match=r"weights: mode 'reference' needs reference"):
        recipe_from({"output": "x", "model": {"name": "m"}, "data": {"source": "s"}})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("load_best_model_at_end = true", "train: arguments: .*load_best_model_at_end"),
        ('save_strategy = "sometimes"', "train: arguments: .*sometimes'? is not a valid"),
    ],
)
def test_arguments_that_the_trainer_refuses_are_named(arguments, message, tmp_path):
    train = recipe(f"{SMALLEST}[train.arguments]\nuse_cpu = true\n{arguments}\n", tmp_path).train
    with pytest.raises(ValueError, match=message):
        train.training_arguments(tmp_path, evaluates=False)
