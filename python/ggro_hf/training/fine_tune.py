"""The training of a process reward model: model, arguments, resumption, and the model that is left in the end."""

import json
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, TrainingArguments, set_seed
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from ggro_hf.rewards.loading import load_classifier, require_tokenizer
from ggro_hf.training.prefix_reader import PrefixReader
from ggro_hf.training.prefix_trainer import PrefixTrainer
from ggro_hf.training.presets import PRESETS
from ggro_hf.training.scoring import check_causal
from ggro_hf.training.weights import WeighedPair

# Saved, evaluated and logged so many times in a run, unless the arguments say otherwise.
_DEFAULTS: dict[str, Any] = {
    "learning_rate": 1e-6,
    "num_train_epochs": 1.0,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 8,
    "lr_scheduler_type": "linear",
    "weight_decay": 0.0,
    "save_strategy": "steps",
    "save_steps": 0.1,
    "save_total_limit": 2,
    "eval_steps": 0.1,
    "eval_on_start": True,
    "logging_steps": 0.01,
    "report_to": ["tensorboard"],
}
# What a recipe says in other words, what would break the trainer, or what its loss has no use for.
_RESERVED = (
    "output_dir",
    "seed",
    "remove_unused_columns",
    "label_names",
    "do_train",
    "batch_eval_metrics",
    "eval_do_concat_batches",
    "label_smoothing_factor",
)
# Types of the fields of TrainingArguments, and of the values that they take.
_KINDS: dict[Any, tuple[tuple[type, ...], str]] = {
    bool: ((bool,), "true or false"),
    int: ((int,), "a whole number"),
    float: ((int, float), "a number"),
}
_COUNTS = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")


@dataclass(frozen=True, slots=True)
class TrainingSettings:
    """How to train: `preset` and then `arguments` of `TrainingArguments` over our defaults.

    `lora` are arguments of peft's `LoraConfig`; None trains all weights. `dtype` is that of the loaded weights; bf16
    arithmetic on float32 weights is `arguments = {"bf16": True}`.

    Raises ValueError for an unknown preset, dtype or argument.
    """

    preset: str | None = None
    dtype: str = "float32"
    seed: int = 0
    lora: Mapping[str, Any] | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.preset is not None and self.preset not in PRESETS:
            raise ValueError(f"preset is {self.preset!r}, but there are {', '.join(PRESETS)}")
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"dtype is {self.dtype!r}, but must be float32, bfloat16 or float16")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed is {self.seed}, but must be from 0 to 2**32 - 1")
        known = TrainingArguments.__dataclass_fields__.keys() - set(_RESERVED)
        unknown = sorted(self.arguments.keys() - known)
        if unknown:
            raise ValueError(
                f"arguments has {unknown[0]!r}, which is no argument of TrainingArguments that is set here"
            )
        for name, value in self.arguments.items():
            # TrainingArguments takes any value, and the optimizer fails on it later.
            kind: Any = TrainingArguments.__dataclass_fields__[name].type
            kinds, wanted = _KINDS.get(kind, ((type(value),), ""))
            if type(value) not in kinds:
                raise ValueError(f"arguments: {name!r} is {value!r}; wanted {wanted}")
            if name in _COUNTS and value < 1:
                raise ValueError(f"arguments: {name!r} is {value!r}, but must be at least 1")

    def training_arguments(self, output_dir: Path, evaluates: bool) -> TrainingArguments:
        """The arguments of the Trainer. Raises ValueError for values that are none, or contradict each other."""
        given = {**_DEFAULTS, **(PRESETS[self.preset] if self.preset else {}), **self.arguments}
        given.setdefault("eval_strategy", "steps" if evaluates else "no")
        if not evaluates:
            given["eval_on_start"] = False
        try:
            return TrainingArguments(output_dir=str(output_dir), seed=self.seed, **given)
        except (ArithmeticError, AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"train: arguments: {error}") from error


def fine_tune(
    name: str | Path,
    settings: TrainingSettings,
    train_pairs: Sequence[WeighedPair],
    eval_pairs: Sequence[WeighedPair],
    make_reader: Callable[[PreTrainedModel, PreTrainedTokenizerBase], PrefixReader],
    output: Path,
    *,
    revision: str | None = None,
) -> dict[str, float]:
    """Train the classifier `name` and save it to `output`/model, by safetensors, with its tokenizer.

    Checkpoints go to `output`/checkpoints; a killed run continues from the last complete one and ends with the same
    weights. LoRA's adapter stays in `output`/adapter, `output`/model has it merged. Returns the last metrics.

    Raises ValueError for a checkpoint without a head of its own, several labels or no tokenizer, NonFiniteLossError,
    and OSError or SafetensorError where nothing can be written; what was complete stays.
    """
    checkpoints = output / "checkpoints"
    # First what is quickly found wrong.
    args = settings.training_arguments(checkpoints, evaluates=bool(eval_pairs))
    adaptation = None if settings.lora is None else _lora_config(settings.lora)
    # Before LoRA draws its first weights, which every process must draw alike.
    set_seed(settings.seed)
    dtype: torch.dtype = getattr(torch, settings.dtype)
    loaded, tokenizer = load_classifier(name, dtype=dtype, revision=revision)
    tokenizer = require_tokenizer(tokenizer, name)
    set_padding(loaded, tokenizer)
    reader = make_reader(loaded, tokenizer)
    if reader.causal:
        check_causal(loaded)
    model = loaded if adaptation is None else _with_lora(loaded, adaptation)
    trainer = PrefixTrainer(model, args, reader, train_pairs, eval_pairs)
    try:
        result = trainer.train(resume_from_checkpoint=last_checkpoint(checkpoints))
    except KeyError as error:
        if "metric_for_best_model" not in str(error):
            raise
        raise ValueError(f"train: arguments: {error.args[0]}") from error
    except RuntimeError as error:
        # How torch.save says that the disk is full.
        if "inline_container" not in str(error) and "PytorchStreamWriter" not in str(error):
            raise
        raise OSError(
            f"cannot write a checkpoint to {checkpoints}; make room on the disk, repeat the command to continue"
        ) from error
    metrics = {**result.metrics, **(trainer.evaluate() if eval_pairs else {})}
    _save(trainer, name, settings, output, revision)
    return metrics


def last_checkpoint(directory: Path) -> str | None:
    """The newest complete checkpoint to continue from: the state is what a checkpoint gets last."""
    found = []
    for state in directory.glob("checkpoint-*/trainer_state.json"):
        try:
            values = json.loads(state.read_text(encoding="utf-8"))
            step = int(values["global_step"])
        except (ValueError, KeyError):
            continue
        # Continued at its last step, a run that ends within an epoch would take one more.
        if step < values.get("max_steps", math.inf) or not values.get("epoch", 0.0) % 1:
            found.append((step, state.parent))
    return str(max(found)[1]) if found else None


def set_padding(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """A classifier's forward refuses batches unless it knows the token that pads them."""
    config = model.config.get_text_config()
    if config.pad_token_id is None:
        if tokenizer.pad_token_id is None:
            raise ValueError(
                "neither the reward model's configuration nor its tokenizer has a padding token; "
                "set tokenizer.pad_token and save the tokenizer"
            )
        config.pad_token_id = tokenizer.pad_token_id


def _lora_config(lora: Mapping[str, Any]) -> Any:
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ImportError(f"LoRA needs peft ({error}); pip install 'ggro-kernels[train]'") from error
    try:
        return LoraConfig(**{"task_type": "SEQ_CLS", "target_modules": "all-linear", **lora})
    except (TypeError, ValueError) as error:
        raise ValueError(f"train.lora: {error}; its keys are arguments of peft's LoraConfig") from error


def _with_lora(model: PreTrainedModel, config: Any) -> PreTrainedModel:
    from peft import get_peft_model

    # Peft trains the classifier's head along.
    try:
        adapted: Any = get_peft_model(model, config)
    except ValueError as error:
        raise ValueError(f"train.lora: {error}") from error
    return adapted


def _save(
    trainer: PrefixTrainer, name: str | Path, settings: TrainingSettings, output: Path, revision: str | None
) -> None:
    """Leave the model in `output`/model: there complete or not at all."""
    partial = output / "model.partial"
    if trainer.is_fsdp_enabled:
        # Otherwise checkpoints in parts mean that no model is saved.
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model(str(partial if settings.lora is None else output / "adapter"))
    if trainer.is_world_process_zero():
        if settings.lora is not None:
            _merge(name, settings, output / "adapter", partial, revision)
        if not any(partial.glob("*.safetensors")):
            raise OSError(
                f"the trained model was not saved whole to {partial}, its parts are in {output / 'checkpoints'}; under "
                "ZeRO-3 set zero3_save_16bit_model: true and repeat the command"
            )
        (partial / "training_args.bin").unlink(missing_ok=True)
        shutil.rmtree(output / "model", ignore_errors=True)
        os.replace(partial, output / "model")
    trainer.accelerator.wait_for_everyone()


def _merge(name: str | Path, settings: TrainingSettings, adapter: Path, output: Path, revision: str | None) -> None:
    from peft import PeftModel

    # From its files: the trained model may be spread over processes.
    base, tokenizer = load_classifier(name, dtype=getattr(torch, settings.dtype), revision=revision)
    tokenizer = require_tokenizer(tokenizer, name)
    set_padding(base, tokenizer)
    PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(output)
    tokenizer.save_pretrained(output)
