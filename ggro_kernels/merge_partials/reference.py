"""The specification of `merge_partials` in eager torch: any device, any float dtype."""

import torch

from ggro_kernels.selection import take_bits, top_k_indices


def merge_partials(
    entropy: torch.Tensor, logsumexp: torch.Tensor, values: torch.Tensor, indices: torch.Tensor, offsets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`(entropy[R], logsumexp[R], values[R, k], indices[R, k])` of S shards; the sums are computed in fp64."""
    order = offsets.argsort(stable=True)
    parts, shares = logsumexp[order].double(), entropy[order].double()  # [S, R]
    # NaN is greater than any maximum, so amax carries it into everything below.
    largest = parts.amax(dim=0)
    whole = torch.where(largest.isinf(), largest, largest + (parts - largest).exp().sum(dim=0).log())
    probabilities = (parts - whole).exp()
    # The entropy of a shard without a finite logit is NaN.
    terms = torch.where(parts == -torch.inf, 0.0, probabilities * (shares + (whole - parts)))
    merged = torch.where(whole.isinf(), torch.nan, terms.sum(dim=0))

    candidates = values.transpose(0, 1).flatten(1)  # [R, S * k]
    positions = (indices + offsets[:, None, None]).transpose(0, 1).flatten(1)
    by_index = positions.argsort(dim=1)
    best = by_index.gather(1, top_k_indices(candidates.gather(1, by_index), values.shape[2]))
    return merged.to(entropy.dtype), whole.to(entropy.dtype), take_bits(candidates, best), positions.gather(1, best)
