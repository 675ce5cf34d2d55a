"""Entropy, logsumexp and top k of a language model head's logits, without the logits."""

import torch

from ggro_kernels.checks import check_floating, check_k, check_per_token, check_softcap, check_temperature, check_tensor
from ggro_kernels.dispatch import check_impl
from ggro_kernels.entropy_topk.api import EntropyTopK
from ggro_kernels.lm_head_entropy_topk.ops import lm_head_entropy_topk_op


def lm_head_entropy_topk(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    k: int,
    *,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
    temperature: float = 1.0,
    impl: str = "auto",
) -> EntropyTopK:
    """`entropy_topk` of `softcap * tanh((hidden @ weight.T + bias) / softcap)`: one read of the weight, no `[R, V]`.

    Args:
        hidden: [R, d], fp32, bf16 or fp16 (fp64 by the reference only); any strides, R and d may be 0.
        weight: [V, d], one of the same dtypes, which need not be that of `hidden`; any strides.
        k: 1 .. min(256, V).
        bias: [V], any float dtype, used in the precision of the logits. A bias of -inf masks a token, unless there is
            a softcap, which makes it -softcap.
        softcap: 1e-30 .. 1e30, the bound of the logits, `final_logit_softcapping` of Gemma 2; None for no bound.
        temperature: 1e-30 .. 1e30, divides the logits in fp32. It changes entropy and logsumexp only.
        impl: "auto", "native", "triton" or "reference"; an explicit request runs or raises. The reference holds all
            logits.

    Returns:
        `EntropyTopK(entropy[R], logsumexp[R], values[R, k], indices[R, k])`, detached from the inputs: no gradient
        flows through it. All but the indices are fp32 (fp64 if hidden or weight is fp64). The logits are accumulated,
        used and returned in fp32: they are not rounded to the dtype of a bf16 or fp16 model, whose own logits have
        ties and roundings that these have not.
        The order is value descending, then index ascending; -0.0 equals +0.0; NaN is the largest value. A row of only
        -inf has logsumexp -inf and entropy NaN; +inf gives logsumexp +inf and entropy NaN; NaN makes both NaN. A row's
        result does not depend on the other rows or on the number of threads.

    Raises:
        TypeError, ValueError: wrong dtypes, shapes, devices, k, softcap, temperature or impl.
        RuntimeError: the implementation asked for is not available.

    H = log S - T / S with S = sum e^(x-m), T = sum (x-m) e^(x-m), m = max x over the logits x divided by temperature.
    """
    check_tensor("hidden", hidden, "[R, d]")
    check_tensor("weight", weight, "[V, d]", like=hidden)
    check_floating("hidden", hidden)
    check_floating("weight", weight)
    vocab, width = weight.shape
    if width != hidden.shape[1]:
        raise ValueError(f"weight must have the width of hidden, d={hidden.shape[1]}, got shape {list(weight.shape)}")
    check_k(k, vocab)
    if bias is not None:
        check_per_token("bias", bias, vocab, like=hidden)
        check_floating("bias", bias)
    check_softcap(softcap)
    check_temperature(temperature)
    check_impl(impl)
    return EntropyTopK(*lm_head_entropy_topk_op(hidden, weight, k, bias, softcap, temperature, impl))
