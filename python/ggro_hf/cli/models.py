"""Load a policy and a reward model for a command, or say in one line why not."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from ggro_hf import rewards
from ggro_hf.cli.errors import CommandError, one_line
from ggro_hf.policy import check_policy
from ggro_hf.rewards import Reward, RewardModel
from ggro_hf.rewards.loading import LoadError, naming

DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

Loaded = TypeVar("Loaded")


@dataclass(frozen=True, slots=True)
class LoadedPolicy:
    """A language model and its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def default_device() -> str:
    """The accelerator where there is one, else the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def check_device(name: str) -> None:
    """Raise CommandError where torch cannot use the device, before minutes go into loading a model."""
    try:
        torch.empty(0, device=name)
    # A build of torch without CUDA asserts that it has it.
    except (RuntimeError, AssertionError) as error:
        raise CommandError(f"--device {name!r}: {one_line(error)}") from error


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load a policy's tokenizer; raises CommandError."""
    return _load("policy", name, lambda: _read_tokenizer(name))


def load_policy(name: str, dtype: torch.dtype | None, device: str) -> LoadedPolicy:
    """Load a causal language model (`dtype=None`: the checkpoint's); raises CommandError."""
    model = _load("policy", name, lambda: _read_policy(name, dtype, device))
    return LoadedPolicy(model, load_tokenizer(name))


def load_reward_model(name: str, dtype: torch.dtype | None, device: str) -> RewardModel:
    """Load a reward model with gradients (`dtype=None`: the checkpoint's); raises CommandError."""
    return _load("reward model", name, lambda: RewardModel.from_pretrained(name, dtype=dtype, device=device))


def load_reward(name: str, policy_tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype | None, device: str) -> Reward:
    """Load any reward (`dtype=None`: the checkpoint's); raises CommandError."""
    return _load("reward model", name, lambda: rewards.load_reward(name, policy_tokenizer, dtype=dtype, device=device))


def _load(role: str, name: str, read: Callable[[], Loaded]) -> Loaded:
    try:
        with naming(role, name):
            return read()
    except LoadError as error:
        raise CommandError(str(error)) from error
    except torch.OutOfMemoryError as error:
        raise CommandError(f"{role} {name!r}: {one_line(error)}") from error


def _read_policy(name: str, dtype: torch.dtype | None, device: str) -> PreTrainedModel:
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        name, dtype=dtype or "auto", use_safetensors=True, output_loading_info=True
    )
    model, loading = loaded
    architecture = next(iter(model.config.architectures or []), type(model).__name__)
    if loading["missing_keys"] or architecture.endswith("ForSequenceClassification"):
        raise ValueError(
            f"is a {architecture} without the weights of a language model's head; "
            "give a causal language model as --policy"
        )
    check_policy(model)
    model = model.eval().to(device)
    _check_causal(model)
    return model


def _read_tokenizer(name: str) -> PreTrainedTokenizerBase:
    tokenizer = rewards.loading.load_tokenizer(name)
    if tokenizer is None:
        raise ValueError("comes without a tokenizer; save one beside it")
    return tokenizer


def _check_causal(model: PreTrainedModel) -> None:
    """Raise ValueError where a prediction changes with a later token, as an encoder's does."""
    with torch.no_grad():
        first, second = (model(torch.tensor([[1, 2, last]], device=model.device)).logits[0, 0] for last in (3, 4))
    if not torch.allclose(first, second, rtol=1e-3, atol=1e-3, equal_nan=True):
        raise ValueError(
            f"is a {type(model).__name__} whose predictions depend on later tokens: "
            "an encoder, not a causal language model"
        )
