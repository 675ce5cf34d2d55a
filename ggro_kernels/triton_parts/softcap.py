"""The bound that some models put on their logits."""

import triton
import triton.language as tl


@triton.jit
def _tanh(b_x):
    """tanh of fp32, with a relative error below 4e-7 for every argument; NaN stays NaN."""
    b_square = b_x * b_x
    b_small = -5.70498872745e-3 * b_square + 2.06390887954e-2
    b_small = b_small * b_square - 5.37397155531e-2
    b_small = b_small * b_square + 1.33314422036e-1
    b_small = b_small * b_square - 3.33332819422e-1
    b_small = b_small * b_square * b_x + b_x
    # Of the negative magnitude, so that it cannot overflow; for small arguments the difference would cancel.
    b_power = tl.exp(-2.0 * tl.abs(b_x))
    b_large = tl.div_rn(1.0 - b_power, 1.0 + b_power)
    return tl.where(tl.abs(b_x) < 0.625, b_small, tl.where(b_x < 0.0, -b_large, b_large))


@triton.jit
def softcapped(b_x, softcap):
    """softcap * tanh(x / softcap)."""
    return softcap * _tanh(tl.div_rn(b_x, softcap))
