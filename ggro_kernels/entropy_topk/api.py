"""Entropy, logsumexp and top k of logits in one read."""

from typing import NamedTuple

import torch

from ggro_kernels.checks import check_floating, check_k, check_temperature, check_tensor
from ggro_kernels.dispatch import check_impl
from ggro_kernels.entropy_topk.ops import entropy_topk_op


class EntropyTopK(NamedTuple):
    """Result of `entropy_topk` for R rows."""

    entropy: torch.Tensor
    """[R] fp32, nats."""
    logsumexp: torch.Tensor
    """[R] fp32."""
    values: torch.Tensor
    """[R, k] logits as given, dtype of the logits, largest first."""
    indices: torch.Tensor
    """[R, k] int64."""


def entropy_topk(logits: torch.Tensor, k: int, *, temperature: float = 1.0, impl: str = "auto") -> EntropyTopK:
    """Entropy and logsumexp of `softmax(logits / temperature)`, and the k largest logits, in one read of the logits.

    Args:
        logits: [R, V], fp32, bf16 or fp16 (fp64 by the reference only, whose entropy and logsumexp are then fp64);
            any strides, R may be 0.
        k: 1 .. min(256, V).
        temperature: 1e-30 .. 1e30, divides the logits in fp32. It changes entropy and logsumexp only: the values
            returned are the given logits, bit by bit.
        impl: "auto", "native", "triton" or "reference"; an explicit request runs or raises.

    Returns:
        `EntropyTopK(entropy[R], logsumexp[R], values[R, k], indices[R, k])`. Entropy, logsumexp and values are
        differentiable once: dH/dx = -p (log p + H) / T, dlse/dx = p / T, in the dtype of the logits, 0 where p is 0. A
        row whose entropy and logsumexp got a gradient of 0 passes on that of its values only, even if they are NaN.
        The order is value descending, then index ascending; -0.0 equals +0.0; NaN is the largest value.
        A logit of -inf has probability 0 and adds nothing to the entropy. A row of only -inf has logsumexp -inf and
        entropy NaN; +inf gives logsumexp +inf and entropy NaN; NaN makes both NaN. A row's result does not depend on
        the other rows or on the number of threads.

    Raises:
        TypeError, ValueError: wrong dtype, shape, k, temperature or impl.
        RuntimeError: the implementation asked for is not available.

    H = log S - T / S with S = sum e^(x-m), T = sum (x-m) e^(x-m), m = max x (the shifted form: no NaN at -inf).
    """
    check_tensor("logits", logits, "[R, V]")
    check_floating("logits", logits)
    check_k(k, logits.shape[1])
    check_temperature(temperature)
    check_impl(impl)
    return EntropyTopK(*entropy_topk_op(logits, k, temperature, impl))
