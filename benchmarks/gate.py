"""No numbers of wrong kernels: the tests come first."""

import os
import subprocess
import sys
from pathlib import Path

from benchmarks.session import ROOT

KERNEL_TESTS = ROOT / "tests" / "ggro_kernels"


class RedTests(RuntimeError):
    """A kernel test failed."""


def require_green_tests(tests: Path = KERNEL_TESTS, *options: str) -> None:
    """Run the kernel tests, with options of pytest; raises RedTests at the first that fails."""
    print("kernel tests first:", flush=True)
    command = [sys.executable, "-m", "pytest", str(tests), "-x", "-q", "-n", "2", "--disable-warnings", *options]
    # Two processes on one thread each.
    code = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode
    if code != 0:
        raise RedTests("nothing is measured while the kernel tests are red: mend them first")
