"""Branches of one cached prefix in as few forward passes as the model allows, each as if it were alone.

Three ways, tried in this order once for every model: `prefix_attention`; the model's own attention with a dense mask;
a pass for every branch, which in turn must agree with a plain forward.
"""

import logging
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from ggro_hf.attention import PREFIX_ATTENTION, attending, pack_branches
from ggro_hf.cache import RewindableCache
from ggro_hf.models import TOLERANCE, device_of, disagreement, embedding_rows
from ggro_hf.transfer import to_device

Packing = Callable[[PreTrainedModel, RewindableCache, list[list[int]], int], torch.Tensor]
"""(backbone, cache, branches, prefix length) -> hidden states [T, d] of the branches' T tokens in order.

Leaves the branches behind the prefix in the cache, one after another.
"""

_CHECK_PREFIX = 5
_CHECK_BRANCHES = (1, 3, 2)

_logger = logging.getLogger(__name__)


def run(model: PreTrainedModel, cache: RewindableCache, token_ids: list[int]) -> torch.Tensor:
    """Append tokens to the cache and return their hidden states `[T, d]`."""
    ids = to_device([token_ids], device_of(model))
    hidden: torch.Tensor = model(input_ids=ids, past_key_values=cache, use_cache=True).last_hidden_state
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
    inputs = pack_branches(branches, prefix_length, device_of(model))
    masks = {
        "full_attention" if window is None else "sliding_attention": _mask(inputs, prefix_length, window, model.dtype)
        for window in cache.windows
    }
    # Models whose layers are all alike take the mask itself, the others one for each kind.
    mask = masks if len(masks) > 1 else next(iter(masks.values()))
    return _run_masked(model, cache, inputs["input_ids"], inputs["position_ids"], mask)


def behind_tails(
    model: PreTrainedModel,
    cache: RewindableCache,
    branches: list[list[list[int]]],
    prefix_length: int,
    tail_lengths: list[int],
) -> torch.Tensor:
    """One pass over branches of several sequences: hidden states [T, d] in order.

    The cache has `prefix_length` tokens of all sequences, then what each has beyond them, its tail. Raises ValueError
    where the model's attention takes no mask of ours, or some layer has a window.
    """
    if cache.windows != {None}:
        raise ValueError("a sliding window counts the tails of other sequences")
    tokens = [
        (token, prefix_length + tail_lengths[sequence] + index, start, sequence)
        for start, (sequence, branch) in _starts(branches)
        for index, token in enumerate(branch)
    ]
    tails = [sequence for sequence, length in enumerate(tail_lengths) for _ in range(length)]
    device = device_of(model)
    ids, positions, starts, owners = to_device([list(column) for column in zip(*tokens, strict=True)], device)
    index = torch.arange(len(tokens), device=device)
    sees_prefix = torch.ones(len(tokens), prefix_length, dtype=torch.bool, device=device)
    sees_tail = owners[:, None] == to_device([tails], device)
    sees_branch = (index >= starts[:, None]) & (index <= index[:, None])
    mask = _additive(torch.cat([sees_prefix, sees_tail, sees_branch], dim=1), model.dtype)
    return _run_masked(model, cache, ids[None], positions[None], mask)


def _starts(branches: list[list[list[int]]]) -> Iterator[tuple[int, tuple[int, list[int]]]]:
    """Every branch with its sequence and the number of tokens before it."""
    start = 0
    for sequence, own in enumerate(branches):
        for branch in own:
            yield start, (sequence, branch)
            start += len(branch)


def _run_masked(
    model: PreTrainedModel,
    cache: RewindableCache,
    input_ids: torch.Tensor,
    position_ids: torch.Tensor,
    mask: torch.Tensor | dict[str, torch.Tensor],
) -> torch.Tensor:
    implementation = model.config._attn_implementation
    if implementation not in ("eager", "sdpa"):
        raise ValueError(f"attention {implementation!r} takes no dense mask")
    hidden: torch.Tensor = model(
        input_ids=input_ids,
        position_ids=position_ids,
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
    """The best way that gives this model's branches the hidden states of separate passes; checked once a model.

    Raises ValueError where a pass behind a cached prefix does not give the hidden states of a plain forward.
    """
    return _way_of(model).packing


def takes_tails(model: PreTrainedModel) -> bool:
    """Whether `behind_tails` gives this model's branches the hidden states of separate passes; checked once a model."""
    return _way_of(model).tails


class _Way(NamedTuple):
    packing: Packing
    tails: bool


_ways: weakref.WeakKeyDictionary[PreTrainedModel, _Way] = weakref.WeakKeyDictionary()


def _way_of(model: PreTrainedModel) -> _Way:
    if model not in _ways:
        _ways[model] = _choose(model)
        _logger.info("%s scores branches by %s", type(model).__name__, _ways[model].packing.__name__)
    return _ways[model]


def _choose(model: PreTrainedModel) -> _Way:
    if model.device.type == "meta":
        return _Way(one_by_one, False)
    rows = embedding_rows(model)
    prefix, *branches = [
        [(7 * token + length) % rows for token in range(length)] for length in (_CHECK_PREFIX, *_CHECK_BRANCHES)
    ]
    expected = _computed(model, prefix, lambda cache: one_by_one(model, cache, branches, _CHECK_PREFIX))
    tolerance = TOLERANCE[model.dtype] * max(1.0, float(expected.abs().max()))
    _check_cached(model, prefix, branches, expected, tolerance)

    def agrees(name: str, compute: Callable[[RewindableCache], torch.Tensor]) -> bool:
        reason = disagreement("hidden states", partial(_computed, model, prefix, compute), expected, model.dtype)
        if reason is not None:
            _logger.info("%s cannot score branches by %s: %s", type(model).__name__, name, reason)
        return reason is None

    def behind_copies(cache: RewindableCache) -> torch.Tensor:
        # The prefix but for its first token, twice, as the tails of two sequences.
        cache.write(cache.read(1, _CHECK_PREFIX))
        tails = [_CHECK_PREFIX - 1] * 2
        return behind_tails(model, cache, [branches[:1], branches[1:]], 1, tails)

    packing = next(
        (way for way in (by_prefix_attention, by_mask) if agrees(way.__name__, partial(_apply, way, model, branches))),
        one_by_one,
    )
    return _Way(packing, agrees(behind_tails.__name__, behind_copies))


def _check_cached(
    model: PreTrainedModel, prefix: list[int], branches: list[list[int]], cached: torch.Tensor, tolerance: float
) -> None:
    def plain(token_ids: list[int]) -> torch.Tensor:
        ids = to_device([token_ids], device_of(model))
        hidden: torch.Tensor = model(input_ids=ids, use_cache=False).last_hidden_state
        return hidden[0]

    with torch.inference_mode():
        # The prefix, too: with one layer, reading both directions changes nothing behind it.
        before = plain(prefix)
        behind = cached.split([len(branch) for branch in branches])
        error = max(
            float((plain(prefix + branch) - torch.cat([before, own])).abs().nan_to_num(torch.inf).max())
            for branch, own in zip(branches, behind, strict=True)
        )
    if not error <= tolerance:
        raise ValueError(
            f"{type(model).__name__} has other hidden states behind a cached prefix than in one pass (off by "
            f"{error:.2g}, tolerance {tolerance:.1g}): it is not causal or its weights are not finite"
        )


def _apply(packing: Packing, model: PreTrainedModel, branches: list[list[int]], cache: RewindableCache) -> torch.Tensor:
    return packing(model, cache, branches, _CHECK_PREFIX)


def _computed(
    model: PreTrainedModel, prefix: list[int], compute: Callable[[RewindableCache], torch.Tensor]
) -> torch.Tensor:
    """What is computed behind a cached prefix."""
    cache = RewindableCache(model.config)
    with torch.inference_mode():
        run(model, cache, prefix)
        return compute(cache).double()


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
    return _additive(torch.cat([sees_prefix, sees_branch], dim=1), dtype)


def _additive(sees: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    mask = torch.zeros(sees.shape, dtype=dtype, device=sees.device)
    return mask.masked_fill(~sees, torch.finfo(dtype).min)[None, None]
