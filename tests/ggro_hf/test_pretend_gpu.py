"""Runs pretend_gpu_suite.py, which needs a process of its own: it registers a device with torch."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_decoding_on_a_pretended_gpu():
    suite = Path(__file__).with_name("pretend_gpu_suite.py")
    # A worker of xdist leaves settings that a run of its own must not see.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, "-m", "pytest", str(suite), "-q", "-p", "no:cacheprovider", f"--rootdir={ROOT}"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "skipped" not in result.stdout
