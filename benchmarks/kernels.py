"""Kernels against plain torch: `python benchmarks/kernels.py [--quick] [--json FILE]`.

Variants are interleaved and medians reported, since timings on a shared machine drift. With one thread the clock is the
process's CPU time, so that what the machine gives to others does not count; with more it is wall time. `x` is how many
times slower a variant is than the kernel, the percentage the kernel's bytes per second over those of `amax` on 256 MiB.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cases
import torch

from ggro_kernels import candidate_scores, entropy_topk
from ggro_kernels.info import capabilities

KERNEL = "ggro"


def eager_entropy_topk(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, ...]:
    """What decoders write: softmax, log, multiply, sum, logsumexp, topk."""
    probabilities = logits.softmax(-1, dtype=torch.float32)
    entropy = -(probabilities * probabilities.clamp_min(1e-38).log()).sum(-1)
    return entropy, logits.logsumexp(-1), *logits.topk(k)


def gather_einsum(gradient: torch.Tensor, table: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return torch.einsum("pd,pkd->pk", gradient, table[ids])


def full_projection(gradient: torch.Tensor, table: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return (gradient @ table.t()).gather(1, ids)


def median_microseconds(variants: dict[str, Callable[[], Any]], seconds: float) -> dict[str, float]:
    """Median time of each variant over interleaved rounds that take about `seconds` together."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    repeats = {}
    round_seconds = 0.0
    for name, run in variants.items():
        run()
        start = clock()
        run()
        once = clock() - start
        # Short calls are repeated, so that the clock is not what is measured.
        repeats[name] = max(1, int(2e-4 / once))
        round_seconds += once * repeats[name]
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(max(7, int(seconds / round_seconds))):
        for name, run in variants.items():
            start = clock()
            for _ in range(repeats[name]):
                run()
            times[name].append((clock() - start) / repeats[name])
    return {name: 1e6 * statistics.median(values) for name, values in times.items()}


def entropy_topk_variants(case: cases.EntropyTopKCase) -> dict[str, Callable[[], Any]]:
    logits = (3 * torch.randn(case.rows, case.vocab)).to(case.dtype)
    compiled = torch.compile(eager_entropy_topk, dynamic=False)
    return {
        KERNEL: lambda: entropy_topk(logits, case.k),
        "eager": lambda: eager_entropy_topk(logits, case.k),
        "torch.compile": lambda: compiled(logits, case.k),
    }


def candidate_scores_variants(case: cases.CandidateScoresCase) -> dict[str, Callable[[], Any]]:
    gradient = torch.randn(case.positions, case.width).to(case.dtype)
    table = torch.randn(case.vocab, case.width).to(case.dtype)
    ids = torch.randint(case.vocab, (case.positions, case.k))
    return {
        KERNEL: lambda: candidate_scores(gradient, table, ids),
        "gather+einsum": lambda: gather_einsum(gradient, table, ids),
        "projection": lambda: full_projection(gradient, table, ids),
    }


def read_bandwidth(seconds: float) -> float:
    """Bytes per second that `amax` reads from 256 MiB, far beyond any cache."""
    block = torch.randn(1 << 26)
    return block.nbytes / (1e-6 * median_microseconds({"amax": block.amax}, seconds)["amax"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three cases, shorter rounds")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    arguments = parser.parse_args()
    seconds = 0.3 if arguments.quick else 2.0
    entropy_cases = cases.QUICK_ENTROPY_TOPK if arguments.quick else cases.ENTROPY_TOPK
    score_cases = cases.QUICK_CANDIDATE_SCORES if arguments.quick else cases.CANDIDATE_SCORES
    work = [("entropy_topk", case, entropy_topk_variants) for case in entropy_cases]
    work += [("candidate_scores", case, candidate_scores_variants) for case in score_cases]

    results = []
    torch.manual_seed(0)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        peak = read_bandwidth(seconds)
        print(f"\n{threads} thread(s), read bandwidth {peak / 1e9:.1f} GB/s")
        for op, case, variants_of in work:
            # Compiled code is specialised to the number of threads.
            torch.compiler.reset()
            times = median_microseconds(variants_of(case), seconds)
            kernel = times.pop(KERNEL)
            rate = case.bytes_read / (1e-6 * kernel)
            shape = {name: str(value).removeprefix("torch.") for name, value in vars(case).items()}
            label = " ".join(f"{name}={value}" for name, value in shape.items())
            others = "  ".join(f"{name} {value:.1f} us ({value / kernel:.1f}x)" for name, value in times.items())
            print(f"{op} {label}: {kernel:.1f} us, {rate / 1e9:.1f} GB/s, {rate / peak:.0%}; {others}", flush=True)
            results.append(
                {
                    "op": op,
                    **shape,
                    "threads": threads,
                    "microseconds": {KERNEL: kernel, **times},
                    "ratio": {name: value / kernel for name, value in times.items()},
                    "bytes_per_second": rate,
                    "share_of_read_bandwidth": rate / peak,
                }
            )
    if arguments.json:
        report = {"machine": platform.machine(), "capabilities": capabilities(), "results": results}
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
