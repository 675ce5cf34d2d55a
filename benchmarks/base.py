"""Our kernels here against those of another commit: `--base REF`."""

import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median

from benchmarks import session
from benchmarks.session import ROOT, SessionError, Settings, Timings

# A process of each side in turn, since a process measures one ggro_kernels.
TURNS = 5


def compare(ref: str, settings: Settings) -> str:
    """A table of `base / head`, the sessions of the two sides taking turns; above 1, this tree is faster.

    Raises:
        SessionError: the commit cannot be checked out or built, or a session failed.
    """
    settings = replace(settings, only_ours=True, rounds=settings.rounds or 3, seconds=settings.seconds or 0.4)
    head: Timings = defaultdict(list)
    base: Timings = defaultdict(list)
    with kernels_of(ref) as base_kernels:
        sides = [("base", base_kernels, base), ("head", ROOT, head)]
        for turn in range(TURNS):
            # Neither side is always the first.
            for name, kernels, timings in sides if turn % 2 else reversed(sides):
                print(f"turn {turn + 1} of {TURNS}: {name}", flush=True)
                for key, seconds in session.run(settings, kernels).timings.items():
                    timings[key] += seconds
    return format_comparison(ref, base, head)


@contextmanager
def kernels_of(ref: str) -> Iterator[Path]:
    """A directory with the built `ggro_kernels` of a commit and nothing else; gone afterwards, as is its worktree."""
    with tempfile.TemporaryDirectory() as directory:
        tree, alone = Path(directory, "tree"), Path(directory, "kernels").resolve()
        _run("git", "worktree", "add", "--quiet", "--detach", str(tree), ref, cwd=ROOT)
        try:
            print(f"building {ref}", flush=True)
            _run(sys.executable, "setup.py", "--quiet", "build_ext", "--inplace", cwd=tree)
            # Beside the commit's own benchmarks, which are not the ones that run.
            alone.mkdir()
            (tree / "ggro_kernels").rename(alone / "ggro_kernels")
            yield alone
        finally:
            _run("git", "worktree", "remove", "--force", str(tree), cwd=ROOT)


def format_comparison(ref: str, base: Timings, head: Timings) -> str:
    """One line per case and number of threads that both sides have."""
    lines = [f"\n{'case':60} {'threads':>7} {ref[:12]:>12} {'here':>12} {'base / head':>12}"]
    for (case, threads, provider), seconds in head.items():
        before = base.get((case, threads, provider))
        if before is None:
            lines.append(f"{case:60} {threads:>7} {'new':>12} {1e6 * median(seconds):>9.1f} us")
            continue
        times = f"{1e6 * median(before):>9.1f} us {1e6 * median(seconds):>9.1f} us"
        lines.append(f"{case:60} {threads:>7} {times} {median(before) / median(seconds):>11.2f}x")
    return "\n".join(lines)


def _run(*command: str, cwd: Path) -> None:
    # The build's tools lie beside the interpreter.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    result = subprocess.run(command, cwd=cwd, env={**os.environ, "PATH": path}, capture_output=True, text=True)
    if result.returncode != 0:
        last = (result.stderr.strip() or result.stdout.strip()).splitlines()[-1:]
        raise SessionError(f"{' '.join(command)}: {last[0] if last else f'exit code {result.returncode}'}")
