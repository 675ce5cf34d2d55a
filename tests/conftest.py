"""Settings shared by all tests."""

import os
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

if not torch.cuda.is_available():
    # Before anything imports Triton.
    os.environ["TRITON_INTERPRET"] = "1"

# Forcing an instruction set for all examples of a test is what the function-scoped fixtures are for.
settings.register_profile(
    "fixed",
    derandomize=True,
    deadline=None,
    max_examples=40,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.register_profile("deep", settings.get_profile("fixed"), derandomize=False, max_examples=2000)
settings.load_profile("fixed")


@pytest.fixture(autouse=True, scope="session")
def single_thread() -> None:
    """One thread, so that timings and thread tests do not depend on the machine."""
    torch.set_num_threads(1)


def poison(dtype: torch.dtype) -> float | int:
    """What is in memory that nobody has written: NaN, a huge negative integer, True."""
    if dtype.is_floating_point:
        return torch.nan
    return dtype == torch.bool or torch.iinfo(dtype).min // 2


@pytest.fixture
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what torch.empty and torch.empty_like give with `poison`."""

    def poisoning(allocate: Any) -> Any:
        def allocate_poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
            out = allocate(*args, **kwargs)
            return out.fill_(poison(out.dtype))

        return allocate_poisoned

    monkeypatch.setattr(torch, "empty", poisoning(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoning(torch.empty_like))
