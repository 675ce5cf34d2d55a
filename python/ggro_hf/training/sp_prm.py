"""SP-PRM step by step: pairs to partial pairs, weights by a reference model, training, agreement before and after.

Every step leaves a record of the settings it was done with. Repeated with the same ones it does nothing, or what was
left undone; with others it refuses, but for the agreement, which is of whatever is asked for.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from ggro_hf.evaluation.agreement import AgreementRow, agreement_by_length, agreement_records, format_agreement
from ggro_hf.evaluation.judges import Key, preferences_from_rewards, read_preference_file
from ggro_hf.jsonl import RowFileError
from ggro_hf.pairs import PairRewards, PartialPair
from ggro_hf.training.data_statistics import format_statistics, statistics
from ggro_hf.training.fine_tune import fine_tune
from ggro_hf.training.partial import make_partial, response_lengths
from ggro_hf.training.partial_file import fingerprint, read_partial, write_partial
from ggro_hf.training.preferences import Selection, read_preferences
from ggro_hf.training.prefix_reader import PrefixReader
from ggro_hf.training.recipe import Recipe
from ggro_hf.training.recipe_readers import planned_reader, planned_unit, scorer_of, trained_reader
from ggro_hf.training.reward_file import read_scores, score_to_file
from ggro_hf.training.selection import select
from ggro_hf.training.step import Step, StepError, is_done
from ggro_hf.training.units import Unit
from ggro_hf.training.weights import (
    WeighedPair,
    format_weight_statistics,
    weigh,
    weight_statistics,
)

_HELD_OUT = "held out"


def make_data(recipe: Recipe) -> str:
    """Read the preference pairs, leave out what cannot be compared, and write `data/`; returns the statistics.

    Raises what `read_preferences`, `select` and `make_partial` raise, and StepError.
    """
    step = Step(recipe.output / "data", _data_settings(recipe))
    if step.record is None:
        reader = planned_reader(recipe)
        unit = reader.unit
        train, held_out = _selections(recipe, reader)
        partials = make_partial(train, recipe.partial, unit)
        measured = _held_out(recipe, held_out, unit)
        step.directory.mkdir(parents=True, exist_ok=True)
        write_partial(step.directory / "train.jsonl", partials)
        if measured:
            write_partial(step.directory / "held_out.jsonl", measured)
        step.finish(
            {
                "fingerprint": fingerprint(partials, unit),
                "train": statistics(train, recipe.partial, partials, unit),
                "held_out_pairs": len(measured),
            }
        )
    record = step.done()
    return f"{format_statistics(record['train'])}\n{record['held_out_pairs']} pairs are held out to measure agreement"


def make_weights(recipe: Recipe, device: str) -> str:
    """Score the partial responses by the reference model, once, and write `reference.jsonl`; returns what is kept.

    Raises what `score_to_file` raises, and StepError where the data are missing.
    """
    if recipe.weights.mode == "none":
        return "mode is none: every comparison counts 1, no reference model is asked"
    partials = _read_data(recipe, "train")
    path, settings = _reference_file(recipe)
    weights = recipe.weights
    how = {"revision": weights.revision, "dtype": weights.dtype}
    rewards = _scored(recipe, "weights", "reference", str(weights.reference), device, how, partials, path, settings)
    return format_weight_statistics(weight_statistics(partials, weigh(weights.weighting, rewards, partials)))


def train(recipe: Recipe) -> str:
    """Train the reward model and write `model/` and `checkpoints/`; returns the last metrics.

    Raises what `fine_tune` raises, and StepError where the step before is missing.
    """
    weighed = _weighed(recipe)
    eval_pairs = [WeighedPair(pair, (1.0,) * len(pair.lengths)) for pair in _read_data(recipe, "held_out")]
    settings = {
        "data": _data_record(recipe)["fingerprint"],
        "model": asdict(recipe.model),
        "weights": asdict(recipe.weights),
        "train": asdict(recipe.train),
    }
    # In the directory that must go for other settings.
    checkpoints = recipe.output / "checkpoints"
    step = Step(checkpoints, settings, continues=any(checkpoints.glob("checkpoint-*")))
    if step.record is None or not (recipe.output / "model").is_dir():
        step.start()
        metrics = fine_tune(
            recipe.model.name,
            recipe.train,
            weighed,
            eval_pairs,
            lambda model, tokenizer: trained_reader(recipe, model, tokenizer),
            recipe.output,
            revision=recipe.model.revision,
        )
        step.finish({"metrics": metrics, "pairs": len(weighed)})
    return _describe_training(recipe, step.done())


def measure_agreement(recipe: Recipe, device: str) -> str:
    """Measure agreement by length on the held-out pairs before and after training, and write `agreement/`: table,
    JSON and plots; returns the table.

    Raises StepError where a step before is missing, and what `agreement_by_length` raises.
    """
    partials = _read_data(recipe, "held_out")
    if not partials:
        raise StepError(
            "no pairs are held out to measure agreement on; set held_out or held_out_pairs under [data], and another "
            "output"
        )
    trained = recipe.output / "model"
    if not (trained.is_dir() and is_done(recipe.output / "checkpoints")):
        raise StepError(f"there is no {trained} yet; run `ggro prm train` first")
    own = {"dtype": recipe.train.dtype, "format": recipe.model.format}
    models: dict[str, tuple[str | Path, dict[str, Any]]] = {
        "before": (recipe.model.name, {"revision": recipe.model.revision, **own}),
        "after": (trained, own),
        **{label: (name, {"dtype": recipe.train.dtype}) for label, name in recipe.agreement.compare.items()},
    }
    held_out = fingerprint(partials, planned_unit(recipe))

    def score(label: str, name: str | Path, how: Mapping[str, Any]) -> list[PairRewards]:
        settings = {"data": held_out, "model": str(name), **how, "files": _weight_files(name)}
        digest = sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
        path = recipe.output / "agreement" / f"rewards-{digest}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        return list(_scored(recipe, "agreement", label, name, device, how, partials, path, settings).values())

    agreement = recipe.agreement
    preferences: Mapping[Key, int | None] | None = None
    if agreement.preferences is not None:
        preferences = read_preference_file(agreement.preferences)
    elif agreement.judge is not None:
        preferences = preferences_from_rewards(score("judge", agreement.judge, {"dtype": recipe.train.dtype}))
    curves = {label: agreement_by_length(score(label, name, how), preferences) for label, (name, how) in models.items()}
    return _write_agreement(recipe.output / "agreement", curves, recipe.partial.unit)


def _data_settings(recipe: Recipe) -> dict[str, Any]:
    return {
        "model": asdict(recipe.model),
        "data": asdict(recipe.data),
        "partial": asdict(recipe.partial),
        "lengths": list(recipe.agreement.lengths),
        "pairs": recipe.agreement.pairs,
        "seed": recipe.seed,
    }


def _data_record(recipe: Recipe) -> dict[str, Any]:
    step = Step(recipe.output / "data", _data_settings(recipe))
    if step.record is None:
        raise StepError(f"there are no data in {step.directory} yet; run `ggro prm data` first")
    return step.record


def _read_data(recipe: Recipe, name: str) -> list[PartialPair]:
    """The partial pairs "train" or "held_out", of which there may be none."""
    record = _data_record(recipe)
    if name == "held_out" and not record["held_out_pairs"]:
        return []
    directory = recipe.output / "data"
    mend = f"delete {directory} and run `ggro prm data` again"
    path = directory / f"{name}.jsonl"
    try:
        partials = read_partial(path)
    except (FileNotFoundError, ValueError) as error:
        raise StepError(f"{error}: {mend}") from error
    if name == "train" and fingerprint(partials, planned_unit(recipe)) != record["fingerprint"]:
        raise StepError(f"{path} is another recipe's: its fingerprint is not {record['fingerprint']}; {mend}")
    return partials


def _selections(recipe: Recipe, reader: PrefixReader) -> tuple[Selection, Selection]:
    """Pairs to train on and pairs to measure agreement on."""
    data = recipe.data
    limits: dict[str, Any] = {
        "max_tokens": data.max_tokens,
        "max_response_tokens": data.max_response_tokens,
        "overlong": data.overlong,
    }
    where: dict[str, Any] = {"revision": data.revision, "fields": data.fields}

    def selected(source: str, split: str) -> Selection:
        read = read_preferences(source, split=split, **where)
        if reader.format is None and reader.tokenizer.chat_template is None:
            for pair in read.pairs:
                if not isinstance(pair.prompt, str):
                    raise StepError(
                        f"{source} ({split}): the prompt of row {pair.row} is a list of messages, but the tokenizer of "
                        f'{recipe.model.name!r} has no chat template; set format under [model] to "dialogue"'
                    )
        try:
            return select(read, reader, progress=True, **limits)
        except ValueError as error:
            raise StepError(f"{source} ({split}): {error}") from error

    train = selected(data.source, data.split)
    if data.held_out is not None:
        return train, selected(data.held_out, data.held_out_split)
    if data.held_out_pairs >= len(train.pairs):
        raise StepError(f"data: held_out_pairs is {data.held_out_pairs}, but there are only {len(train.pairs)} pairs")
    order = np.random.default_rng(recipe.seed).permutation(len(train.pairs))
    out = set(order[: data.held_out_pairs].tolist())
    kept = [pair for index, pair in enumerate(train.pairs) if index not in out]
    held_out = [pair for index, pair in enumerate(train.pairs) if index in out]
    dropped = {**train.dropped, _HELD_OUT: [pair.row for pair in held_out]} if held_out else train.dropped
    return Selection(kept, dropped, train.cut), Selection(held_out, {}, train.cut)


def _held_out(recipe: Recipe, selection: Selection, unit: Unit) -> list[PartialPair]:
    """Held-out pairs at the lengths of the agreement that their longer response has, and finished where they are."""
    pairs = selection.pairs[: recipe.agreement.pairs]
    longest = [
        max(lengths)
        for lengths in zip(
            response_lengths(unit, [pair.chosen for pair in pairs]),
            response_lengths(unit, [pair.rejected for pair in pairs]),
            strict=True,
        )
    ]
    measured = []
    for pair, last in zip(pairs, longest, strict=True):
        lengths: tuple[int | None, ...] = tuple(sorted(set(recipe.agreement.lengths)))
        lengths = tuple(length for length in lengths if length is not None and length <= last)
        finished = () if pair.row in selection.cut else (None,)
        if lengths or finished:
            measured.append(PartialPair(pair, lengths + finished))
    return measured


def _reference_file(recipe: Recipe) -> tuple[Path, dict[str, Any]]:
    """The file of the reference model's rewards, and what they depend on."""
    weights = recipe.weights
    settings = {
        "data": _data_record(recipe)["fingerprint"],
        "reference": weights.reference,
        "revision": weights.revision,
        "dtype": weights.dtype,
    }
    return recipe.output / "reference.jsonl", settings


def _weighed(recipe: Recipe) -> list[WeighedPair]:
    partials = _read_data(recipe, "train")
    rewards = None
    if recipe.weights.mode != "none":
        path, settings = _reference_file(recipe)
        if not path.is_file():
            raise StepError(f"there are no rewards of the reference model in {path} yet; run `ggro prm weights` first")
        rewards = read_scores(path, partials, settings, step="weights")
    weighed = weigh(recipe.weights.weighting, rewards, partials)
    if not weighed:
        raise StepError(
            "no comparison is left to train on: the reference model prefers none of the chosen responses; "
            "look at the reference model, or at the order of chosen and rejected"
        )
    return weighed


def _describe_training(recipe: Recipe, record: Mapping[str, Any]) -> str:
    metrics = record["metrics"]
    lines = [f"{recipe.output / 'model'}: trained on {record['pairs']} pairs, loss {metrics['train_loss']:.4g}"]
    if "eval_loss" in metrics:
        rates = [
            f"{100 * rate:.1f} % {'finished' if length is None else f'at {length}'}"
            for length in (*sorted(set(recipe.agreement.lengths)), None)
            if (rate := metrics.get(f"eval_agreement_{'finished' if length is None else length}")) is not None
        ]
        lines.append(f"held-out pairs: loss {metrics['eval_loss']:.4g}, agreement {', '.join(rates)}")
    return "\n".join(lines)


def _scored(
    recipe: Recipe,
    step: str,
    role: str,
    name: str | Path,
    device: str,
    how: Mapping[str, Any],
    partials: Sequence[PartialPair],
    path: Path,
    settings: dict[str, Any],
) -> dict[int, PairRewards]:
    """Rewards by a model, from the file where they are complete there: then the model is not loaded."""
    try:
        return score_to_file(lambda: scorer_of(recipe, name, device, **how), partials, path, settings, step=step)
    except RowFileError:
        raise
    except ValueError as error:
        raise StepError(str(error) if str(name) in str(error) else f"{role} {str(name)!r}: {error}") from error


def _weight_files(name: str | Path) -> dict[str, list[int]]:
    """What tells a model of this name from one that has replaced it; nothing of one from the hub."""
    files = sorted(Path(name).glob("*.safetensors"))
    return {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in files}


def _write_agreement(directory: Path, curves: Mapping[str, list[AgreementRow]], unit: str) -> str:
    from ggro_hf.report.agreement_plots import draw_agreement

    table = format_agreement(curves)
    (directory / "agreement.txt").write_text(table + "\n", encoding="utf-8")
    (directory / "agreement.json").write_text(json.dumps(agreement_records(curves), indent=2) + "\n", encoding="utf-8")
    draw_agreement(curves, directory, unit=unit)
    return table
