"""Rounding of results: what a GPU does by itself, and Triton's interpreter does not."""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def rounded(b_x, DTYPE: tl.constexpr):
    """fp32 b_x as it is to be stored in DTYPE: to the nearest, ties to even. The interpreter cuts bf16 off."""
    if INTERPRETED and DTYPE.is_bf16():
        b_bits = b_x.to(tl.int32, bitcast=True)
        b_bits = (b_bits + 32767 + ((b_bits >> 16) & 1)) & -65536
        b_x = tl.where(b_x == b_x, b_bits.to(tl.float32, bitcast=True), b_x)
    return b_x.to(DTYPE)
