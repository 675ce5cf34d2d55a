"""Entropy, logsumexp and top k of logits in one read."""

from typing import NamedTuple

import torch

from ggro_kernels.dispatch import check_impl
from ggro_kernels.entropy_topk.ops import entropy_topk_op

MAX_K = 256
MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-30, 1e30


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
        `EntropyTopK(entropy[R], logsumexp[R], values[R, k], indices[R, k])`, detached from the logits.
        The order is value descending, then index ascending; -0.0 equals +0.0; NaN is the largest value.
        A logit of -inf has probability 0 and adds nothing to the entropy. A row of only -inf has logsumexp -inf and
        entropy NaN; +inf gives logsumexp +inf and entropy NaN; NaN makes both NaN. A row's result does not depend on
        the other rows or on the number of threads.

    Raises:
        TypeError, ValueError: wrong dtype, shape, k, temperature or impl.
        RuntimeError: the implementation asked for is not available.

    H = log S - T / S with S = sum e^(x-m), T = sum (x-m) e^(x-m), m = max x (the shifted form: no NaN at -inf).
    """
    if not isinstance(logits, torch.Tensor):
        raise TypeError(f"logits must be a torch.Tensor, got {type(logits).__name__}")
    if logits.dim() != 2:
        raise ValueError(f"logits must have shape [R, V], got {list(logits.shape)}: flatten leading dimensions first")
    if not logits.is_floating_point():
        raise TypeError(f"logits must be float32, bfloat16, float16 or float64, got {logits.dtype}")
    if isinstance(k, bool) or not isinstance(k, int | torch.SymInt):
        raise TypeError(f"k must be an int, got {type(k).__name__}")
    vocab = logits.shape[1]
    if not 1 <= k <= MAX_K or k > vocab:
        raise ValueError(f"k must be in 1 .. min({MAX_K}, V={vocab}), got {k}")
    if not MIN_TEMPERATURE <= temperature <= MAX_TEMPERATURE:
        raise ValueError(f"temperature must be in {MIN_TEMPERATURE} .. {MAX_TEMPERATURE}, got {temperature}")
    check_impl(impl)
    return EntropyTopK(*entropy_topk_op(logits, k, temperature, impl))
