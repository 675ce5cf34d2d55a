"""The implementation under test, as the value of `impl=`."""

import pytest

from tests.ggro_kernels.implementations import IMPLEMENTATIONS, KERNELS, NATIVE, select
from tests.ggro_kernels.placed import HAS_GPU


@pytest.fixture(params=IMPLEMENTATIONS)
def impl(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    return select(request.param, monkeypatch)


@pytest.fixture(params=IMPLEMENTATIONS)
def checking_impl(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The implementation, where its tensors stay on a CPU: on a GPU to look at what they hold would need a sync."""
    if request.param == "triton" and HAS_GPU:
        pytest.skip("on a GPU no values are checked")
    return select(request.param, monkeypatch)


@pytest.fixture(params=KERNELS)
def kernel_impl(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    return select(request.param, monkeypatch)


@pytest.fixture(params=NATIVE)
def native_impl(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    return select(request.param, monkeypatch)


@pytest.fixture
def triton_impl(monkeypatch: pytest.MonkeyPatch) -> str:
    return select("triton", monkeypatch)
