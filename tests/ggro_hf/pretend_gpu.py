"""A device that behaves as a GPU does and computes on the CPU: tensors of two devices do not mix, and transfers count.

Registering it is for the whole process and for good (torch then takes it for its accelerator), and must come before the
first backward pass, so tests that use it run in a process of their own: see test_pretend_gpu.py.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

NAME = "pretend_gpu"


class _Module:
    """What torch asks of a device's module; no devices, so that nobody saves their random state."""

    is_initialized = staticmethod(lambda: True)
    is_available = staticmethod(lambda: False)
    device_count = staticmethod(lambda: 0)
    current_device = staticmethod(lambda: 0)
    _is_in_bad_fork = staticmethod(lambda: False)
    manual_seed_all = staticmethod(lambda seed: None)


backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
DEVICE = torch.device(NAME, 0)


class Transfers:
    """How often values came to the host, and went to the device, since `clear`."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.reads = self.uploads = 0


class OnPretendGPU(torch.Tensor):
    """Claims to be on `DEVICE`; `elem` has the values."""

    elem: torch.Tensor

    @staticmethod
    def __new__(cls, elem: torch.Tensor) -> "OnPretendGPU":
        layout = {"strides": elem.stride(), "storage_offset": elem.storage_offset(), "dtype": elem.dtype}
        return torch.Tensor._make_wrapper_subclass(cls, elem.shape, device=DEVICE, **layout)

    def __init__(self, elem: torch.Tensor) -> None:
        self.elem = elem

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Without `pretend_gpu()` there are no factories on the device, but backward passes come here in other threads.
        return _current.run(func, args, kwargs or {})

    # torch refuses to list the values of a subclass.
    def tolist(self) -> Any:
        return self.cpu().tolist()


class _PretendGPU(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.transfers = Transfers()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.run(func, args, kwargs or {})

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        # In inference mode ops arrive that are made of others.
        if func.namespace == "aten" and torch._C._dispatch_has_kernel_for_dispatch_key(
            func.name(), "CompositeImplicitAutograd"
        ):
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        leaves = tree_leaves((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        from_device = [isinstance(tensor, OnPretendGPU) for tensor in tensors]
        devices = [leaf for leaf in leaves if isinstance(leaf, torch.device)]
        to_device = devices[0].type == NAME if devices else any(from_device)
        if func is torch.ops.aten._local_scalar_dense.default:
            self.transfers.reads += any(from_device)
        elif func is torch.ops.aten._to_copy.default:
            self._count(from_device[0], to_device)
        elif func is torch.ops.aten.copy_.default:
            self._count(from_device[1], from_device[0])
        elif any(from_device):
            _refuse_mixture(func, tensors)
        elem_args, elem_kwargs = tree_map_only(
            torch.device, lambda _: torch.device("cpu"), tree_map_only(OnPretendGPU, lambda x: x.elem, (args, kwargs))
        )
        result = func(*elem_args, **elem_kwargs)
        if not to_device:
            return result
        # An op that writes into an argument returns that argument.
        written = {id(tensor.elem): tensor for tensor in tensors if isinstance(tensor, OnPretendGPU)}
        return tree_map_only(torch.Tensor, lambda x: written[id(x)] if id(x) in written else OnPretendGPU(x), result)

    def _count(self, source_on_device: bool, target_on_device: bool) -> None:
        self.transfers.reads += source_on_device and not target_on_device
        self.transfers.uploads += target_on_device and not source_on_device


def _refuse_mixture(func: Any, tensors: list[torch.Tensor]) -> None:
    # As on a GPU, numbers from the host may be tensors without dimensions.
    strangers = [tensor for tensor in tensors if not isinstance(tensor, OnPretendGPU) and tensor.dim()]
    if strangers:
        raise RuntimeError(
            f"{func}: expected all tensors to be on the same device, but found one on {DEVICE} and one on "
            f"{strangers[0].device} of shape {list(strangers[0].shape)}"
        )


_current = _PretendGPU()


@contextmanager
def pretend_gpu() -> Iterator[Transfers]:
    """Within it `DEVICE` can be used, and what crosses to and from it is counted."""
    # What torch.tensor makes of Python numbers is to pass through the mode, with its device.
    torch._C._set_only_lift_cpu_tensors(True)
    try:
        with _current:
            _current.transfers.clear()
            yield _current.transfers
    finally:
        torch._C._set_only_lift_cpu_tensors(False)
