"""Between the host and a GPU: every transfer costs microseconds, and reading waits for all that the GPU has to do."""

from collections.abc import Sequence
from typing import Protocol

import torch


class Arrival(Protocol):
    """Tensors that the host has or will have."""

    def wait(self) -> list[torch.Tensor]:
        """CPU tensors of the same dtypes, shapes and bits."""


class Copies:
    """Tensors of the host, as they are now."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._copies = [tensor.clone() for tensor in tensors]

    def wait(self) -> list[torch.Tensor]:
        """CPU tensors of the same dtypes, shapes and bits."""
        return self._copies


class Transfer:
    """Tensors on their way to the host, all from the same device, as one; the device goes on meanwhile."""

    def __init__(self, packed: torch.Tensor, like: Sequence[torch.Tensor]) -> None:
        """`packed` is `pack(like)`; it may be overwritten, in the order of the device, once this returns."""
        self._like = [(tensor.dtype, tensor.shape, tensor.nbytes) for tensor in like]
        # Asked not to block, torch copies to pinned memory.
        self._packed = packed.to("cpu", non_blocking=True, copy=True)
        self._arrival = torch.cuda.Event() if packed.device.type == "cuda" else None
        if self._arrival is not None:
            self._arrival.record(torch.cuda.current_stream(packed.device))

    def wait(self) -> list[torch.Tensor]:
        """CPU tensors of the same dtypes, shapes and bits."""
        if self._arrival is not None:
            self._arrival.synchronize()
        order = _widest_first([dtype for dtype, _, _ in self._like])
        parts = dict(zip(order, self._packed.split([self._like[index][2] for index in order]), strict=True))
        return [parts[index].view(dtype).view(shape) for index, (dtype, shape, _) in enumerate(self._like)]


def pack(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The bytes of tensors on one device, in one tensor there."""
    order = _widest_first([tensor.dtype for tensor in tensors])
    return torch.cat([tensors[index].reshape(-1).view(torch.uint8) for index in order])


def to_host(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """CPU tensors of the same dtypes, shapes and bits, in one transfer; all are on the same device."""
    if tensors[0].device.type == "cpu":
        return list(tensors)
    return Transfer(pack(tensors), tensors).wait()


def to_device(token_ids: list[list[int]], device: torch.device | str | None) -> torch.Tensor:
    """Token ids `[rows, tokens]` on the device, without waiting for it."""
    # The driver has copied pageable memory when it returns, so the host tensor may go.
    return torch.tensor(token_ids, dtype=torch.int64, device="cpu").to(device, non_blocking=True)


def wait_for(device: torch.device) -> None:
    """Return when the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _widest_first(dtypes: list[torch.dtype]) -> list[int]:
    # A tensor must start at a multiple of its item size.
    return sorted(range(len(dtypes)), key=lambda index: -dtypes[index].itemsize)
