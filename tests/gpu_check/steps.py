"""The steps of the check. Each keeps its output in a log and its result in a JSON file of the check's folder."""

import importlib.util
import json
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.gpu_check import commands
from tests.gpu_check.plugin import OUT_OF_TIME

ROOT = Path(__file__).resolve().parents[2]

PASSED, FAILED, CUT, LEFT_OUT = "passed", "failed", OUT_OF_TIME, "left out"

# Before it is interrupted, a step gets the chance to end by itself.
MARGIN_SECONDS = 20.0
MOST_PROCESSES = 8
MOST_FAILURES_LISTED = 30


@dataclass(frozen=True)
class Result:
    """What became of a step."""

    step: str
    status: str
    """One of PASSED, FAILED, CUT (some of it is missing, nothing failed) and LEFT_OUT (there was nothing to do)."""
    note: str
    seconds: float = 0.0
    details: tuple[str, ...] = ()
    """For the report: failures, reasons."""


class Check:
    """Where the steps run and what they leave."""

    def __init__(self, folder: Path, wheels: Path | None = None) -> None:
        self.folder = folder
        self._wheels = wheels
        self._site = folder / "site"
        folder.mkdir(parents=True, exist_ok=True)

    def run(self, step: str, command: list[str], seconds: float) -> int | None:
        """Run a command for a step; its exit code, None where its time ran out."""
        return commands.run(command, self.folder / f"{step}.log", seconds, cwd=ROOT, environment=self.environment())

    def install_wheels(self) -> bool:
        """Install the folder of wheels beside the check, for its own steps only."""
        if self._wheels is None:
            return True
        files = sorted(map(str, self._wheels.glob("*.whl")))
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
        pip += ["--no-cache-dir", "--upgrade", "--target", str(self._site)]
        return bool(files) and self.run("wheels", [*pip, *files], 120.0) == 0

    def keep(self, result: Result) -> None:
        """Write a result down."""
        path = self.folder / f"{result.step}.json"
        path.write_text(json.dumps(asdict(result), indent=1) + "\n", encoding="utf-8")

    def results(self) -> list[Result]:
        """Those of this and of earlier runs, in the order of the steps."""
        found = [self.folder / f"{step}.json" for step in STEPS]
        loaded = [json.loads(path.read_text(encoding="utf-8")) for path in found if path.exists()]
        return [Result(**{**fields, "details": tuple(fields["details"])}) for fields in loaded]

    def forget(self, *names: str) -> None:
        """Remove what an earlier run left."""
        for name in names:
            (self.folder / name).unlink(missing_ok=True)

    def environment(self) -> dict[str, str]:
        """That of the commands: the kernels of this tree, compiled and chosen as they are by default."""
        paths = [str(self._site)] if self._site.exists() else []
        paths += [str(ROOT), str(ROOT / "python")]
        if os.environ.get("PYTHONPATH"):
            paths.append(os.environ["PYTHONPATH"])
        # cmake and ninja may lie beside the interpreter.
        search = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
        inherited = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "GGRO_IMPL")}
        return {**inherited, "PYTHONPATH": os.pathsep.join(paths), "PATH": search, "PYTHONUNBUFFERED": "1"}


def build(check: Check, seconds: float) -> Result:
    """The extension with the CPU kernels, in place; then what is installed and what loaded."""
    search = check.environment()["PATH"]
    missing = [tool for tool in ("make", "cmake", "ninja", "c++") if shutil.which(tool, path=search) is None]
    missing += [] if importlib.util.find_spec("pybind11") else ["pybind11"]
    end = time.monotonic() + seconds
    if missing:
        result = Result("build", LEFT_OUT, f"no extension for CPUs is built: {', '.join(missing)} not found")
    else:
        code = check.run("build", ["make", "build", f"BUILD_PYTHON={sys.executable}"], seconds)
        note = {0: "the extension is built", None: "ran out of time"}.get(code, f"make build: exit code {code}")
        result = Result("build", PASSED if code == 0 else FAILED, note)
    if shutil.which("nvidia-smi"):
        check.run("build", ["nvidia-smi"], 20.0)
    check.run("build", [sys.executable, "-m", "ggro_kernels.info"], max(30.0, end - time.monotonic()))
    return result


def tests(check: Check, seconds: float) -> Result:
    """All tests of kernels on the GPU, several processes at once."""
    check.forget("tests.jsonl")
    record = check.folder / "tests.jsonl"
    kernel_tests = sorted(ROOT.glob("tests/ggro_kernels/test_*.py"), key=lambda path: ("fuzz" in path.name, path.name))
    command = [sys.executable, "-m", "pytest", "-q", "-ra", "--disable-warnings", "-k", "triton or test_gpu"]
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
    for result in check.results():
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
    code = check.run("report", [sys.executable, "-c", show, str(results)], seconds)
    return Result("report", PASSED if code == 0 else FAILED, str(check.folder / "report.log"))


STEPS: dict[str, Callable[[Check, float], Result]] = {
    "build": build,
    "tests": tests,
    "benchmarks": benchmarks,
    "report": report,
}
