"""Between fp32 and the dtypes of tensors: what a GPU converts rightly, and Triton's interpreter does not."""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def widened(b_x):
    """b_x in fp32. The interpreter is wrong about denormals of bf16."""
    if INTERPRETED and b_x.dtype.is_bf16():
        return (b_x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return b_x.to(tl.float32)


@triton.jit
def rounded(b_x, DTYPE: tl.constexpr):
    """fp32 b_x to the nearest of DTYPE, ties to even. The interpreter cuts bf16 off."""
    if INTERPRETED and DTYPE.is_bf16():
        b_bits = b_x.to(tl.int32, bitcast=True)
        b_bits = (b_bits + 0x7FFF + ((b_bits >> 16) & 1)) >> 16
        return tl.where(b_x == b_x, b_bits, 0x7FC0).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return b_x.to(DTYPE)
