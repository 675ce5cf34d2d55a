"""The implementation under test, as the value of `impl=`."""

import pytest

from tests.ggro_kernels.implementations import IMPLEMENTATIONS, KERNELS, NATIVE, select


@pytest.fixture(params=IMPLEMENTATIONS)
def impl(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
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
