"""Settings shared by all tests."""

from typing import Any

import pytest
import torch

INTEGER_POISON = -(2**62)


@pytest.fixture(autouse=True, scope="session")
def single_thread() -> None:
    """One thread, so that timings and thread tests do not depend on the machine."""
    torch.set_num_threads(1)


@pytest.fixture
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what torch.empty and torch.empty_like give with NaN (integers: a huge negative number)."""

    def poisoning(allocate: Any) -> Any:
        def allocate_poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
            out = allocate(*args, **kwargs)
            return out.fill_(torch.nan if out.is_floating_point() else INTEGER_POISON)

        return allocate_poisoned

    monkeypatch.setattr(torch, "empty", poisoning(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoning(torch.empty_like))
