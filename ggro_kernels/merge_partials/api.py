"""One `entropy_topk` from those of vocabulary shards."""

import torch

from ggro_kernels.checks import check_floating, check_int64, check_shape, check_tensor
from ggro_kernels.dispatch import check_impl
from ggro_kernels.entropy_topk.api import EntropyTopK
from ggro_kernels.merge_partials.ops import merge_partials_op


def merge_partials(
    entropy: torch.Tensor,
    logsumexp: torch.Tensor,
    values: torch.Tensor,
    indices: torch.Tensor,
    offsets: torch.Tensor,
    *,
    impl: str = "auto",
) -> EntropyTopK:
    """The `entropy_topk` of whole rows, from that of every shard of a tensor-parallel vocabulary.

    Each of S ranks calls `entropy_topk(logits[:, first:last], k)` on its slice and gathers the small results instead
    of the logits.

    Args:
        entropy: [S, R] fp32, nats, at the same temperature in every shard (fp64 by the reference only).
        logsumexp: [S, R], dtype of the entropy.
        values: [S, R, k], fp32, bf16 or fp16 (fp64 by the reference only), k the same for every shard, which may
            differ in size.
        indices: [S, R, k] int64, within the shard.
        offsets: [S] int64, the first column of each shard, all different. The shards may come in any order: it does
            not change a bit of the result.
        impl: "auto", "native", "triton" or "reference"; an explicit request runs or raises.

    Returns:
        `EntropyTopK(entropy[R], logsumexp[R], values[R, k], indices[R, k])`, detached from the inputs: what
        `entropy_topk` gives for the whole rows, indices counted from the first column of the row. Values and indices
        are exactly those. Entropy and logsumexp are summed in fp64, so that they err by what the shards' were rounded
        by: a logsumexp of fp32 is off by up to `6e-8 * |logsumexp|`, and the entropy with it.
        A shard of only -inf adds nothing; rows of only -inf, with +inf or with NaN are as in `entropy_topk`.

    Raises:
        TypeError, ValueError: wrong dtypes, shapes, devices or impl.
        RuntimeError: the implementation asked for is not available.

    lse = logsumexp_i lse_i; H = sum_i p_i (H_i + lse - lse_i), p_i = e^(lse_i - lse).
    """
    check_tensor("values", values, "[S, R, k]")
    check_tensor("entropy", entropy, "[S, R]", like=values)
    check_tensor("logsumexp", logsumexp, "[S, R]", like=values)
    check_tensor("indices", indices, "[S, R, k]", like=values)
    check_tensor("offsets", offsets, "[S]", like=values)
    check_floating("values", values)
    if entropy.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"entropy must be float32 or float64, got {entropy.dtype}")
    if logsumexp.dtype != entropy.dtype:
        raise TypeError(f"logsumexp must have the entropy's dtype {entropy.dtype}, got {logsumexp.dtype}")
    check_int64("indices", indices)
    check_int64("offsets", offsets)
    shards, rows, k = values.shape
    if shards < 1 or k < 1:
        raise ValueError(f"values must have one shard or more and k of 1 or more, got shape {list(values.shape)}")
    check_shape("entropy", entropy, (shards, rows), "values")
    check_shape("logsumexp", logsumexp, (shards, rows), "values")
    check_shape("indices", indices, (shards, rows, k), "values")
    check_shape("offsets", offsets, (shards,), "values")
    check_impl(impl)
    return EntropyTopK(*merge_partials_op(entropy, logsumexp, values, indices, offsets, impl))
