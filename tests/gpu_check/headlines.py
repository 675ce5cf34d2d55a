"""The shapes that this project is judged by, once each with our kernels: for a profiler, or timed by torch's.

`python -m tests.gpu_check.headlines` is what ncu runs: of every shape one call is between the marks of the profiler,
within a range of its name. `--timed FILE` writes what torch's profiler measures instead.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.device import CudaDevice
from benchmarks.registry import OURS, Case, load_cases
from tests.gpu_check.check import NOTHING_TO_DO

HEADLINES = (
    "entropy_topk[64 x 128256, bfloat16]",
    "entropy_topk[1 x 128256, bfloat16]",
    "candidate_scores[256 x 4096 of 128256, bfloat16]",
    "prefix_attention[30 x 1 after 2048, 32/8 x 128, bfloat16]",
    "project_topk[20 x 4096 x 128256, bfloat16]",
)


def headlines() -> list[Case]:
    """In their order; the registry must have them all."""
    cases = {case.name: case for case in load_cases(gpu=True)}
    return [cases[name] for name in HEADLINES]


def prepared(case: Case) -> Any:
    """Our call of a case, warm."""
    with torch.device("cuda"):
        inputs = case.inputs()
        call = next(provider for provider in case.providers if provider.name == OURS).bind(inputs)
    for _ in range(2):
        call()
    torch.cuda.synchronize()
    return call


def run_once() -> None:
    """Every shape for a profiler that was told to wait for the marks."""
    for case in headlines():
        call = prepared(case)
        torch.cuda.nvtx.range_push(case.name)
        torch.cuda.profiler.start()
        call()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()
        torch.cuda.nvtx.range_pop()


def timed() -> list[dict[str, Any]]:
    """The kernels of every shape with a cold cache: their microseconds, registers and occupancy.

    How many bytes they moved nobody counted: the first has the least that the shape needs.
    """
    device = CudaDevice()
    found = []
    for case in headlines():
        call = prepared(case)
        device.flush()
        device.wait()
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            call()
            device.wait()
        with tempfile.TemporaryDirectory() as folder:
            trace = Path(folder, "trace.json")
            profiler.export_chrome_trace(str(trace))
            events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
        found += kernels_of(case, events)
    return found


def kernels_of(case: Case, events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those among the events of a trace."""
    kernels = sorted((event for event in events if event.get("cat") == "kernel"), key=lambda event: event["ts"])
    return [
        {
            "case": case.name,
            "kernel": event["name"],
            "microseconds": event["dur"],
            "bytes": case.bytes if index == 0 else 0,
            "dram_percent": None,
            "registers": event["args"].get("registers per thread"),
            "occupancy_percent": event["args"].get("est. achieved occupancy %"),
        }
        for index, event in enumerate(kernels)
    ]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu_check.headlines", description=__doc__)
    parser.add_argument("--timed", type=Path, metavar="FILE", help="of JSON: measure with torch's profiler")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("torch sees no GPU")
        return NOTHING_TO_DO
    if options.timed is None:
        run_once()
    else:
        options.timed.write_text(json.dumps(timed(), indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
