"""The samples of every op on a GPU, with each of its kernels."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_map_only

from ggro_kernels import dispatch
from ggro_kernels.dispatch import KERNEL_DTYPES
from ggro_kernels.library import has_cuda_kernels, has_triton_kernels
from tests.conftest import poison
from tests.ggro_kernels.op_calls import outputs_of
from tests.ggro_kernels.placed import to_gpu
from tests.ggro_kernels.samples import SAMPLES, OpSample

requires_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")


def has_kernels(sample: OpSample) -> bool:
    """fp64, and an op without kernels for a GPU, are for the eager reference."""
    if not impls_of(sample.function.__name__):
        return False
    floating = [x for x in sample.arguments.values() if isinstance(x, torch.Tensor) and x.is_floating_point()]
    return all(x.dtype in KERNEL_DTYPES for x in floating)


def impls_of(op: str) -> tuple[str, ...]:
    """The values of `impl=` that run the op's own kernels on a GPU."""
    return ("triton",) * has_triton_kernels(op) + ("native",) * has_cuda_kernels(op)


KERNEL_SAMPLES = {name: sample for name, sample in SAMPLES.items() if has_kernels(sample)}

sampled = pytest.mark.parametrize("sample", [pytest.param(sample, id=name) for name, sample in KERNEL_SAMPLES.items()])


def requires(impl: str) -> pytest.MarkDecorator:
    """Skips where there is a GPU on which the extension's kernels do not run."""
    error = dispatch.cuda_error() if impl == "native" and torch.cuda.is_available() else None
    return pytest.mark.skipif(error is not None, reason=f"cuda: {error}")


with_kernels = pytest.mark.parametrize(
    "sample, impl",
    [
        pytest.param(sample, impl, id=f"{name}-{impl}", marks=requires(impl))
        for name, sample in KERNEL_SAMPLES.items()
        for impl in impls_of(sample.function.__name__)
    ],
)


@dataclass
class GpuCall:
    """A public function and arguments for it on the GPU, whose values can change in place."""

    function: Callable[..., Any]
    arguments: dict[str, Any]

    @classmethod
    def of(cls, sample: OpSample, impl: str = "auto") -> "GpuCall":
        return cls(partial(sample.function, impl=impl), tree_map_only(torch.Tensor, to_gpu, sample.arguments))

    def __call__(self, function: Callable[..., Any] | None = None, **options: Any) -> Any:
        """What the function gives, or what another in its place does."""
        return (function or self.function)(**self.arguments, **options)

    def floating(self) -> list[torch.Tensor]:
        """The arguments that any numbers may take the place of."""
        return [x for x in self.arguments.values() if isinstance(x, torch.Tensor) and x.is_floating_point()]

    def halve(self) -> None:
        """Other values, in the same order where an order is asked for, in [0, 1) where that is."""
        for x in self.floating():
            x.mul_(0.5)

    def has_numbers(self, result: Any) -> bool:
        """Whether the result has any and is made of any."""
        return any(x.numel() for x in outputs_of(result)) and any(x.numel() for x in self.floating())


def overwrite(result: Any) -> None:
    """So that what is found there later was written later."""
    for x in outputs_of(result):
        x.fill_(poison(x.dtype))


def copy_of(result: Any) -> tuple[torch.Tensor, ...]:
    """The tensors of a result as they are now, in their layout."""
    return tuple(map(partial(torch.clone, memory_format=torch.preserve_format), outputs_of(result)))


def differ(one: Any, other: Any) -> bool:
    """Whether any number of two results does."""
    return any(not torch.equal(a, b) for a, b in zip(outputs_of(one), outputs_of(other), strict=True))
