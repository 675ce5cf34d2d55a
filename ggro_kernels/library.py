"""The torch.library namespace that every op of this package is registered in."""

import pkgutil
from collections.abc import Callable
from typing import Any

import torch

from ggro_kernels.dispatch import resolve

NAMESPACE = "ggro_kernels"

_library = torch.library.Library(NAMESPACE, "DEF")
_names: list[str] = []
_with_cuda_kernels: set[str] = set()
_with_triton_kernels: set[str] = set()


def register(
    schema: str,
    *,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    native: Callable[..., Any] | None = None,
    cuda: bool = False,
    triton: str | None = None,
    dtypes_of: tuple[str, ...] = (),
    save_for_backward: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Register one op for every device and return what calls it.

    Args:
        schema: the op's signature without namespace. With kernels, its last argument is `str impl`.
        reference: runs it in eager torch, without `impl`; never in an autograd graph.
        fake: gives the shapes, dtypes and strides of its outputs.
        native: runs it by the extension, without `impl`.
        cuda: whether `native` takes tensors on a GPU too.
        triton: "module:function" that runs it by Triton, without `impl`; imported on the first call.
        dtypes_of: with kernels, the tensors whose device and dtypes decide what runs (`dispatch.resolve`).
        save_for_backward: `(ctx, inputs, output)`, with `backward`; without them the outputs are detached.
        backward: `(ctx, *gradients of the outputs)`, one gradient or None per input. It may call registered ops only,
            or the op could not be compiled.

    Define and impl cost 3-10 us a call, `torch.library.custom_op` 26-90 us.
    """
    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))
    op = getattr(getattr(torch.ops, NAMESPACE), name).default

    def run_reference(*arguments: Any) -> Any:
        with torch.no_grad():
            return reference(*arguments)

    kernel = run_reference
    if dtypes_of:
        names = [argument.name for argument in op._schema.arguments]
        deciding = [names.index(tensor) for tensor in dtypes_of]
        implementations = {"reference": run_reference, "native": native, "triton": triton and _launcher(triton)}
        kernel = _chosen_by_impl(implementations, deciding, cuda, triton is not None)
        if cuda:
            _with_cuda_kernels.add(name)
        if triton is not None:
            _with_triton_kernels.add(name)
    _library.impl(name, kernel, "CompositeExplicitAutograd")
    _library.impl(name, torch.library.fallthrough_kernel, "Autograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    _names.append(name)
    if backward is None or save_for_backward is None:
        return op
    return _differentiable(op, save_for_backward, backward)


def _chosen_by_impl(
    implementations: dict[str, Any], deciding: list[int], cuda: bool, triton: bool
) -> Callable[..., Any]:
    """Runs what the last argument and the tensors at the places `deciding` choose."""

    def run(*arguments: Any) -> Any:
        *arguments_of_kernel, impl = arguments
        device = arguments[deciding[0]].device
        chosen = resolve(impl, device, *[arguments[place].dtype for place in deciding], cuda=cuda, triton=triton)
        return implementations[chosen](*arguments_of_kernel)

    return run


def _launcher(entry_point: str) -> Callable[..., Any]:
    """Runs "module:function" of Triton launches, imported on the first call."""
    launch: Callable[..., Any] | None = None

    def run(*arguments: Any) -> Any:
        nonlocal launch
        if launch is None:
            launch = pkgutil.resolve_name(entry_point)
        # Triton launches on the current device, whichever the tensors are on.
        device = next(argument.device for argument in arguments if isinstance(argument, torch.Tensor))
        with torch.no_grad(), torch.cuda.device(device if device.type == "cuda" else -1):
            return launch(*arguments)

    return run


def _differentiable(
    op: Callable[..., Any], save_for_backward: Callable[..., Any], backward: Callable[..., Any]
) -> Callable[..., Any]:
    """Calls `op`, within the graph where one of its arguments needs a gradient.

    `torch.library.register_autograd` would go through Python twice, 10 us a call, where nothing needs one.
    """
    function: Any = type(
        "Differentiable",
        (torch.autograd.Function,),
        {
            "forward": staticmethod(lambda *args: op(*args)),
            "setup_context": staticmethod(save_for_backward),
            "backward": staticmethod(backward),
        },
    )

    def call(*args: Any) -> Any:
        if torch.is_grad_enabled():
            for arg in args:
                if isinstance(arg, torch.Tensor) and arg.requires_grad:
                    return function.apply(*args)
        return op(*args)

    return call


def constant(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that an op has no gradient for, outside the graph."""
    return tensor.detach() if tensor.requires_grad else tensor


def takes_impl(op: str) -> bool:
    """Whether `impl=` chooses what runs `op`; other ops are eager torch everywhere."""
    arguments = getattr(getattr(torch.ops, NAMESPACE), op).default._schema.arguments
    return any(argument.name == "impl" for argument in arguments)


def automatic(op: str, device: torch.device, *dtypes: torch.dtype) -> str:
    """What `impl="auto"` runs of `op` on tensors of these dtypes."""
    if not takes_impl(op):
        return "reference"
    return resolve("auto", device, *dtypes, cuda=has_cuda_kernels(op), triton=has_triton_kernels(op))


def has_cuda_kernels(op: str) -> bool:
    """Whether `impl="native"` runs `op` on a GPU, where the extension has its CUDA part."""
    return op in _with_cuda_kernels


def has_triton_kernels(op: str) -> bool:
    """Whether `impl="triton"` runs `op`, where there is Triton."""
    return op in _with_triton_kernels


def registered_ops() -> tuple[str, ...]:
    """Names of the ops registered so far, in alphabetical order."""
    return tuple(sorted(_names))
