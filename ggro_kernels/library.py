"""The torch.library namespace that every op of this package is registered in."""

from collections.abc import Callable
from typing import Any

import torch

NAMESPACE = "ggro_kernels"

_library = torch.library.Library(NAMESPACE, "DEF")
_names: list[str] = []


def register(
    schema: str,
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    save_for_backward: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Register one op for every device and return what calls it.

    Args:
        schema: the op's signature without namespace.
        kernel: runs it.
        fake: gives the shapes, dtypes and strides of its outputs.
        save_for_backward: `(ctx, inputs, output)`, with `backward`; without them the outputs are detached.
        backward: `(ctx, *gradients of the outputs)`, one gradient or None per input. It may call registered ops only,
            or the op could not be compiled.

    Define and impl cost 3-10 us a call, `torch.library.custom_op` 26-90 us.
    """
    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))
    _library.impl(name, kernel, "CompositeExplicitAutograd")
    _library.impl(name, torch.library.fallthrough_kernel, "Autograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    _names.append(name)
    op = getattr(getattr(torch.ops, NAMESPACE), name).default
    if backward is None or save_for_backward is None:
        return op
    return _differentiable(op, save_for_backward, backward)


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


def takes_impl(op: str) -> bool:
    """Whether `impl=` chooses what runs `op`; other ops are eager torch everywhere."""
    arguments = getattr(getattr(torch.ops, NAMESPACE), op).default._schema.arguments
    return any(argument.name == "impl" for argument in arguments)


def registered_ops() -> tuple[str, ...]:
    """Names of the ops registered so far, in alphabetical order."""
    return tuple(sorted(_names))
