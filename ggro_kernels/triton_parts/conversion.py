"""Between fp32 and the dtypes of tensors, exactly in Triton's interpreter too: its `.to` cuts off and spoils bf16."""

import triton
import triton.language as tl


@triton.jit
def widened(b_x):
    """b_x in fp32; the interpreter's own conversion is wrong about denormals of bf16."""
    if b_x.dtype == tl.bfloat16:
        return (b_x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return b_x.to(tl.float32)


@triton.jit
def rounded(b_x, DTYPE: tl.constexpr):
    """fp32 b_x to the nearest of DTYPE, ties to even; the interpreter's own conversion to bf16 cuts off."""
    if tl.bfloat16 == DTYPE:
        b_bits = b_x.to(tl.int32, bitcast=True)
        b_bits = (b_bits + 0x7FFF + ((b_bits >> 16) & 1)) >> 16
        b_bits = tl.where(b_x == b_x, b_bits, 0x7FC0)
        return b_bits.to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return b_x.to(DTYPE)
