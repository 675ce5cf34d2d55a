"""What the kernel benchmarks run: one registry of op x shape x dtype, each with its providers.

A module of `benchmarks/ops` adds one op by being there: it defines `CASES`, a list of `Case`, `GPU_CASES`, those of a
GPU's size (none where there is nothing to measure), and `SMALL`, one that takes no time, on which the tests compare all
providers.
"""

import importlib
import importlib.util
import pkgutil
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch

import benchmarks.ops
import ggro_kernels

OURS = "ggro"
TRITON = "ggro, Triton"
"""Our Triton kernels, beside our CUDA kernels."""

Inputs = dict[str, Any]


def always() -> bool:
    return True


@dataclass(frozen=True)
class Provider:
    """One way to compute an op: `function(**prepare(**inputs))`, of which only the function is timed."""

    name: str
    function: Callable[..., Any]
    prepare: Callable[..., Inputs] = dict
    """What a caller has at hand before the op (a mask, a parameter): made from the inputs, outside the clock."""
    compiled: bool = False
    part: bool = False
    """Does a part of the work only: the times of the parts together are what the whole may take."""
    available: Callable[[], bool] = always
    """False where this machine lacks what it needs: a library, a compiler, a GPU."""
    of_impl: Callable[[str], Callable[..., Any]] | None = None
    """Of our kernel: the function with an `impl`."""

    def bind(self, inputs: Inputs) -> Callable[[], Any]:
        """The call to be timed."""
        # Specialised to the shapes, as a decoder of fixed shapes would have it.
        function = torch.compile(self.function, dynamic=False) if self.compiled else self.function
        return partial(function, **self.prepare(**inputs))


@dataclass(frozen=True)
class Case:
    """One op on one shape and dtype."""

    op: str
    label: str
    """The shape as a table shows it."""
    shape: Mapping[str, int]
    dtype: torch.dtype
    bytes: int
    """Least memory traffic of the op: what it must read and write once."""
    flops: int
    inputs: Callable[[], Inputs]
    providers: tuple[Provider, ...]
    quick: bool = False
    """Part of `--quick`."""
    shown: bool = False
    """Part of README's table."""
    memory: bool = False
    """Part of `--memory`."""

    @property
    def name(self) -> str:
        """Unique in the registry."""
        return f"{self.op}[{self.label}, {dtype_name(self.dtype)}]"

    def available_providers(self) -> list[Provider]:
        """Ours first, the baselines in their order."""
        return [provider for provider in self.providers if provider.available()]


def ours(op: str, wrap: Callable[[Any], Callable[..., Any]] | None = None) -> Provider:
    """The kernel of this project, `wrap` around it; not available in a version that does not have the op yet."""
    kernel = getattr(ggro_kernels, op, None)

    @cache
    def of_impl(impl: str) -> Callable[..., Any]:
        named = partial(kernel, impl=impl)
        return wrap(named) if wrap else named

    return Provider(OURS, wrap(kernel) if wrap else kernel, available=lambda: kernel is not None, of_impl=of_impl)


def on_gpu(case: Case) -> Case:
    """The case with our kernels for a GPU: those of CUDA and of Triton where both run, never the eager reference."""
    providers = []
    for provider in case.providers:
        providers += [provider] if provider.of_impl is None else _gpu_providers(case.op, provider, provider.of_impl)
    return replace(case, providers=tuple(providers))


def _gpu_providers(op: str, ours: Provider, of_impl: Callable[[str], Callable[..., Any]]) -> list[Provider]:
    """What `impl="auto"` runs on a GPU, and Triton's where that is something else. Triton's are asked for by name."""

    def automatic(**inputs: Any) -> Any:
        return of_impl("native" if runs_cuda_kernels(op) else "triton")(**inputs)

    def triton(**inputs: Any) -> Any:
        return of_impl("triton")(**inputs)

    return [
        replace(ours, function=automatic, of_impl=None),
        replace(ours, name=TRITON, function=triton, of_impl=None, available=lambda: runs_cuda_kernels(op)),
    ]


def runs_cuda_kernels(op: str) -> bool:
    """Whether the extension has CUDA kernels of the op that run on the current GPU."""
    # Not every version of ggro_kernels that is measured has them.
    from ggro_kernels import dispatch, library

    return library.has_cuda_kernels(op) and dispatch.cuda_error() is None


def compiled(function: Callable[..., Any]) -> Provider:
    """A function under torch.compile."""
    return Provider("torch.compile", function, compiled=True, available=has_compiler)


def importable(module: str) -> Callable[[], bool]:
    """Whether a library is installed."""
    return lambda: importlib.util.find_spec(module) is not None


def has_compiler() -> bool:
    """Whether torch.compile can build code for the CPU, and Triton its launchers."""
    return any(map(shutil.which, ("g++", "clang++", "c++")))


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` of torch.float32."""
    return str(dtype).removeprefix("torch.")


def load_cases(ops: Iterable[str] | None = None, *, gpu: bool = False) -> list[Case]:
    """The cases of all modules of benchmarks/ops whose op this version of ggro_kernels has; of some ops if named.

    Raises:
        ValueError: no module has cases of an op named.
    """
    cases = [case for module in _modules() for case in (map(on_gpu, module.GPU_CASES) if gpu else module.CASES)]
    if ops is not None:
        known = {case.op for case in cases}
        if unknown := set(ops) - known:
            raise ValueError(f"unknown op {min(unknown)!r}, the registry has {', '.join(sorted(known))}")
        cases = [case for case in cases if case.op in ops]
    return [case for case in cases if _has_ours(case)]


def load_small_cases() -> dict[str, Case]:
    """The small case of every op that this version of ggro_kernels has."""
    cases = [module.SMALL for module in _modules()]
    return {case.op: case for case in cases if _has_ours(case)}


def _modules() -> list[Any]:
    found = pkgutil.iter_modules(benchmarks.ops.__path__, "benchmarks.ops.")
    return [importlib.import_module(module.name) for module in found]


def _has_ours(case: Case) -> bool:
    return any(provider.name == OURS for provider in case.available_providers())
