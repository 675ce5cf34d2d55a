"""Small facts about a model that several parts need."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1.5e-1}
"""How far two ways to compute the same may differ, by the model's dtype, relative to the largest value (at least 1)."""


def device_of(model: PreTrainedModel) -> torch.device:
    """Where the model takes its token ids."""
    embedding: Any = model.get_input_embeddings()
    device: torch.device = embedding.weight.device
    return device


def embedding_rows(model: PreTrainedModel) -> int:
    """Number of token ids that the model has an embedding for."""
    embedding: Any = model.get_input_embeddings()
    return int(embedding.weight.shape[0])


def context_length(model: PreTrainedModel) -> int | None:
    """Largest number of tokens the model was built for, if its configuration says so."""
    return getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)


def check_room(role: str, context: int | None, prompt_tokens: int, max_new_tokens: int) -> None:
    """Raise ValueError where prompt and response do not fit a context of that many tokens."""
    wanted = prompt_tokens + max_new_tokens
    if context is not None and wanted > context:
        raise ValueError(
            f"prompt of {prompt_tokens} tokens and max_new_tokens={max_new_tokens} need {wanted} "
            f"positions, but the {role}'s context has {context}; shorten the prompt or lower max_new_tokens"
        )


def disagreement(
    name: str, compute: Callable[[], torch.Tensor], expected: torch.Tensor, dtype: torch.dtype
) -> str | None:
    """Why another way to compute what `name` says does not give about the `expected` values; None where it does.

    Whatever it raises is such a reason.
    """
    tolerance = TOLERANCE[dtype] * max(1.0, float(expected.abs().max()))
    try:
        error = float((compute().double() - expected.double()).abs().max())
    # Whoever asks can do without.
    except Exception as caught:
        return f"{type(caught).__name__}: {caught}".partition("\n")[0]
    return None if error <= tolerance else f"its {name} are off by {error:.2g} (tolerance {tolerance:.2g})"
