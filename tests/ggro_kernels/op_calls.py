"""Which ops of this package ran."""

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from ggro_kernels.library import NAMESPACE


class OpCalls(TorchDispatchMode):
    """Records the calls of this package's ops."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.namespace == NAMESPACE:
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))
