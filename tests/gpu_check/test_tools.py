"""The steps with compute-sanitizer and ncu, by programs of these names that say what those would, and what they run."""

import json
import os
import sys
import textwrap

import pytest
import torch

from ggro_kernels.library import has_cuda_kernels, registered_ops
from tests.ggro_kernels import implementations
from tests.gpu_check import headlines, small_cases
from tests.gpu_check import profile as profile_step
from tests.gpu_check import sanitizer as sanitizer_step
from tests.gpu_check.check import CUT, FAILED, LEFT_OUT, PASSED, Check
from tests.gpu_check.profile import METRICS, profile, summary
from tests.gpu_check.sanitizer import ERRORS, TOOLS, judge, sanitizer


@pytest.fixture
def check(tmp_path, monkeypatch):
    """With the programs that `program` puts on its PATH, and no others of the toolkit."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setattr("tests.gpu_check.check.TOOLKIT", ())
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}/usr/bin{os.pathsep}/bin")
    return Check(tmp_path / "check")


@pytest.fixture
def program(tmp_path):
    """Makes a program of Python code."""

    def make(name, code):
        path = tmp_path / "bin" / name
        path.write_text(f"#!{sys.executable}\n{textwrap.dedent(code)}")
        path.chmod(0o755)

    return make


# compute-sanitizer

CLEAN = "========= COMPUTE-SANITIZER\n12 calls\n========= ERROR SUMMARY: 0 errors\n"
INVALID = (
    "========= COMPUTE-SANITIZER\n========= Invalid __global__ read of size 4 bytes\n"
    "=========     at void ggro::cuda::entry<...>+0x10\n========= ERROR SUMMARY: 1 error\n"
)
RACES = "========= COMPUTE-SANITIZER\n========= RACECHECK SUMMARY: 2 hazards displayed (0 errors, 2 warnings)\n"
REFUSED = "========= COMPUTE-SANITIZER\n========= Error: Device not supported\n"
NOTHING = "========= COMPUTE-SANITIZER\ntorch sees no GPU\n========= ERROR SUMMARY: 0 errors\n"


@pytest.mark.parametrize(
    "code, log, status, note",
    [
        (0, CLEAN, PASSED, "no errors"),
        (ERRORS, INVALID, FAILED, "1 error"),
        (0, RACES, FAILED, "2 hazards"),
        (1, REFUSED, LEFT_OUT, "Error: Device not supported"),
        (77, NOTHING, LEFT_OUT, "torch sees no GPU"),
        (None, CLEAN, CUT, "out of time"),
        (1, "Traceback\n========= ERROR SUMMARY: 0 errors\n", FAILED, "exit code 1: see sanitizer.log"),
        # A tool that says nothing has checked nothing.
        (0, "12 calls\n", FAILED, "exit code 0: see sanitizer.log"),
    ],
)
def test_what_a_sanitizer_says(code, log, status, note):
    result = judge("memcheck", code, log)
    assert (result.status, result.note) == (status, f"memcheck: {note}")
    if log == INVALID:
        assert result.details[0] == "memcheck: Invalid __global__ read of size 4 bytes"


def test_without_a_sanitizer_the_step_is_left_out(check):
    result = sanitizer(check, 60.0)
    assert result.status == LEFT_OUT and "compute-sanitizer not found" in result.note


SAYING = """
    import os, sys
    tool = sys.argv[sys.argv.index("--tool") + 1]
    assert os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"
    assert sys.argv[-2] == "-m", sys.argv
    log, code = {said}.get(tool, ({clean!r}, 0))
    print(log, end="")
    sys.exit(code)
"""


def test_every_tool_runs_the_cases(check, program):
    program("compute-sanitizer", SAYING.format(said={}, clean=CLEAN))
    result = sanitizer(check, 60.0)
    assert result.status == PASSED and result.note == "; ".join(f"{tool}: no errors" for tool in TOOLS)
    commands = [line for line in check.log("sanitizer").splitlines() if line.startswith("$ ")]
    assert [f"--tool {tool}" in command for tool, command in zip(TOOLS, commands, strict=True)] == [True] * len(TOOLS)
    assert all(command.endswith("small_cases") for command in commands) and "kns=ggro" in commands[0]


def test_what_one_tool_finds_fails_the_step_and_the_others_still_run(check, program):
    program("compute-sanitizer", SAYING.format(said={"memcheck": (INVALID, ERRORS)}, clean=CLEAN))
    result = sanitizer(check, 60.0)
    assert result.status == FAILED and result.note.startswith("memcheck: 1 error; racecheck: no errors")
    assert "memcheck: Invalid __global__ read of size 4 bytes" in result.details


def test_a_machine_that_refuses_is_asked_once(check, program):
    program("compute-sanitizer", SAYING.format(said={"memcheck": (REFUSED, 1)}, clean=CLEAN))
    result = sanitizer(check, 60.0)
    assert (result.status, result.note) == (LEFT_OUT, "memcheck: Error: Device not supported")


def test_a_sanitizer_out_of_time_names_what_has_not_run(check, program):
    program("compute-sanitizer", "import time\ntime.sleep(100)")
    result = sanitizer(check, 1.0)
    assert result.status == CUT and result.details == ("racecheck: not run", "initcheck: not run")


def test_the_small_cases_have_every_op_that_has_cuda_kernels():
    chosen = small_cases.calls()
    with_kernels = {op for op in registered_ops() if has_cuda_kernels(op)}
    # A gradient is an op of its own, which the backward pass of its function calls.
    assert {call.op for call in chosen} == {op for op in with_kernels if not op.endswith("_backward")}
    assert {call.op for call in chosen if call.backward} == {
        op.removesuffix("_backward") for op in with_kernels if op.endswith("_backward")
    }


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU they run under compute-sanitizer")
def test_the_small_cases_run(monkeypatch):
    assert implementations.select("cuda", monkeypatch) == "native"
    for call in small_cases.calls():
        call.run(lambda x: x)


def test_the_rows_of_small_cases_begin_anywhere():
    x = small_cases.normal(2, 5, dtype=torch.float16)
    assert x.shape == (2, 5) and x.stride() == (6, 1) and x.data_ptr() % 4 == 2
    assert x.storage_offset() + 6 + 5 == x.untyped_storage().nbytes() // 2


def test_without_kernels_there_is_nothing_to_do(monkeypatch, capsys):
    monkeypatch.setattr(small_cases.dispatch, "cuda_error", lambda: "torch sees no GPU")
    assert small_cases.main() == small_cases.NOTHING_TO_DO
    assert capsys.readouterr().out == "torch sees no GPU\n"


# ncu

RANGE = "thread Domain:Push/Pop_Range:PL_Type:PL_Value:CLR_Type:Color:Msg_Type:Msg"


def counters(case, kernel, *values):
    nvtx = f'1  "<default domain>:{case}:none:none:none:none:none:none"'
    cells = [str(value) for value in ("0", "7", nvtx, kernel, *values)]
    return ",".join('"' + cell.replace('"', '""') + '"' for cell in cells)


def ncu_table(*rows):
    header = ",".join(f'"{name}"' for name in ("ID", "Process ID", RANGE, "Kernel Name", *METRICS.values()))
    units = ',,,,"ns","byte","byte","%","register/thread","%"'
    return "\n".join(["==PROF== Connected to process 7", header, units, *rows, ""])


REDUCE = "void ggro::cuda::entry<ggro::cuda::ReduceKernel<ggro::BFloat16, 64, true>>(...)"
TABLE = ncu_table(
    counters("entropy_topk[1 x 128256, bfloat16]", REDUCE, "4,000", "250,000", "6,000", "32.5", "56", "61.2"),
    counters("entropy_topk[1 x 128256, bfloat16]", "select", "6000", "4000", "0", "n/a", "32", "10"),
    counters("project_topk[20 x 4096]", "gemm", "400000", "1000000000", "0", "80", "128", "25"),
)
WRITING = """
    import sys
    open(sys.argv[sys.argv.index("--log-file") + 1], "w").write({table!r})
"""
TIMED = [
    {
        "case": "entropy_topk[1 x 128256, bfloat16]",
        "kernel": REDUCE,
        "microseconds": 5.0,
        "bytes": 256512,
        "dram_percent": None,
        "registers": 56,
        "occupancy_percent": None,
    }
]


@pytest.fixture
def timed(monkeypatch):
    """The headlines as torch's profiler would time them."""
    code = f"import sys; open(sys.argv[-1], 'w').write({json.dumps(TIMED)!r})"
    monkeypatch.setattr(profile_step, "HEADLINES", [sys.executable, "-c", code])


def test_counters_become_a_table(check, program):
    program("ncu", WRITING.format(table=TABLE))
    result = profile(check, 60.0)
    assert result.status == PASSED and result.note == "counted by ncu"
    assert result.details == (
        "entropy_topk[1 x 128256, bfloat16]: 10.0 us, 0.3 MB, 26 GB/s",
        "  entry<ReduceKernel<ggro::BFloat16, 64, true>>(...): 4.0 us, 32 % of DRAM, 56 registers, occupancy 61 %",
        "  select: 6.0 us, 32 registers, occupancy 10 %",
        "project_topk[20 x 4096]: 400.0 us, 1000.0 MB, 2500 GB/s",
        "  gemm: 400.0 us, 80 % of DRAM, 128 registers, occupancy 25 %",
    )
    kept = json.loads((check.folder / "kernels.profile.json").read_text())
    assert kept[0]["bytes"] == 256000 and kept[1]["dram_percent"] is None
    lines = (check.folder / "kernels.profile.csv").read_text().splitlines()
    assert lines[0] == "case,kernel,microseconds,bytes,dram_percent,registers,occupancy_percent" and len(lines) == 4


@pytest.mark.parametrize(
    "code, obstacle",
    [
        (None, "ncu not found: it comes with the CUDA toolkit"),
        (
            "print('==ERROR== ERR_NVGPUCTRPERM - The user does not have permission to access counters'); exit(1)",
            "ERR_NVGPUCTRPERM - The user does not have permission to access counters",
        ),
        (WRITING.format(table="==ERROR== LibraryNotLoaded"), "LibraryNotLoaded"),
        (WRITING.format(table=ncu_table()), "ncu saw no kernel"),
        ("exit(3)", "ncu: exit code 3"),
    ],
)
def test_without_counters_kernels_are_timed(check, program, timed, code, obstacle):
    if code is not None:
        program("ncu", code)
    result = profile(check, 60.0)
    assert result.status == LEFT_OUT
    assert result.note == f"no counters: {obstacle}; times by torch's profiler, bytes as the shapes need them"
    assert result.details == summary(TIMED)
    assert result.details[0] == "entropy_topk[1 x 128256, bfloat16]: 5.0 us, 0.3 MB, 51 GB/s"
    assert (check.folder / "kernels.profile.csv").exists()


def test_an_ncu_that_hangs_leaves_time_for_the_other_way(check, program, timed):
    program("ncu", "import time\ntime.sleep(100)")
    result = profile(check, 3.0)
    assert result.status == LEFT_OUT and "ncu ran out of time" in result.note


@pytest.mark.parametrize("code, status", [(77, LEFT_OUT), (1, FAILED)])
def test_without_either_the_step_says_so(check, monkeypatch, code, status):
    monkeypatch.setattr(profile_step, "HEADLINES", [sys.executable, "-c", f"raise SystemExit({code})"])
    result = profile(check, 60.0)
    assert result.status == status and "no times either" in result.note


def test_the_headlines_are_cases_of_the_registry():
    assert [case.name for case in headlines.headlines()] == list(headlines.HEADLINES)


def test_the_kernels_of_a_trace():
    case = headlines.headlines()[0]
    arguments = {"registers per thread": 56, "est. achieved occupancy %": 61}
    events = [
        {"cat": "kernel", "name": "select", "ts": 9, "dur": 2.5, "args": {}},
        {"cat": "kernel", "name": "reduce", "ts": 5, "dur": 4.5, "args": arguments},
        {"cat": "cuda_runtime", "name": "launch", "ts": 1, "dur": 1, "args": {}},
    ]
    found = headlines.kernels_of(case, events)
    assert [(kernel["kernel"], kernel["bytes"]) for kernel in found] == [("reduce", case.bytes), ("select", 0)]
    assert list(found[0]) == list(TIMED[0]) and found[0]["registers"] == 56 and found[1]["registers"] is None


def test_sanitizer_runs_cases_of_this_tree():
    assert sanitizer_step.CASES[1:] == ["-m", small_cases.__name__]
    assert profile_step.HEADLINES[1:] == ["-m", headlines.__name__]
