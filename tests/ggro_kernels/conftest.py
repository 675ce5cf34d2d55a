"""The implementation under test, as the value of `impl=`."""

import pytest

from tests.ggro_kernels.implementations import IMPLEMENTATIONS, select


@pytest.fixture(params=IMPLEMENTATIONS)
def impl(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    return select(request.param, monkeypatch)


@pytest.fixture(params=[name for name in IMPLEMENTATIONS if name != "reference"])
def native_impl(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    return select(request.param, monkeypatch)
