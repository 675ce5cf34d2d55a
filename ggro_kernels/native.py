"""What every op's native.py needs to hand tensors to the extension."""

import torch

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""`ggro::DType` of csrc/include/ggro/types.h."""


def with_unit_column_stride(x: torch.Tensor) -> torch.Tensor:
    """`x` itself if its last dimension is contiguous, else a contiguous copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def address(x: torch.Tensor | None) -> int:
    """Where the elements of `x` lie; null for None."""
    return 0 if x is None else x.data_ptr()
