"""Reward models with one label, and their tokenizers, from a directory or the hub."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.tokenization_utils_base import PreTrainedTokenizerBase


class LoadError(ValueError):
    """A model that cannot be loaded; the message names it, what it is there for, and the mend."""


@contextmanager
def naming(role: str, name: str | Path) -> Iterator[None]:
    """Name the model, and what it is there for, in the errors of its loading and reading, which become LoadError."""
    path = Path(name)
    looks_local = path.is_absolute() or str(name).startswith(".") or str(name).count("/") > 1
    if looks_local and not path.is_dir():
        raise LoadError(f"{role} {str(name)!r}: there is no such directory; give a directory or a hub id")
    if path.is_dir() and not (path / "config.json").is_file():
        raise LoadError(f"{role} {str(name)!r}: no config.json in it; give the directory of a saved model")
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    # RuntimeError: weights of other shapes than the configuration's.
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        message = str(error).strip().partition("\n")[0] or type(error).__name__
        if isinstance(error, SafetensorError):
            message = f"its safetensors file is damaged or cut short ({message}); copy or download it again"
        raise LoadError(message if repr(str(name)) in message else f"{role} {str(name)!r}: {message}") from error


def load_classifier(
    name: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """A sequence classifier with one label and its tokenizer, None where it has none (safetensors only).

    `dtype=None` keeps the checkpoint's. Raises ValueError where the checkpoint has no head of its own or more than one
    label; OSError where files are missing, SafetensorError where one is damaged.
    """
    where = {"trust_remote_code": trust_remote_code, "revision": revision or "main"}
    config = AutoConfig.from_pretrained(name, **where)
    require_one_label(config, name)
    model, loading = AutoModelForSequenceClassification.from_pretrained(
        name, config=config, dtype=dtype or "auto", use_safetensors=True, output_loading_info=True, **where
    )
    missing = sorted(loading["missing_keys"])
    if missing:
        raise ValueError(
            f"reward model {str(name)!r} lacks the weights {', '.join(missing[:3])}: they would be random; "
            "use a checkpoint saved with its classification head"
        )
    return model.to(device) if device is not None else model, load_tokenizer(name, **where)


def require_one_label(config: PretrainedConfig, name: str | Path) -> None:
    """Raise ValueError where the configuration is that of a model whose output is no reward."""
    if config.num_labels != 1:
        raise ValueError(
            f"reward model {str(name)!r} has {config.num_labels} labels, but a reward is one number; "
            "use a checkpoint trained with num_labels=1, or ProcessReward for one that judges steps"
        )


def load_tokenizer(name: str | Path, **where: Any) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a checkpoint, None where it has none."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **where)
    except (OSError, ValueError):
        return None
    # Without files, many a model's tokenizer is made of its special tokens alone.
    return tokenizer if tokenizer.get_vocab().keys() - set(tokenizer.all_special_tokens) else None


def require_tokenizer(tokenizer: PreTrainedTokenizerBase | None, name: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer, for a reward that reads text. Raises ValueError where there is none."""
    if tokenizer is None:
        raise ValueError(f"reward model {str(name)!r} comes without a tokenizer, but reads text; save one beside it")
    return tokenizer
