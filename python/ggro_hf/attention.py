"""`prefix_attention` as an attention implementation of transformers: branches of one cache without a dense mask.

    model.set_attn_implementation(PREFIX_ATTENTION)
    model(**pack_branches(branches, prefix_length), past_key_values=cache)

scores every branch as if it followed the cached prefix alone. A forward without `branch_starts` is causal attention.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from ggro_hf.transfer import to_device
from ggro_kernels import prefix_attention

PREFIX_ATTENTION = "ggro_prefix_attention"
"""The name to hand to `set_attn_implementation`."""

_USE_ANOTHER = "use model.set_attn_implementation('sdpa') or 'eager' for it"
_UNSUPPORTED = ("position_bias", "s_aux", "cu_seq_lens_q", "cache")


class SharedPrefix(Protocol):
    """Keys and values `[1, Hkv, >= length, D]` of one layer, of which the first `length` count."""

    keys: Tensor
    values: Tensor
    length: int


class LanePrefix(Protocol):
    """Keys and values `[B, Hkv, N, D]` of one layer that come before the branches of every row."""

    prefix_keys: Tensor
    prefix_values: Tensor


@dataclass(frozen=True, slots=True)
class StaticPrefix:
    """In place of a mask for one token behind a static cache: `lengths[1]` int64 on the device, and the window."""

    lengths: Tensor
    window: int | None


@contextmanager
def attending(model: PreTrainedModel, implementation: str) -> Iterator[None]:
    """The model with another attention implementation for a while."""
    previous = model.config._attn_implementation
    if implementation == previous:
        yield
        return
    # What set_attn_implementation does once it has looked at every module.
    model.config._attn_implementation = implementation
    try:
        yield
    finally:
        model.config._attn_implementation = previous


def pack_branches(
    branches: list[list[int]], prefix_length: int, device: torch.device | str | None = None
) -> dict[str, Tensor]:
    """Arguments of a forward that scores branches, the continuations of one prefix, in a single row.

    Args:
        branches: token ids, each branch of at least one token.
        prefix_length: tokens in the cache that the forward is given.
        device: of the model.

    Returns:
        `input_ids`, `position_ids` and `branch_starts`, each [1, T] int64 for the T tokens of all branches in order.

    Raises:
        ValueError: no branches, or one without tokens.
    """
    if not branches:
        raise ValueError("branches must be at least one, got none")
    if not all(branches):
        raise ValueError(f"branches must have at least one token each, got lengths {[len(x) for x in branches]}")
    lengths = [len(branch) for branch in branches]
    rows = [
        [token for branch in branches for token in branch],
        [prefix_length + index for length in lengths for index in range(length)],
        [end - length for length, end in zip(lengths, accumulate(lengths), strict=True) for _ in range(length)],
    ]
    input_ids, position_ids, branch_starts = to_device(rows, device)[:, None]
    return {"input_ids": input_ids, "position_ids": position_ids, "branch_starts": branch_starts}


def prefix_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | StaticPrefix | int | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    branch_starts: Tensor | None = None,
    branch_ends: Tensor | None = None,
    prefix_lengths: Tensor | None = None,
    lanes: Sequence[LanePrefix] | None = None,
    shared_prefix: Sequence[SharedPrefix] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of the query's T tokens to the cache, whose last T keys and values are their own.

    With `lanes` the cache has the branches alone, each in its own part of a buffer, and the prefix comes beside it. Its
    layers say that nothing comes before the T tokens: they answer `get_seq_length()` with 0,
    `get_mask_sizes(tokens)` with `(tokens, 0)`, and `is_compileable` with False; `position_ids` must then be given.

    Args:
        module: the attention layer.
        query: [B, Hq, T, D].
        key, value: [B, Hkv, N + T, D], prefix and branches; of a static prefix only the first tokens count. With
            `lanes` [B, Hkv, M, D], the branches.
        attention_mask: what `window_for_mask` gave.
        scaling, dropout, softcap, is_causal: as the model has them.
        sliding_window: likewise; some models tell their mask alone about it.
        branch_starts: [B, T] int64, see `pack_branches`; None for one branch.
        branch_ends: [B, T] int64, where the branches have the T tokens; None where they are these tokens in order.
        prefix_lengths: [B] int64, how much of the prefix counts; None for all of it.
        lanes: for every layer, the prefix of every row.
        shared_prefix: for every layer, what comes before the keys and values in all rows; for one token a row.

    Returns:
        output [B, T, Hq, D], and None for the attention weights, which are never there.

    Raises:
        ValueError: a mask, dropout or another variety of attention that `prefix_attention` does not compute.
        RuntimeError: gradients are wanted.
    """
    if isinstance(attention_mask, Tensor):
        raise ValueError(f"{PREFIX_ATTENTION} takes no 4-D attention_mask; give it branch_starts, or {_USE_ANOTHER}")
    if dropout:
        raise ValueError(f"{PREFIX_ATTENTION} has no dropout, got {dropout}: call model.eval(), or {_USE_ANOTHER}")
    for name in _UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise ValueError(f"{PREFIX_ATTENTION} does not compute attention with {name}; {_USE_ANOTHER}")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise ValueError(f"{PREFIX_ATTENTION} is causal, but the layer {type(module).__name__} is not; {_USE_ANOTHER}")
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        raise RuntimeError(f"{PREFIX_ATTENTION} has no backward pass: call the model under torch.no_grad()")
    batch, _, tokens, _ = query.shape
    if shared_prefix is not None:
        layer = shared_prefix[cast(int, module.layer_idx)]
        own_window = attention_mask if isinstance(attention_mask, int) else sliding_window
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return _one_token_behind_shared_prefix(query, key, value, layer, scale, softcap, own_window), None
    if branch_starts is None:
        branch_starts = torch.zeros(batch, tokens, dtype=torch.int64, device=query.device)
    if lanes is None:
        prefix = key.shape[2] - tokens
        prefix_key, branch_key = key[:, :, :prefix], key[:, :, prefix:]
        prefix_value, branch_value = value[:, :, :prefix], value[:, :, prefix:]
    else:
        lane = lanes[cast(int, module.layer_idx)]
        prefix_key, prefix_value, branch_key, branch_value = lane.prefix_keys, lane.prefix_values, key, value
    window = sliding_window if attention_mask is None else attention_mask
    if isinstance(window, StaticPrefix):
        prefix_lengths = window.lengths.expand(batch)
        window = sliding_window if window.window is None else window.window
    output = prefix_attention(
        query,
        prefix_key,
        prefix_value,
        branch_key,
        branch_value,
        branch_starts.expand(batch, -1),
        branch_ends=branch_ends,
        prefix_lengths=prefix_lengths,
        scale=scaling,
        softcap=softcap,
        window=window,
    )
    return output.transpose(1, 2).contiguous(), None


def _one_token_behind_shared_prefix(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix: SharedPrefix,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> Tensor:
    """Attention `[R, 1, Hq, D]` of one token a row to the prefix, read once for all rows, and to the row's own keys."""
    rows, heads, _, width = query.shape
    key_heads = key.shape[1]
    group = heads // key_heads
    beyond = 0 if window is None else max(0, prefix.length + key.shape[2] - window)
    shared = slice(min(beyond, prefix.length), prefix.length)
    own = slice(max(0, beyond - prefix.length), None)
    shared_key, shared_value = prefix.keys[0, :, shared], prefix.values[0, :, shared]
    grouped = query.view(rows, key_heads, group, width)
    by_head = grouped.transpose(0, 1).reshape(key_heads, rows * group, width)
    to_shared = (by_head @ shared_key.mT).view(key_heads, rows, group, shared_key.shape[1]).transpose(0, 1)
    scores = torch.cat([to_shared, grouped @ key[:, :, own].mT], dim=-1) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    # As eager attention does it; never in less than fp32.
    weights = torch.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(query.dtype)
    on_shared, on_own = weights.split([shared_key.shape[1], scores.shape[-1] - shared_key.shape[1]], dim=-1)
    from_shared = on_shared.transpose(0, 1).reshape(key_heads, rows * group, shared_key.shape[1]) @ shared_value
    output = from_shared.view(key_heads, rows, group, value.shape[-1]).transpose(0, 1) + on_own @ value[:, :, own]
    return output.reshape(rows, 1, heads, value.shape[-1])


def window_for_mask(
    *,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    config: PretrainedConfig | None = None,
    **kwargs: Any,
) -> StaticPrefix | int | None:
    """What a model's layers get in place of a mask: their sliding window, None where they have none.

    With a static cache, whose length is on the device, they get that as well.

    Raises ValueError for what only a mask could express: padding, and patterns that are more than causal.
    """
    if attention_mask is not None and not attention_mask.all():
        raise ValueError(
            f"{PREFIX_ATTENTION} takes no padding, but attention_mask has zeros: run rows of one length, or "
            f"{_USE_ANOTHER}"
        )
    if isinstance(q_offset, Tensor):
        # transformers' own static caches, which have the new token elsewhere, forbid the skip; `StaticLayer` does not.
        ends_with_them = q_length == 1 and allow_is_causal_skip
    else:
        ends_with_them = q_offset + q_length == kv_offset + kv_length
    if not ends_with_them:
        raise ValueError(f"{PREFIX_ATTENTION} needs a cache that ends with the new tokens, not a static one")
    # transformers forbids the skip wherever the pattern is more than causal: packed rows, blocks, both directions.
    if not allow_is_causal_skip or "chunked_attention" in (getattr(config, "layer_types", None) or ()):
        raise ValueError(
            f"{PREFIX_ATTENTION} computes causal and sliding-window attention only (branches need a cache, if an empty "
            f"one); {_USE_ANOTHER}"
        )
    if isinstance(q_offset, Tensor):
        return StaticPrefix(q_offset.reshape(1), local_size)
    return local_size


AttentionInterface.register(PREFIX_ATTENTION, prefix_attention_forward)
AttentionMaskInterface.register(PREFIX_ATTENTION, window_for_mask)
