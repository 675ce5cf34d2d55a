"""The bound that some models put on their scores and logits."""

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    """tanh of fp32: relative error below 4e-7, odd, NaN for NaN.

    Small arguments by Cephes' polynomial, others by e^(-2|x|), as in csrc/cpu/simd.h.
    """
    square = x * x
    series = -5.70498872745e-3 * square + 2.06390887954e-2
    series = series * square - 5.37397155531e-2
    series = series * square + 1.33314422036e-1
    series = series * square - 3.33332819422e-1
    magnitude = tl.abs(x)
    # Of the negative magnitude, so that it cannot overflow.
    power = tl.exp2(magnitude * -2.8853900817779268)
    large = (1.0 - power) / (1.0 + power)
    return tl.where(magnitude < 0.625, series * square * x + x, tl.where(x < 0.0, -large, large))


@triton.jit
def softcapped(b_x, softcap):
    """softcap * tanh(x / softcap)."""
    return softcap * tanh(tl.div_rn(b_x, softcap))
