"""Entropy and logsumexp from sums over parts of a row: m = max x, s = sum e^(x-m), t = sum (x-m) e^(x-m)."""

import triton
import triton.language as tl


@triton.jit
def finite_or_zero(m):
    """What to shift by: inf - inf would be NaN, and an infinite maximum says everything by itself."""
    return tl.where(tl.abs(m) == float("inf"), 0.0, m)


@triton.jit
def sums_of(b_x):
    """`(m, s, t)` of logits b_x [N]: s is NaN if one of them is, m the maximum of the others."""
    m = tl.max(b_x, 0)
    b_shifted = b_x - finite_or_zero(m)
    b_powers = tl.exp(b_shifted)
    # 0 * -inf would be NaN.
    b_products = tl.where(b_shifted == float("-inf"), 0.0, b_shifted * b_powers)
    return m, tl.sum(b_powers, 0), tl.sum(b_products, 0)


@triton.jit
def statistics(b_m, b_s, b_t):
    """`(entropy, logsumexp)` of a row from the sums [N] of its parts; absent parts have m = -inf and s = t = 0."""
    m = tl.max(b_m, 0)
    b_shift = b_m - finite_or_zero(m)
    b_scale = tl.exp(b_shift)
    s = tl.sum(b_scale * b_s, 0)
    t = tl.sum(tl.where(b_shift == float("-inf"), 0.0, b_scale * (b_t + b_shift * b_s)), 0)
    # By the parts: an infinite m next to them makes NaN of s without one.
    has_nan = tl.max((b_s != b_s).to(tl.int32), 0) > 0
    infinite = tl.abs(m) == float("inf")
    log_s = tl.log(s)
    entropy = tl.where(infinite | has_nan, float("nan"), log_s - t / s)
    logsumexp = tl.where(has_nan, float("nan"), tl.where(infinite, m, m + log_s))
    return entropy, logsumexp
