"""The implementation under test, as the value of `impl=`."""

import pytest

from tests.ggro_kernels.implementations import HAS_GPU, IMPLEMENTATIONS, KERNELS, NATIVE, select, tested_op


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`impl` and `kernel_impl` are the CUDA kernels too where a module or a function tests an op that has them."""
    cuda = ("cuda",) if tested_op(metafunc.module.__name__, metafunc.function.__name__) else ()
    marks = [mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")]
    chosen_by_the_test = {name for names in marks for name in ([names] if isinstance(names, str) else names)}
    for fixture, names in (("impl", IMPLEMENTATIONS), ("kernel_impl", KERNELS)):
        if fixture in metafunc.fixturenames and fixture not in chosen_by_the_test:
            metafunc.parametrize(fixture, names + cuda, indirect=True)


@pytest.fixture
def impl(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    return select(request.param, monkeypatch)


@pytest.fixture(params=IMPLEMENTATIONS)
def checking_impl(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The implementation, where its tensors stay on a CPU: on a GPU to look at what they hold would need a sync."""
    if request.param == "triton" and HAS_GPU:
        pytest.skip("on a GPU no values are checked")
    return select(request.param, monkeypatch)


@pytest.fixture
def kernel_impl(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    return select(request.param, monkeypatch)


@pytest.fixture(params=NATIVE)
def native_impl(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    return select(request.param, monkeypatch)


@pytest.fixture(params=("triton", "cuda"))
def gpu_impl(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    return select(request.param, monkeypatch)


@pytest.fixture
def triton_impl(monkeypatch: pytest.MonkeyPatch) -> str:
    return select("triton", monkeypatch)
