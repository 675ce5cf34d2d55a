"""Which ops of this package ran, and what they gave."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ggro_kernels.library import NAMESPACE
from ggro_kernels.testing import bitwise


class OpCalls(TorchDispatchMode):
    """Records the calls of this package's ops."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.namespace == NAMESPACE:
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


def outputs_of(result: Any) -> tuple[torch.Tensor, ...]:
    """The tensors that a public function returned."""
    return (result,) if isinstance(result, torch.Tensor) else tuple(result)


def assert_bitwise_equal(actual: Any, expected: Any) -> None:
    """Raise AssertionError unless two results are equal bit for bit, in shape, dtype and strides, too."""
    for a, b in zip(outputs_of(actual), outputs_of(expected), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype and a.stride() == b.stride()
        assert torch.equal(bitwise(a), bitwise(b)) if a.is_floating_point() else torch.equal(a, b)
