"""What was built, what is chosen, and that a request never falls back silently."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ggro_kernels import candidate_scores, dispatch, entropy_topk
from ggro_kernels.info import capabilities
from tests.ggro_kernels.test_registration import run_in_fresh_process, run_python

ROOT = Path(__file__).resolve().parents[2]
LOGITS = torch.randn(2, 30)
NEEDS_NATIVE = pytest.mark.skipif(dispatch.native_error is not None, reason=f"native: {dispatch.native_error}")


@pytest.fixture
def without_native(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_native", None)
    monkeypatch.setattr(dispatch, "native_error", "it was left out")


def test_info_runs() -> None:
    output = subprocess.run([sys.executable, "-m", "ggro_kernels.info"], capture_output=True, text=True, check=True)
    for expected in ("torch: ", "native:", "isa: ", "threads: ", "ggro_kernels::entropy_topk: "):
        assert expected in output.stdout
    assert output.stderr == ""


def test_capabilities() -> None:
    found = capabilities()
    assert json.loads(json.dumps(found)) == found
    assert found["threads"] == torch.get_num_threads()
    assert (found["native"]["error"] is None) == found["native"]["loaded"]
    expected = "native" if found["native"]["loaded"] else "reference"
    eager = {"ggro_kernels::candidate_scores_gradient_gradient", "ggro_kernels::candidate_scores_table_gradient"}
    for op, devices in found["ops"].items():
        assert devices["cpu"] == ("reference" if op in eager else expected), op


@pytest.mark.usefixtures("without_native")
def test_without_native() -> None:
    found = capabilities()
    assert found["native"] == {"loaded": False, "error": "it was left out", "openmp": None, "isas": [], "isa": None}
    assert found["ops"]["ggro_kernels::entropy_topk"]["cpu"] == "reference"
    assert torch.equal(entropy_topk(LOGITS, 3).indices, entropy_topk(LOGITS, 3, impl="reference").indices)
    with pytest.raises(RuntimeError, match="impl='native' is not available: it was left out"):
        entropy_topk(LOGITS, 3, impl="native")


def test_a_missing_extension_is_reported() -> None:
    run_in_fresh_process(
        """
        import sys
        sys.modules["ggro_kernels._native"] = None
        import torch, ggro_kernels
        from ggro_kernels import dispatch
        assert "reinstall without GGRO_BUILD_NATIVE=0" in dispatch.native_error, dispatch.native_error
        ggro_kernels.entropy_topk(torch.randn(2, 30), 3)
        """
    )


@pytest.mark.skipif(not hasattr(dispatch._native, "cuda"), reason="the extension was built without its CUDA part")
def test_the_cuda_part_loads_without_a_driver() -> None:
    result = run_python(
        """
        import torch, ggro_kernels
        from ggro_kernels import dispatch, info
        assert dispatch.native_error is None
        assert dispatch.cuda_error() == "torch sees no GPU", dispatch.cuda_error()
        assert dispatch.native().cuda.obstacle(0)
        assert info.capabilities()["cuda_kernels"] == {"loaded": False, "error": "torch sees no GPU"}
        ggro_kernels.entropy_topk(torch.randn(2, 30), 3, impl="native")
        """,
        CUDA_VISIBLE_DEVICES="",
    )
    assert result.returncode == 0, result.stderr


@NEEDS_NATIVE
def test_an_extension_without_its_cuda_part(monkeypatch: pytest.MonkeyPatch) -> None:
    extension = {name: value for name, value in vars(dispatch.native()).items() if name != "cuda"}
    monkeypatch.setattr(dispatch, "_native", SimpleNamespace(**extension))
    dispatch.cuda_error.cache_clear()
    try:
        assert "built without its CUDA part: reinstall with nvcc on PATH" in str(dispatch.cuda_error())
        assert capabilities()["cuda_kernels"] == {"loaded": False, "error": dispatch.cuda_error()}
        assert torch.equal(entropy_topk(LOGITS, 3, impl="native").indices, entropy_topk(LOGITS, 3).indices)
        gpu = torch.device("cuda", 0)
        assert dispatch.resolve("auto", gpu, torch.float32, cuda=True) in ("triton", "reference")
        with pytest.raises(RuntimeError, match=r"impl='native' is not available: .* without its CUDA part"):
            dispatch.resolve("native", gpu, torch.float32, cuda=True)
    finally:
        dispatch.cuda_error.cache_clear()


def test_auto_on_a_gpu_is_native_then_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GGRO_IMPL", raising=False)
    monkeypatch.setattr(dispatch, "cuda_error", lambda device: None)
    monkeypatch.setattr(dispatch, "triton_error", None)
    gpu = torch.device("cuda", 0)
    assert dispatch.resolve("auto", gpu, torch.float32, cuda=True) == "native"
    assert dispatch.resolve("auto", gpu, torch.float32, cuda=False) == "triton"
    assert dispatch.resolve("auto", gpu, torch.float32, cuda=False, triton=False) == "reference"
    assert dispatch.resolve("auto", gpu, torch.float64, cuda=True) == "reference"
    monkeypatch.setattr(dispatch, "cuda_error", lambda device: "there is no driver")
    assert dispatch.resolve("auto", gpu, torch.float32, cuda=True) == "triton"
    monkeypatch.setattr(dispatch, "triton_error", "there is no Triton")
    assert dispatch.resolve("auto", gpu, torch.float32, cuda=True) == "reference"


def test_triton_is_refused_without_a_gpu() -> None:
    result = run_python(
        """
        import torch, ggro_kernels
        ggro_kernels.entropy_topk(torch.randn(2, 30), 3, impl="triton")
        """,
        TRITON_INTERPRET="0",
        CUDA_VISIBLE_DEVICES="",
    )
    assert "RuntimeError: impl='triton' is not available: torch sees no GPU; TRITON_INTERPRET=1" in result.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_triton_refuses_a_tensor_on_the_cpu() -> None:
    with pytest.raises(RuntimeError, match="impl='triton' runs on a GPU, got a tensor on cpu: use 'auto'"):
        entropy_topk(LOGITS, 3, impl="triton")


def test_a_missing_triton_is_reported() -> None:
    run_in_fresh_process(
        """
        import sys
        sys.modules["triton"] = None
        import torch, ggro_kernels
        from ggro_kernels import dispatch
        assert "pip install triton" in dispatch.triton_error, dispatch.triton_error
        ggro_kernels.entropy_topk(torch.randn(2, 30), 3)
        """
    )


def test_triton_is_imported_by_the_first_kernel_that_needs_it() -> None:
    run_in_fresh_process(
        """
        import sys
        import torch, ggro_kernels, ggro_kernels.info
        ggro_kernels.entropy_topk(torch.randn(2, 30), 3)
        assert "triton" not in sys.modules
        """
    )


def test_unknown_impl() -> None:
    with pytest.raises(ValueError, match="impl must be one of 'auto', 'native', 'triton', 'reference', got 'cuda'"):
        entropy_topk(LOGITS, 3, impl="cuda")
    with pytest.raises(ValueError, match="impl must be one of"):
        candidate_scores(LOGITS, LOGITS, torch.zeros(2, 1, dtype=torch.int64), impl="cuda")


@NEEDS_NATIVE
def test_native_refuses_fp64() -> None:
    with pytest.raises(RuntimeError, match=r"impl='native' takes .*got torch\.float64: use 'reference'"):
        entropy_topk(LOGITS.double(), 3, impl="native")


def test_environment_overrides_auto_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GGRO_IMPL", "triton")
    with pytest.raises(RuntimeError, match=r"impl='triton' takes .*got torch\.float64"):
        entropy_topk(LOGITS.double(), 3)
    entropy_topk(LOGITS, 3, impl="reference")
    monkeypatch.setenv("GGRO_IMPL", "fastest")
    with pytest.raises(ValueError, match=r"GGRO_IMPL must be one of .*got 'fastest'"):
        entropy_topk(LOGITS, 3)
    monkeypatch.setenv("GGRO_IMPL", "reference")
    assert dispatch.resolve("auto", torch.device("cpu"), torch.float32) == "reference"


@NEEDS_NATIVE
def test_instruction_set_is_chosen_by_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    native = dispatch.native()
    assert native.available_isas()[0] == "baseline"
    for isa in native.available_isas():
        monkeypatch.setenv("GGRO_CPU_ISA", isa)
        assert native.selected_isa() == isa
    monkeypatch.setenv("GGRO_CPU_ISA", "avx1024")
    with pytest.raises(ValueError, match="GGRO_CPU_ISA is 'avx1024', but this build and processor offer: baseline"):
        entropy_topk(LOGITS, 3, impl="native")
    monkeypatch.delenv("GGRO_CPU_ISA")
    assert native.selected_isa() == native.available_isas()[-1]


@NEEDS_NATIVE
def test_every_instruction_set_selects_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(3, 9001).bfloat16()
    results = []
    for isa in dispatch.native().available_isas():
        monkeypatch.setenv("GGRO_CPU_ISA", isa)
        results.append(entropy_topk(logits, 100, impl="native"))
    for result in results[1:]:
        assert torch.equal(result.indices, results[0].indices)
        torch.testing.assert_close(result.entropy, results[0].entropy, rtol=1e-6, atol=0)


@NEEDS_NATIVE
def test_the_sanitized_extension_is_used_where_it_is_meant_to_be() -> None:
    assert dispatch.native().sanitized == ("libasan" in os.environ.get("LD_PRELOAD", ""))


@pytest.mark.skipif(not getattr(dispatch._native, "sanitized", False), reason="for the build of `make test-asan`")
def test_the_sanitizer_sees_a_read_beyond_the_end(native_impl: str) -> None:
    process = run_python(
        f"""
        import torch, ggro_kernels
        logits = torch.randn(1, 4099)
        logits.untyped_storage().resize_(4 * 4098)
        ggro_kernels.entropy_topk(logits, 5, impl="{native_impl}")
        """,
        ASAN_OPTIONS="detect_leaks=0",
    )
    assert process.returncode != 0 and "heap-buffer-overflow" in process.stderr, process.stderr


@pytest.mark.skipif(not (ROOT / "Makefile").exists(), reason="these tests are a copy without the sources")
@pytest.mark.skipif(shutil.which("aarch64-linux-gnu-g++") is None, reason="no aarch64-linux-gnu-g++")
def test_kernels_compile_for_aarch64() -> None:
    result = subprocess.run(["make", "--directory", ROOT, "check-aarch64"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
