"""The step that runs the CUDA kernels under compute-sanitizer."""

import re
import sys
import time

from tests.gpu_check.check import CUT, FAILED, LEFT_OUT, NOTHING_TO_DO, PASSED, Check, Result

ERRORS = 86
"""The exit code for what a tool has found."""

CASES = [sys.executable, "-m", "tests.gpu_check.small_cases"]
OURS = ["--kernel-name", "kns=ggro"]

TOOLS: dict[str, list[str]] = {
    "memcheck": OURS,
    "racecheck": OURS,
    # It has to see what wrote the memory that our kernels read.
    "initcheck": [],
}
"""Their options."""

MOST_LINES = 8


def sanitizer(check: Check, seconds: float) -> Result:
    """Every tool in turn, as far as there is time."""
    program = check.tool("compute-sanitizer")
    if program is None:
        return Result("sanitizer", LEFT_OUT, "compute-sanitizer not found: it comes with the CUDA toolkit")
    end = time.monotonic() + seconds
    results = []
    for tool, options in TOOLS.items():
        command = [program, "--tool", tool, *options, "--error-exitcode", str(ERRORS), "--print-limit", "20"]
        before = len(check.log("sanitizer"))
        # Allocations of their own, between which the tool sees what is not theirs.
        code = check.run("sanitizer", [*command, *CASES], end - time.monotonic(), PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        results.append(judge(tool, code, check.log("sanitizer")[before:]))
        if results[-1].status in (LEFT_OUT, CUT):
            # So would the others be.
            break
    order = (FAILED, CUT, LEFT_OUT, PASSED)
    status = min((result.status for result in results), key=order.index)
    details = [detail for result in results for detail in result.details]
    details += [f"{tool}: not run" for tool in list(TOOLS)[len(results) :]] if status == CUT else []
    return Result("sanitizer", status, "; ".join(result.note for result in results), details=tuple(details))


def judge(tool: str, code: int | None, log: str) -> Result:
    """The result of a tool's exit code, None where it was stopped, and of what it said."""

    def result(status: str, note: str, details: tuple[str, ...] = ()) -> Result:
        return Result("sanitizer", status, f"{tool}: {note}", details=details)

    said = [line.removeprefix("=========").strip() for line in log.splitlines() if line.startswith("=========")]
    unsupported = [line for line in said if "not supported" in line or "Unable to" in line]
    summaries = [match for line in said if (match := re.search(r"SUMMARY: (\d+) (\w+)", line))]
    if code is None:
        return result(CUT, "out of time")
    if code == NOTHING_TO_DO:
        own = [line for line in log.splitlines() if line and not line.startswith("====")]
        return result(LEFT_OUT, own[-1] if own else "nothing to do")
    if any(int(match[1]) for match in summaries) or code == ERRORS:
        errors = [f"{tool}: {line}" for line in said if line and not line.startswith("COMPUTE-SANITIZER")]
        note = f"{summaries[-1][1]} {summaries[-1][2]}" if summaries else "errors"
        return result(FAILED, note, tuple(errors[:MOST_LINES]))
    if unsupported:
        return result(LEFT_OUT, unsupported[0])
    if code != 0 or not summaries:
        return result(FAILED, f"exit code {code}: see sanitizer.log")
    return result(PASSED, f"no {summaries[-1][2]}")
