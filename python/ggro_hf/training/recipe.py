"""The one file that says how a process reward model is made: a TOML file with a table for each step."""

import os
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ggro_hf.training.fine_tune import TrainingSettings
from ggro_hf.training.partial import PartialRecipe
from ggro_hf.training.weights import Weighting


class RecipeError(ValueError):
    """A recipe that cannot be followed; the message names the table and the key."""


@dataclass(frozen=True, slots=True)
class ModelSettings:
    """The reward model that becomes a process reward model.

    `name` is a directory or a hub id of a sequence classifier with one label. `format` is how it reads prompt and
    response: "auto" (a causal model with the turn left open, an encoder its chat template or a pair), "chat" (the chat
    template, every partial response closed), "dialogue", "pair", or a text with {prompt} and {response}.
    """

    name: str
    revision: str | None = None
    format: str = "auto"


@dataclass(frozen=True, slots=True)
class DataSettings:
    """Where preference pairs come from, and which are left out.

    `source` is what `read_preferences` takes. Pairs to measure agreement on are those of `held_out`, another source, or
    `held_out_pairs` of `source` that are not trained on, drawn by the seed. `max_tokens` is the longest prompt with a
    response (by default the model's context), `overlong` whether longer ones are dropped or their responses cut.
    """

    source: str
    split: str = "train"
    revision: str | None = None
    fields: Mapping[str, str] = field(default_factory=dict)
    held_out: str | None = None
    held_out_split: str = "test"
    held_out_pairs: int = 0
    max_tokens: int | None = None
    max_response_tokens: int | None = None
    overlong: Literal["drop", "cut"] = "drop"

    def __post_init__(self) -> None:
        if self.held_out is not None and self.held_out_pairs:
            raise RecipeError("data: held_out and held_out_pairs both say what is held out; keep one of them")
        if self.held_out_pairs < 0:
            raise RecipeError(f"data: held_out_pairs is {self.held_out_pairs}, but cannot be negative")
        _check_positive("data: ", max_tokens=self.max_tokens, max_response_tokens=self.max_response_tokens)


@dataclass(frozen=True, slots=True)
class ReferenceSettings:
    """The reference reward model that weighs the comparisons, and how; `reference` is not needed in mode "none"."""

    mode: Literal["reference", "mask", "none"] = "reference"
    reference: str | None = None
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    clamp: float = 100.0
    normalise: bool = False

    def __post_init__(self) -> None:
        if self.mode != "none" and self.reference is None:
            raise RecipeError(
                f'weights: mode {self.mode!r} needs reference = "DIR_OR_ID" of a reward model; '
                'or set mode = "none", the ablation'
            )
        # Now, not when the reference model has scored for hours.
        _ = self.weighting

    @property
    def weighting(self) -> Weighting:
        """How margins become weights; an infinite clamp is none."""
        return Weighting(self.mode, None if self.clamp == float("inf") else self.clamp, self.normalise)


@dataclass(frozen=True, slots=True)
class AgreementSettings:
    """At which lengths agreement is measured, on how many held-out pairs, and whose preferences stand for a human's.

    `preferences` is a file of verdicts, `judge` a reward model whose order of partial responses is taken; at most one
    of them. `compare` names other models, by label, that are measured beside.
    """

    lengths: tuple[int, ...] = (5, 10, 15, 20, 25, 30, 35, 40, 45, 50)
    pairs: int | None = None
    preferences: str | None = None
    judge: str | None = None
    compare: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.lengths or min(self.lengths) < 1:
            raise RecipeError(f"agreement: lengths is {list(self.lengths)}, but must hold numbers from 1 up")
        _check_positive("agreement: ", pairs=self.pairs)
        if self.preferences is not None and self.judge is not None:
            raise RecipeError("agreement: preferences and judge both stand for a human's preference; keep one of them")
        if taken := self.compare.keys() & {"before", "after"}:
            raise RecipeError(f"agreement: compare has the label {min(taken)!r}, which is taken; use another")


@dataclass(frozen=True, slots=True)
class Recipe:
    """A whole recipe; everything it makes goes to the directory `output`.

    `batch_tokens` is the size of a pass of the models that only score.
    """

    output: Path
    model: ModelSettings
    data: DataSettings
    seed: int = 0
    batch_tokens: int = 8192
    partial: PartialRecipe = field(default_factory=PartialRecipe)
    weights: ReferenceSettings = field(default_factory=ReferenceSettings)
    train: TrainingSettings = field(default_factory=TrainingSettings)
    agreement: AgreementSettings = field(default_factory=AgreementSettings)

    def __post_init__(self) -> None:
        _check_positive("", batch_tokens=self.batch_tokens)


def read_recipe(path: str | Path) -> Recipe:
    """Read a recipe; paths in it are relative to where the command runs, or to the home directory where they begin
    with "~/".

    Raises RecipeError for what is no TOML, an unknown key, a missing one or a value of another type; OSError where the
    file cannot be read.
    """
    try:
        # Some editors put a byte order mark before the text.
        values = tomllib.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is no TOML: {error}") from None
    try:
        return recipe_from(values)
    except ValueError as error:
        raise RecipeError(f"{path}: {error}") from None


def recipe_from(values: Mapping[str, Any]) -> Recipe:
    """A recipe from the tables of a TOML file; the seed is that of all steps unless a table has its own."""
    seed = values.get("seed", 0)
    given = {**values}
    for table in ("partial", "train"):
        if isinstance(given.get(table, {}), Mapping):
            given[table] = {"seed": seed, **given.get(table, {})}
    return _build(Recipe, given, "")


def _build(kind: Any, values: Mapping[str, Any], table: str) -> Any:
    """A dataclass from a table, dataclasses of its fields from the tables in it."""
    where = f"{table}: " if table else ""
    known = {entry.name: entry for entry in fields(kind)}
    if unknown := sorted(values.keys() - known.keys()):
        raise RecipeError(f"{where}there is no key {unknown[0]!r}; known are {', '.join(known)}")
    required = [name for name, entry in known.items() if entry.default is MISSING and entry.default_factory is MISSING]
    if missing := [name for name in required if name not in values]:
        raise RecipeError(f"{where}{missing[0]!r} is missing")
    hints = get_type_hints(kind)
    arguments = {}
    for name, value in values.items():
        hint = hints[name]
        if hasattr(hint, "__dataclass_fields__"):
            if not isinstance(value, Mapping):
                raise RecipeError(f"{where}{name!r} is {value!r}, but must be a table: [{name}]")
            arguments[name] = _build(hint, value, name)
        else:
            arguments[name] = _checked(value, hint, f"{where}{name!r}")
    try:
        return kind(**arguments)
    except RecipeError:
        raise
    except ValueError as error:
        raise RecipeError(f"{where}{error}") from None


def _checked(value: Any, hint: Any, where: str) -> Any:
    """The value, of the type of the field; whole numbers do for others, lists for tuples."""
    origin, arguments = get_origin(hint), get_args(hint)
    options = [option for option in arguments if option is not NoneType] if origin in (Union, UnionType) else [hint]
    for option in options:
        kind = get_origin(option) or option
        if kind is Literal:
            if value in get_args(option):
                return value
        elif kind is tuple:
            if isinstance(value, list | tuple) and all(type(item) is get_args(option)[0] for item in value):
                return tuple(value)
        elif kind is float:
            if type(value) in (int, float):
                return float(value)
        elif kind is Path:
            if value and isinstance(value, str | Path):
                return Path(value).expanduser()
        elif kind is str:
            if value and isinstance(value, str):
                return os.path.expanduser(value) if value.startswith("~/") else value
        elif kind is Mapping:
            if isinstance(value, Mapping):
                _, item = get_args(option)
                return {name: _checked(own, item, f"{where}: {name!r}") for name, own in value.items()}
        elif kind is Any or (isinstance(value, kind) and (kind is bool or not isinstance(value, bool))):
            return value
    raise RecipeError(f"{where} is {value!r}; wanted {' or '.join(_words(option) for option in options)}")


def _check_positive(where: str, **values: int | None) -> None:
    for name, value in values.items():
        if value is not None and value < 1:
            raise RecipeError(f"{where}{name} is {value}, but must be at least 1")


def _words(hint: Any) -> str:
    origin = get_origin(hint) or hint
    if origin is Literal:
        return " or ".join(map(repr, get_args(hint)))
    names = {
        str: "a text",
        Path: "a path",
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        tuple: "a list of numbers",
    }
    return names.get(origin, "a table")
