"""The torch.library namespace that every op of this package is registered in."""

from collections.abc import Callable
from typing import Any

import torch

NAMESPACE = "ggro_kernels"

_library = torch.library.Library(NAMESPACE, "DEF")


def register(schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Register one op for every device and return its overload.

    `schema` is the op's signature without namespace, `kernel` runs it, `fake` gives the shapes, dtypes and strides of
    its outputs. Define and impl cost 3-10 us a call, `torch.library.custom_op` 26-90 us.
    """
    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))
    _library.impl(name, kernel, "CompositeExplicitAutograd")
    # The outputs are detached from the inputs, as documented by each op.
    _library.impl(name, torch.library.fallthrough_kernel, "Autograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    return getattr(getattr(torch.ops, NAMESPACE), name).default
