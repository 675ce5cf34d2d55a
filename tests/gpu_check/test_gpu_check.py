"""`make gpu-check` without a GPU: its time limits, what it makes of results, its pytest plugin."""

import json
import os
import subprocess
import sys
import textwrap
import time
import zipfile
from pathlib import Path

import pytest

from tests.gpu_check import __main__ as main
from tests.gpu_check import commands, steps
from tests.gpu_check.check import CUT, FAILED, LEFT_OUT, PASSED, ROOT, Check, Result


@pytest.fixture
def check(tmp_path):
    return Check(tmp_path / "check")


def python(code):
    return [sys.executable, "-c", textwrap.dedent(code)]


# Commands


def run(command, log, seconds=60.0):
    return commands.run(command, log, seconds, cwd=ROOT, environment=os.environ)


def test_output_goes_to_the_terminal_and_into_the_log(tmp_path, capfdbinary):
    log = tmp_path / "log"
    assert run(python("import sys; print('out', flush=True); print('err', file=sys.stderr); sys.exit(3)"), log) == 3
    assert log.read_text().endswith("out\nerr\n") and log.read_text().startswith("$ ")


def is_alive(process: int) -> bool:
    try:
        # Until its new parent has noticed its end, it is a zombie.
        return Path(f"/proc/{process}/stat").read_text().split()[2] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_command_out_of_time_ends_with_all_that_it_started(tmp_path, monkeypatch):
    monkeypatch.setattr(commands, "LAST_SECONDS", 0.5)
    code = """
        import signal, subprocess, sys, time
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        child = subprocess.Popen(["sleep", "1000"])
        print(child.pid, flush=True)
        time.sleep(1000)
    """
    start = time.monotonic()
    assert run(python(code), tmp_path / "log", 2.0) is None
    assert time.monotonic() - start < 30
    child = int((tmp_path / "log").read_text().split()[-1])
    deadline = time.monotonic() + 30
    while is_alive(child):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_an_interrupted_command_writes_what_it_has(tmp_path):
    code = """
        import time
        try:
            print("begun", flush=True)
            time.sleep(1000)
        finally:
            print("ended", flush=True)
    """
    assert run(python(code), tmp_path / "log", 2.0) is None
    assert "begun\nended\n" in (tmp_path / "log").read_text()


# The pytest plugin

TESTS = """
import pytest

def test_passes():
    pass

def test_fails():
    assert 1 == 2

@pytest.mark.skip(reason="no such thing")
def test_skipped():
    pass

@pytest.fixture
def falling():
    yield
    raise OSError("afterwards")

def test_fails_afterwards(falling):
    pass
"""

LOSING = """
import pytest
from tests.gpu_check import plugin

lost = []

def wait():
    if lost:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

plugin.wait_for_gpu = wait

def test_before():
    pass

def test_loses_the_gpu():
    lost.append(True)

@pytest.mark.parametrize("number", range(4))
def test_after(number):
    wait()
"""


def run_pytest(folder, source, *options):
    (folder / "test_it.py").write_text(source)
    command = [sys.executable, "-m", "pytest", "-p", "tests.gpu_check.plugin", "-p", "no:cacheprovider", "test_it.py"]
    command += [f"--record={folder / 'record'}", *options]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment["PYTHONPATH"] = str(ROOT)
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    return steps.judge_tests(result.returncode, folder / "record"), result.stdout + result.stderr


def test_every_outcome_is_written_down(tmp_path):
    result, _ = run_pytest(tmp_path, TESTS)
    assert result.status == FAILED and result.note == "1 passed, 2 failed, 1 skipped"
    assert result.details == (
        "FAILED test_it.py::test_fails: assert 1 == 2",
        "FAILED test_it.py::test_fails_afterwards: OSError: afterwards",
        "skipped 1: no such thing",
    )


def test_after_the_deadline_no_test_begins(tmp_path):
    result, output = run_pytest(tmp_path, TESTS, "--deadline=1")
    assert result.status == CUT and "4 not run" in result.note, output


def test_a_lost_gpu_costs_one_test_and_one_process(tmp_path):
    pytest.importorskip("xdist")
    result, output = run_pytest(tmp_path, LOSING, "-n", "1", "--dist", "load", "--maxschedchunk", "1")
    assert result.note == "5 passed, 1 failed, 0 skipped", output
    assert result.details[0].startswith("FAILED test_it.py::test_loses_the_gpu")
    assert "test_loses_the_gpu lost the GPU" in output and "illegal memory access" in output


def test_a_lost_gpu_ends_the_only_process(tmp_path):
    result, output = run_pytest(tmp_path, LOSING)
    assert result.status == FAILED and result.note == "1 passed, 1 failed, 0 skipped", output
    assert "the GPU is lost for this process" in output


# Judgements


def record(tmp_path, *outcomes):
    path = tmp_path / "record"
    lines = [
        {"test": str(i), "outcome": outcome, "reason": reason, "seconds": 0.0}
        for i, (outcome, reason) in enumerate(outcomes)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_tests_are_green_only_if_all_have_run(tmp_path):
    passed, cut = ("passed", ""), ("skipped", "Skipped: out of time")
    for code, outcomes, status in (
        (0, [passed], PASSED),
        (0, [passed, cut], CUT),
        (None, [passed], CUT),
        (1, [passed, ("failed", "x")], FAILED),
        (None, [passed, ("failed", "x")], FAILED),
        (2, [passed], FAILED),
        (0, [("skipped", "Skipped: torch sees no GPU")], FAILED),
        (5, [], FAILED),
        (None, [], CUT),
    ):
        assert steps.judge_tests(code, record(tmp_path, *outcomes)).status == status, (code, outcomes)
    assert steps.judge_tests(4, tmp_path / "nothing").status == FAILED


def test_of_many_failures_the_first_are_listed(tmp_path):
    result = steps.judge_tests(1, record(tmp_path, *[("failed", "x")] * 50))
    assert len(result.details) == steps.MOST_FAILURES_LISTED + 1
    assert result.details[-1] == "... and 20 more in record"


def test_results_of_benchmarks_are_kept_by_kind_of_machine(tmp_path):
    folder, kept = tmp_path / "check", tmp_path / "results"
    folder.mkdir()
    row = {"op": "entropy_topk", "case": "1 x 2", "dtype": "float32"}
    notes = ["entropy_topk[3 x 4], eager: RuntimeError: out of memory", "project_topk[5 x 6]: no time left"]
    contents = {"machine": {"kind": "nvidia-h100"}, "rows": [row, row], "notes": notes}
    (folder / "kernels.json").write_text(json.dumps(contents))
    (folder / "kernels.csv").write_text("op\n")
    result = steps.judge_benchmarks(0, folder, kept)
    assert result.status == CUT and result.details == (notes[0],)
    assert result.note.startswith("1 cases measured, 1 failures, 1 cases left out for lack of time")
    assert json.loads((kept / "nvidia-h100" / "kernels.json").read_text()) == contents
    assert (kept / "nvidia-h100" / "kernels.csv").exists()
    assert steps.judge_benchmarks(1, folder, kept).status == FAILED
    assert steps.judge_benchmarks(None, tmp_path, kept).note == "ran out of time without results"


# Steps


def commands_of(check, monkeypatch, code=0):
    """What a check would run."""
    ran = []
    monkeypatch.setattr(Check, "run", lambda self, step, command, seconds, **_: ran.append(command) or code)
    return ran


def test_only_tests_of_the_gpu_are_chosen(check, monkeypatch):
    ran = commands_of(check, monkeypatch)
    steps.tests(check, 60.0)
    monkeypatch.undo()
    (command,) = ran
    options = [option for option in command if not option.startswith("--record")]
    index = options.index("-n") if "-n" in options else len(options)
    result = subprocess.run(
        [*options[:index], *options[index + 2 :], "--collect-only"],
        cwd=ROOT,
        env=check.environment(),
        capture_output=True,
        text=True,
    )
    chosen = [line for line in result.stdout.splitlines() if "::" in line]
    assert result.returncode == 0, result.stdout + result.stderr
    ours = [line for line in chosen if line.startswith("tests/gpu/")]
    assert ours and chosen[: len(ours)] == ours
    others = chosen[len(ours) :]
    assert others and all("triton" in line or "cuda" in line for line in others)
    assert any("[cuda" in line for line in others) and any("[triton" in line for line in others)
    # What takes longest and adds least comes last.
    assert others == sorted(others, key=lambda line: "test_fuzz" in line)


def test_the_build_is_left_out_where_its_tools_are_missing(check, monkeypatch):
    ran = commands_of(check, monkeypatch)
    tools = dict.fromkeys(("make", "ninja", "c++", "nvcc"), "/bin/tool")
    monkeypatch.setattr(Check, "tool", lambda self, name: tools.get(name))
    result = steps.build(check, 60.0)
    assert result.status == LEFT_OUT and "cmake not found" in result.note
    assert ran[-1][-1] == "ggro_kernels.info" and ["make", "build"] not in [command[:2] for command in ran]
    tools["cmake"] = "/bin/tool"
    result = steps.build(check, 60.0)
    assert result.status == PASSED and "with its CUDA kernels" in result.note
    assert ["make", "build", f"BUILD_PYTHON={sys.executable}", "GGRO_CUDA=ON"] in ran
    del tools["nvcc"]
    result = steps.build(check, 60.0)
    assert result.status == PASSED and "nvcc not found" in result.note
    assert ran[-2][-1] == "GGRO_CUDA=OFF"
    commands_of(check, monkeypatch, code=2)
    assert steps.build(check, 60.0).status == FAILED


def test_the_toolkits_programs_are_found_beside_path(check, tmp_path, monkeypatch):
    folder = tmp_path / "toolkit" / "2025.3"
    folder.mkdir(parents=True)
    (folder / "ncu").write_text("")
    (folder / "ncu").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("tests.gpu_check.check.TOOLKIT", ())
    assert check.tool("ncu") is None
    monkeypatch.setattr("tests.gpu_check.check.TOOLKIT", (str(tmp_path / "toolkit" / "*"),))
    assert check.tool("ncu") == str(folder / "ncu")


def test_commands_run_kernels_of_this_tree_compiled(check, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("GGRO_IMPL", "reference")
    code = """
        import os, ggro_kernels, ggro_hf
        print(ggro_kernels.__file__, ggro_hf.__file__, os.environ.get("TRITON_INTERPRET"), os.environ.get("GGRO_IMPL"))
    """
    assert check.run("try", python(code), 120.0) == 0
    found = (check.folder / "try.log").read_text().splitlines()[-1].split()
    assert found == [f"{ROOT}/ggro_kernels/__init__.py", f"{ROOT}/python/ggro_hf/__init__.py", "None", "None"]


def test_wheels_are_installed_beside_the_check(tmp_path):
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "a_small_thing-1.0-py3-none-any.whl", "w") as wheel:
        info = "a_small_thing-1.0.dist-info"
        wheel.writestr("a_small_thing.py", "answer = 42\n")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: a-small-thing\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    check = Check(tmp_path / "check", wheels)
    assert check.install_wheels()
    # A later run finds them without being told.
    later = Check(tmp_path / "check")
    assert later.install_wheels()
    assert later.run("try", python("import a_small_thing; assert a_small_thing.answer == 42"), 60.0) == 0


def test_the_report_ends_with_the_table(check, capfdbinary):
    results = next(ROOT.glob("benchmarks/results/*/kernels.json"))
    (check.folder / "kernels.json").write_bytes(results.read_bytes())
    check.keep(Result("tests", FAILED, "1 passed, 1 failed, 0 skipped", 3.0, ("FAILED tests/test_x.py::test_y: no",)))
    assert steps.report(check, 120.0).status == PASSED
    text = (check.folder / "report.log").read_text()
    assert text.index("FAILED tests/test_x.py::test_y") < text.index("entropy_topk\n")
    assert "eager" in text[text.index("entropy_topk\n") :]


def test_a_report_without_results_says_so(check, capsys):
    assert steps.report(check, 60.0).status == LEFT_OUT


# The whole


def stub(monkeypatch, **statuses):
    """Steps that take no time and end so."""
    limits = {}

    def step(name, status):
        def run(check, seconds):
            limits[name] = seconds
            return Result(name, status, "")

        return run

    monkeypatch.setattr(main, "STEPS", {name: step(name, statuses.get(name, PASSED)) for name in steps.STEPS})
    return limits


def test_a_step_may_take_what_those_behind_it_do_not_need(check, monkeypatch):
    limits = stub(monkeypatch)
    main.run(check, list(steps.STEPS), time.monotonic() + main.SECONDS)
    needed = main.NEEDED
    assert limits["build"] == pytest.approx(main.SECONDS - sum(needed.values()) + needed["build"], abs=5)
    assert limits["tests"] == pytest.approx(
        needed["tests"] + main.SECONDS - sum(needed.values()) + needed["build"], abs=5
    )
    assert sum(needed.values()) <= main.SECONDS and list(needed) == list(steps.STEPS)
    assert limits["report"] == pytest.approx(main.SECONDS, abs=5)
    main.run(check, ["tests"], time.monotonic() + main.SECONDS)
    assert limits["tests"] == pytest.approx(main.SECONDS, abs=5)
    assert main.SECONDS + commands.LAST_SECONDS < 540
    assert [result.step for result in check.results(steps.STEPS)] == list(steps.STEPS)


@pytest.mark.parametrize(
    "statuses, code",
    [
        ({}, 0),
        ({"tests": FAILED}, 1),
        ({"tests": CUT}, 1),
        ({"build": LEFT_OUT, "benchmarks": CUT, "report": LEFT_OUT}, 0),
        ({"sanitizer": LEFT_OUT, "profile": LEFT_OUT}, 0),
        ({"sanitizer": FAILED}, 1),
        ({"build": FAILED}, 1),
        ({"benchmarks": FAILED}, 1),
    ],
)
def test_the_exit_code_says_whether_tests_passed(check, monkeypatch, statuses, code):
    stub(monkeypatch, **statuses)
    assert main.exit_code(main.run(check, list(steps.STEPS), time.monotonic() + 60)) == code


def test_a_wrong_command_line_says_what_is_wrong(tmp_path, capsys, monkeypatch):
    for arguments, message in ((["test"], "no step 'test'"), (["--wheels", str(tmp_path)], "has no wheels")):
        with pytest.raises(SystemExit):
            main.main(arguments)
        assert message in capsys.readouterr().err
    monkeypatch.setattr(main, "sees_gpu", lambda: False)
    assert main.main(["tests"]) == 1
    assert "torch sees no GPU" in capsys.readouterr().err
