"""Branches of one cached prefix in as few forward passes as the model allows, each as if it were alone.

Three ways, tried in this order once for every model: `prefix_attention`; the model's own attention with a dense mask;
a pass for every branch.
"""

import logging
import weakref
from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from ggro_hf.attention import PREFIX_ATTENTION, attending, pack_branches
from ggro_hf.cache import RewindableCache
from ggro_hf.models import TOLERANCE, device_of, embedding_rows
from ggro_hf.transfer import to_device

Packing = Callable[[PreTrainedModel, RewindableCache, list[list[int]], int], torch.Tensor]
"""(backbone, cache, branches, prefix length) -> hidden states [T, d] of the branches' T tokens in order.

Leaves the branches behind the prefix in the cache, one after another.
"""

_CHECK_PREFIX = 5
_CHECK_BRANCHES = (1, 3, 2)

_logger = logging.getLogger(__name__)


def run(model: PreTrainedModel, cache: RewindableCache, token_ids: list[int], **inputs: object) -> torch.Tensor:
    """Append tokens to the cache and return their hidden states `[T, d]`."""
    ids = to_device([token_ids], device_of(model))
    hidden: torch.Tensor = model(input_ids=ids, past_key_values=cache, use_cache=True, **inputs).last_hidden_state
    return hidden[0]


def by_prefix_attention(
    model: PreTrainedModel, cache: RewindableCache, branches: list[list[int]], prefix_length: int
) -> torch.Tensor:
    """One pass through our kernel, which reads prefix and branches where they lie."""
    inputs = pack_branches(branches, prefix_length, device_of(model))
    with attending(model, PREFIX_ATTENTION):
        hidden: torch.Tensor = model(**inputs, past_key_values=cache, use_cache=True).last_hidden_state
    return hidden[0]


def by_mask(
    model: PreTrainedModel, cache: RewindableCache, branches: list[list[int]], prefix_length: int
) -> torch.Tensor:
    """One pass through the model's own attention, eager or sdpa.

    Raises ValueError where the model's attention takes no mask of ours.
    """
    implementation = model.config._attn_implementation
    if implementation not in ("eager", "sdpa"):
        raise ValueError(f"attention {implementation!r} takes no dense mask")
    inputs = pack_branches(branches, prefix_length, device_of(model))
    masks = {
        "full_attention" if window is None else "sliding_attention": _mask(inputs, prefix_length, window, model.dtype)
        for window in cache.windows
    }
    # Models whose layers are all alike take the mask itself, the others one for each kind.
    mask = masks if len(masks) > 1 else next(iter(masks.values()))
    hidden: torch.Tensor = model(
        input_ids=inputs["input_ids"],
        position_ids=inputs["position_ids"],
        attention_mask=mask,
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state
    return hidden[0]


def one_by_one(
    model: PreTrainedModel, cache: RewindableCache, branches: list[list[int]], prefix_length: int
) -> torch.Tensor:
    """A pass for every branch."""
    hidden, layers = [], []
    for branch in branches:
        cache.rewind(prefix_length)
        hidden.append(run(model, cache, branch))
        layers.append(cache.read(prefix_length, prefix_length + len(branch)))
    cache.rewind(prefix_length)
    for branch_layers in layers:
        cache.write(branch_layers)
    return torch.cat(hidden)


def packing_for(model: PreTrainedModel) -> Packing:
    """The best way that gives this model's branches the hidden states of separate passes; checked once a model."""
    if model not in _chosen:
        _chosen[model] = _choose(model)
        _logger.info("%s scores branches by %s", type(model).__name__, _chosen[model].__name__)
    return _chosen[model]


_chosen: weakref.WeakKeyDictionary[PreTrainedModel, Packing] = weakref.WeakKeyDictionary()


def _choose(model: PreTrainedModel) -> Packing:
    if model.device.type == "meta":
        return one_by_one
    rows = embedding_rows(model)
    prefix, *branches = [
        [(7 * token + length) % rows for token in range(length)] for length in (_CHECK_PREFIX, *_CHECK_BRANCHES)
    ]
    expected = _checked(one_by_one, model, prefix, branches)
    tolerance = TOLERANCE[model.dtype] * max(1.0, float(expected.abs().max()))
    for packing in (by_prefix_attention, by_mask):
        try:
            error = float((_checked(packing, model, prefix, branches) - expected).abs().max())
            if error <= tolerance:
                return packing
            reason = f"it is off by {error:.2g} (tolerance {tolerance:.2g})"
        # Whatever it is, another way can do without.
        except Exception as caught:
            reason = f"{type(caught).__name__}: {caught}".partition("\n")[0]
        _logger.info("%s cannot score branches by %s: %s", type(model).__name__, packing.__name__, reason)
    return one_by_one


def _checked(packing: Packing, model: PreTrainedModel, prefix: list[int], branches: list[list[int]]) -> torch.Tensor:
    cache = RewindableCache(model.config)
    with torch.inference_mode():
        run(model, cache, prefix)
        return packing(model, cache, branches, len(prefix)).double()


def _mask(inputs: dict[str, torch.Tensor], prefix_length: int, window: int | None, dtype: torch.dtype) -> torch.Tensor:
    """[1, 1, T, keys] to add to the scores: zero where a token may look, for keys that a layer with that window has."""
    positions, starts = inputs["position_ids"][0], inputs["branch_starts"][0]
    tokens = torch.arange(len(starts), device=starts.device)
    first = 0 if window is None else max(0, prefix_length - window + 1)
    prefix = torch.arange(first, prefix_length, device=starts.device)
    sees_prefix = torch.ones(len(tokens), len(prefix), dtype=torch.bool, device=starts.device)
    sees_branch = (tokens >= starts[:, None]) & (tokens <= tokens[:, None])
    if window is not None:
        sees_prefix = prefix > positions[:, None] - window
        sees_branch &= positions > positions[:, None] - window
    sees = torch.cat([sees_prefix, sees_branch], dim=1)
    return torch.zeros(sees.shape, dtype=dtype, device=sees.device).masked_fill(~sees, torch.finfo(dtype).min)[
        None, None
    ]
