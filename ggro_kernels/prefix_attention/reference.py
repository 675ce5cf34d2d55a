"""The specification of `prefix_attention` in eager torch: any device, any float dtype."""

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

    accumulate = accumulation_dtype(query)
    group = query.shape[1] // prefix_key.shape[1]
    key, value = (
        torch.cat([prefix, branch], 2).to(accumulate).repeat_interleave(group, 1)
        for prefix, branch in ((prefix_key, branch_key), (prefix_value, branch_value))
    )
    scores = query.to(accumulate) @ key.transpose(2, 3) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill(~visible[:, None], -torch.inf).softmax(3)
    # Zero times NaN is NaN: what nobody sees, such as memory not written yet, must not reach the sum.
    value = value.masked_fill(~visible.any(1)[:, None, :, None], 0)
    return (weights @ value).to(query.dtype).transpose(1, 2).contiguous().transpose(1, 2)
