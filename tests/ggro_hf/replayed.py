"""Decode steps without a GPU: a capture that runs the function again, and insists on what a CUDA graph needs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from ggro_hf import step_pool
from ggro_hf.graphs import CAPTURES

# Their results are on the host, or have a shape that the host must know.
_WAITING = {"_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2", "allclose"}


class WaitsForTheDevice(RuntimeError):
    """As CUDA refuses it during a capture."""


class Replayed:
    """What `CudaGraph` is on a GPU: three calls at first, whose results are undefined, then the same ops every time.

    Every run must have the same ops with the same numbers, on tensors that are at the same addresses unless the run
    made them itself; it may neither read values nor draw random numbers.
    """

    asynchronous = True

    def __init__(self, function: Callable[[], Any], device: torch.device) -> None:
        self._function = function
        self.outputs: Any = None
        for _ in range(3):
            self.outputs, self._ops = self._run()
        self.replays = 0
        for output in self._tensors():
            output.fill_(torch.nan if output.is_floating_point() else 77)

    def replay(self) -> None:
        results, ops = self._run()
        assert len(ops) == len(self._ops)
        for op, first in zip(ops, self._ops, strict=True):
            assert op == first
        for output, result in zip(self._tensors(), _tensors_of(results), strict=True):
            output.copy_(result)
        self.replays += 1

    def _run(self) -> tuple[Any, list[Any]]:
        state = torch.random.get_rng_state()
        with torch.inference_mode(), _Recorder() as recorder:
            results = self._function()
        assert torch.equal(torch.random.get_rng_state(), state), "a decode step draws random numbers"
        return results, recorder.ops

    def _tensors(self) -> list[Tensor]:
        return _tensors_of(self.outputs)


def _tensors_of(results: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(results) if isinstance(leaf, Tensor)]


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.ops: list[Any] = []
        # By storage, in the order in which this run made them; kept, or their addresses would be used again.
        self._made: dict[int, int] = {}
        self._kept: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::").partition(".")[0]
        if name in _WAITING:
            raise WaitsForTheDevice(f"{func} waits for the device")
        arguments = (args, kwargs or {})
        self.ops.append((func, tree_map_only(Tensor, self._describe, arguments)))
        given = {_storage(leaf) for leaf in _tensors_of(arguments)}
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors_of(result):
            self._kept.append(tensor)
            if _storage(tensor) not in given:
                self._made.setdefault(_storage(tensor), len(self._made))
        return result

    def _describe(self, tensor: Tensor) -> tuple[Any, ...]:
        layout = (tensor.shape, tensor.stride(), tensor.dtype)
        made = self._made.get(_storage(tensor))
        if made is not None:
            return ("made", made, tensor.storage_offset(), *layout)
        # A number that Python hands to an op may be a new tensor every time.
        return ("given", _values(tensor).data_ptr() if tensor.dim() else None, *layout)


def _storage(tensor: Tensor) -> int:
    return int(_values(tensor).untyped_storage()._cdata)


def _values(tensor: Tensor) -> Tensor:
    # Of a tensor on the pretended GPU.
    return getattr(tensor, "elem", tensor)


@contextmanager
def replaying(device_type: str = "cpu", capture: Callable[..., Any] = Replayed) -> Iterator[None]:
    """Within it, policies on such devices decode by captured steps; every use begins without one."""
    with (
        mock.patch.dict(CAPTURES, {device_type: capture}),
        mock.patch.object(step_pool, "_idle", type(step_pool._idle)()),
        mock.patch.object(step_pool, "_refusals", type(step_pool._refusals)()),
    ):
        yield
