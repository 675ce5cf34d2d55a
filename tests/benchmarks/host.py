"""The CPU as the device of the GPU suite: its calls are done when they return, its clock is that of the host."""

import os
import time
from dataclasses import replace
from functools import partial

import torch

from benchmarks import ceilings
from benchmarks.registry import Provider, load_small_cases


class HostDevice:
    type = "cpu"
    cache_bytes = 1 << 20

    def __init__(self):
        self._scratch = torch.zeros(1 << 18)

    def mark(self):
        return time.perf_counter()

    def seconds(self, start, end):
        return end - start

    def wait(self):
        pass

    def flush(self):
        self._scratch.zero_()

    def capture(self, call, calls):
        def replay():
            for _ in range(calls):
                call()

        return replay

    def extra_bytes(self, call):
        return 7

    def describe(self):
        return {"gpu": "NVIDIA H100 80GB HBM3", "gpu_gib": 79.6, "compute_capability": "9.0", "l2_mib": 50.0}


class LostDevice(HostDevice):
    """Like a GPU after an illegal access: from the first error on, everything fails."""

    def __init__(self):
        super().__init__()
        self.lost = False

    def extra_bytes(self, call):
        self.lost = True
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    def wait(self):
        if self.lost:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")


def cannot_start():
    raise RuntimeError("no device")


def limits_only(settings):
    """The ceilings under their names, in a size that takes no time."""
    sizes = {ceilings.MATMUL: {"input": torch.ones(8, 8), "mat2": torch.ones(8, 8)}}
    sizes[ceilings.COPY] = {"target": torch.ones(8), "source": torch.ones(8)}
    return [replace(case, inputs=partial(sizes.get, case.op)) for case in ceilings.GPU_CASES]


def two(settings):
    """The first two of them."""
    return limits_only(settings)[:2]


def small_cases(settings):
    """Those, and of every op a case that takes no time."""
    return limits_only(settings) + list(load_small_cases().values())


def dying(settings):
    """Cases the second of which ends its process."""
    return _with_second(lambda **_: os._exit(5))


def sleeping(settings):
    """Cases the second of which does not end."""
    return _with_second(lambda **_: time.sleep(1000))


def _with_second(function):
    cases = limits_only(None)
    cases[1] = replace(cases[1], providers=(Provider("torch", function),))
    return cases
