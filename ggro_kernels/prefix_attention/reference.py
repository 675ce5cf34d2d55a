"""The specification of `prefix_attention` and its gradient in eager torch: any device, any float dtype."""

from typing import NamedTuple

import torch

from ggro_kernels.checks import check_indices
from ggro_kernels.precision import accumulation_dtype


def prefix_attention(
    query: torch.Tensor,
    prefix_key: torch.Tensor,
    prefix_value: torch.Tensor,
    branch_key: torch.Tensor,
    branch_value: torch.Tensor,
    branch_starts: torch.Tensor,
    branch_ends: torch.Tensor | None,
    prefix_lengths: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> torch.Tensor:
    """output [B, Hq, T, Dv] of query [B, Hq, T, D]; keys, values and branches as in the public function."""
    visible = _visible(query, prefix_key, branch_key, branch_starts, branch_ends, prefix_lengths, window)
    forward = _forward(query, prefix_key, prefix_value, branch_key, branch_value, visible, scale, softcap)
    return _by_token((forward.weights @ forward.value).to(query.dtype))


def prefix_attention_backward(
    gradient: torch.Tensor,
    query: torch.Tensor,
    prefix_key: torch.Tensor,
    prefix_value: torch.Tensor,
    branch_key: torch.Tensor,
    branch_value: torch.Tensor,
    branch_starts: torch.Tensor,
    branch_ends: torch.Tensor | None,
    prefix_lengths: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What reaches query, branch_key and branch_value from gradient [B, Hq, T, Dv]."""
    visible = _visible(query, prefix_key, branch_key, branch_starts, branch_ends, prefix_lengths, window)
    forward = _forward(query, prefix_key, prefix_value, branch_key, branch_value, visible, scale, softcap)
    gradient = gradient.to(forward.weights)
    of_weights = gradient @ forward.value.mT
    mean = (of_weights * forward.weights).sum(3, keepdim=True)
    of_scores = (forward.weights * (of_weights - mean)).masked_fill(~visible[:, None], 0) * scale
    if softcap is not None:
        of_scores *= 1 - (forward.scores / softcap) ** 2
    key_heads, prefix_tokens = prefix_key.shape[1:3]

    def of_branch(weights: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        heads = weights[..., prefix_tokens:].mT @ x.to(weights)
        return _by_token(heads.unflatten(1, (key_heads, -1)).sum(2).to(query.dtype))

    of_query = _by_token((of_scores @ forward.key).to(query.dtype))
    return of_query, of_branch(of_scores, query), of_branch(forward.weights.masked_fill(~visible[:, None], 0), gradient)


class _Forward(NamedTuple):
    """Keys [B, Hq, N + M, D] and values, scores and their softmax [B, Hq, T, N + M]."""

    key: torch.Tensor
    value: torch.Tensor
    scores: torch.Tensor
    weights: torch.Tensor


def _forward(
    query: torch.Tensor,
    prefix_key: torch.Tensor,
    prefix_value: torch.Tensor,
    branch_key: torch.Tensor,
    branch_value: torch.Tensor,
    visible: torch.Tensor,
    scale: float,
    softcap: float | None,
) -> _Forward:
    accumulate = accumulation_dtype(query)
    group = query.shape[1] // prefix_key.shape[1]
    # Zero times NaN is NaN: what nobody sees, such as memory not written yet, must not reach a sum.
    seen = visible.any(1)[:, None, :, None]
    key, value = (
        torch.cat([prefix, branch], 2).to(accumulate).masked_fill(~seen, 0).repeat_interleave(group, 1)
        for prefix, branch in ((prefix_key, branch_key), (prefix_value, branch_value))
    )
    scores = query.to(accumulate) @ key.mT * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return _Forward(key, value, scores, scores.masked_fill(~visible[:, None], -torch.inf).softmax(3))


def _visible(
    query: torch.Tensor,
    prefix_key: torch.Tensor,
    branch_key: torch.Tensor,
    branch_starts: torch.Tensor,
    branch_ends: torch.Tensor | None,
    prefix_lengths: torch.Tensor | None,
    window: int | None,
) -> torch.Tensor:
    """[B, T, N + M], which keys each token sees."""
    prefix_tokens, branch_tokens, tokens = prefix_key.shape[2], branch_key.shape[2], query.shape[2]
    if branch_ends is None:
        branch_ends = torch.arange(tokens, device=query.device).expand_as(branch_starts)
    check_indices("branch_ends", branch_ends, branch_tokens - 1, "the branch tokens there are")
    check_indices("branch_starts", branch_starts, branch_ends, "the tokens up to this one")
    if prefix_lengths is None:
        prefix_lengths = branch_starts.new_full(branch_starts.shape[:1], prefix_tokens)
    check_indices("prefix_lengths", prefix_lengths, prefix_tokens, "the prefix tokens there are")

    place = torch.arange(prefix_tokens, device=query.device)
    in_prefix = (place < prefix_lengths[:, None])[:, None, :]
    branch_place = torch.arange(branch_tokens, device=query.device)
    in_branch = (branch_place >= branch_starts[:, :, None]) & (branch_place <= branch_ends[:, :, None])
    visible = torch.cat([in_prefix.expand(-1, tokens, -1), in_branch], 2)
    if window is not None:
        position = (prefix_lengths[:, None] + branch_ends - branch_starts)[:, :, None]
        prefix_position = place.expand(len(branch_starts), tokens, -1)
        branch_position = position - branch_ends[:, :, None] + branch_place
        visible &= torch.cat([prefix_position, branch_position], 2) > position - window
    return visible


def _by_token(x: torch.Tensor) -> torch.Tensor:
    """[B, H, T, D], laid out in memory as [B, T, H, D]."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)
