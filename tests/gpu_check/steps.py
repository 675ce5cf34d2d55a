"""The steps of the check. Each keeps its output in a log and its result in a JSON file of the check's folder."""

import importlib.util
import json
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from tests.gpu_check.check import CUT, FAILED, LEFT_OUT, PASSED, ROOT, Check, Result
from tests.gpu_check.plugin import OUT_OF_TIME
from tests.gpu_check.profile import profile
from tests.gpu_check.sanitizer import sanitizer

# Before it is interrupted, a step gets the chance to end by itself.
MARGIN_SECONDS = 20.0
MOST_PROCESSES = 8
MOST_FAILURES_LISTED = 30


def build(check: Check, seconds: float) -> Result:
    """The extension in place, with its CUDA part where there is nvcc; then what is installed and what loaded."""
    missing = [tool for tool in ("make", "cmake", "ninja", "c++") if check.tool(tool) is None]
    missing += [] if importlib.util.find_spec("pybind11") else ["pybind11"]
    end = time.monotonic() + seconds
    if missing:
        result = Result("build", LEFT_OUT, f"no extension is built: {', '.join(missing)} not found")
    else:
        cuda = "ON" if check.tool("nvcc") else "OFF"
        code = check.run("build", ["make", "build", f"BUILD_PYTHON={sys.executable}", f"GGRO_CUDA={cuda}"], seconds)
        built = "with its CUDA kernels" if cuda == "ON" else "without CUDA kernels: nvcc not found"
        note = {0: f"the extension is built, {built}", None: "ran out of time"}.get(
            code, f"make build: exit code {code}"
        )
        result = Result("build", PASSED if code == 0 else FAILED, note)
    if check.tool("nvidia-smi"):
        check.run("build", ["nvidia-smi"], 20.0)
    check.run("build", [sys.executable, "-m", "ggro_kernels.info"], max(30.0, end - time.monotonic()))
    return result


def tests(check: Check, seconds: float) -> Result:
    """All tests of kernels on the GPU, several processes at once."""
    check.forget("tests.jsonl")
    record = check.folder / "tests.jsonl"
    kernel_tests = sorted(ROOT.glob("tests/ggro_kernels/test_*.py"), key=lambda path: ("fuzz" in path.name, path.name))
    command = [sys.executable, "-m", "pytest", "-q", "-ra", "--disable-warnings", "-k", "triton or cuda or test_gpu"]
    command += ["-p", "tests.gpu_check.plugin", f"--record={record}"]
    command += [f"--deadline={time.time() + max(0.0, seconds - MARGIN_SECONDS)}"]
    # Where a test hangs, the log shows where.
    command += ["-o", "faulthandler_timeout=120"]
    if importlib.util.find_spec("xdist") is not None:
        # One test at a time to each process, so that their order is kept.
        processes = min(MOST_PROCESSES, os.cpu_count() or 1)
        command += ["-n", str(processes), "--dist", "load", "--maxschedchunk", "1", "--max-worker-restart", "32"]
    command += ["tests/gpu", *(str(path.relative_to(ROOT)) for path in kernel_tests)]
    return judge_tests(check.run("tests", command, seconds), record)


def judge_tests(code: int | None, record: Path) -> Result:
    """The result of pytest's exit code, None where it was stopped, and of what it wrote down."""
    lines = record.read_text(encoding="utf-8").splitlines() if record.exists() else []
    outcomes = {}
    for line in map(json.loads, lines):
        # A test that fails in its teardown has passed before.
        before = outcomes.get(line["test"])
        if before is None or before["outcome"] != "failed":
            outcomes[line["test"]] = line
    counts = Counter(line["outcome"] for line in outcomes.values())
    skipped = Counter(line["reason"] for line in outcomes.values() if line["outcome"] == "skipped")
    cut = sum(count for reason, count in skipped.items() if OUT_OF_TIME in reason)
    failures = [f"FAILED {line['test']}: {line['reason']}" for line in outcomes.values() if line["outcome"] == "failed"]
    details = failures[:MOST_FAILURES_LISTED]
    if len(failures) > len(details):
        details.append(f"... and {len(failures) - len(details)} more in {record.name}")
    details += [f"skipped {count}: {reason.removeprefix('Skipped: ')}" for reason, count in skipped.most_common()]
    note = ", ".join(f"{counts[outcome]} {outcome}" for outcome in ("passed", "failed", "skipped"))
    if failures or code not in (0, None):
        status, note = FAILED, note + (f"; pytest: exit code {code}" if not failures else "")
    elif code is None or cut:
        status, note = CUT, f"{note}; out of time: " + (f"{cut} not run" if code == 0 else "stopped")
    else:
        status = PASSED if counts["passed"] else FAILED
    return Result("tests", status, note, details=tuple(details))


def benchmarks(check: Check, seconds: float) -> Result:
    """The registry on the GPU, the most important cases first."""
    check.forget("kernels.json", "kernels.csv")
    command = [sys.executable, "-m", "benchmarks", "--device", "cuda", "--untested"]
    command += [f"--budget={max(1.0, seconds - 2 * MARGIN_SECONDS)}", f"--output={check.folder}"]
    return judge_benchmarks(check.run("benchmarks", command, seconds), check.folder, ROOT / "benchmarks" / "results")


def judge_benchmarks(code: int | None, folder: Path, kept: Path) -> Result:
    """The result of what was written into the folder, which is copied to the results of its kind of machine."""
    path = folder / "kernels.json"
    if code != 0 or not path.exists():
        note = "ran out of time without results" if code is None else f"exit code {code}: see benchmarks.log"
        return Result("benchmarks", FAILED, note)
    report = json.loads(path.read_text(encoding="utf-8"))
    target = kept / report["machine"]["kind"]
    target.mkdir(parents=True, exist_ok=True)
    for name in ("kernels.json", "kernels.csv"):
        shutil.copy(folder / name, target / name)
    cases = len({(row["op"], row["case"], row["dtype"]) for row in report["rows"]})
    cut = [note for note in report["notes"] if note.endswith("no time left")]
    failures = [note for note in report["notes"] if note not in cut]
    note = f"{cases} cases measured, {len(failures)} failures, {len(cut)} cases left out for lack of time; {target}"
    return Result("benchmarks", CUT if cut else PASSED, note, details=tuple(failures))


def report(check: Check, seconds: float) -> Result:
    """What became of every step, then the table."""
    lines = ["", "gpu-check"]
    for result in check.results(STEPS):
        lines.append(f"{result.step:12} {result.status:12} {result.seconds:5.0f} s  {result.note}")
        lines += [f"  {detail}" for detail in result.details]
    text = "\n".join(lines) + "\n\n"
    print(text, end="", flush=True)
    check.forget("report.log")
    (check.folder / "report.log").write_text(text, encoding="utf-8")
    results = check.folder / "kernels.json"
    if not results.exists():
        return Result("report", LEFT_OUT, "there are no results of benchmarks")
    show = "import sys; from ggro_hf.cli import main; sys.exit(main(['bench', sys.argv[1]]))"
    codes = [
        check.run("report", command, seconds)
        for command in (
            [sys.executable, "-c", show, str(results)],
            [sys.executable, "-m", "benchmarks.targets", str(results)],
        )
    ]
    return Result("report", PASSED if codes == [0, 0] else FAILED, str(check.folder / "report.log"))


STEPS: dict[str, Callable[[Check, float], Result]] = {
    "build": build,
    "tests": tests,
    "sanitizer": sanitizer,
    "profile": profile,
    "benchmarks": benchmarks,
    "report": report,
}
