"""A command with a time limit whose output goes to the terminal and into a file."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

# To write what it has after an interrupt.
LAST_SECONDS = 10.0


def run(command: Sequence[str], log: Path, seconds: float, *, cwd: Path, environment: Mapping[str, str]) -> int | None:
    """Its exit code; None where its time ran out: it was interrupted, then killed with all that it started."""
    with log.open("ab", buffering=0) as file:
        file.write(f"$ {' '.join(command)}\n".encode())
        process = subprocess.Popen(
            command,
            cwd=cwd,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            # A job that a shell runs in the background ignores interrupts, and so would what it starts.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        assert process.stdout is not None
        reader = threading.Thread(target=_copy, args=(process.stdout, file), daemon=True)
        reader.start()
        try:
            return process.wait(max(seconds, 0.0))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(LAST_SECONDS)
            return None
        finally:
            # Also what the command left behind; nothing where it left nothing.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            reader.join(LAST_SECONDS)


def _copy(source: IO[bytes], file: IO[bytes]) -> None:
    # By what there is rather than by lines: pytest's dots come one at a time.
    while output := os.read(source.fileno(), 1 << 16):
        file.write(output)
        sys.stdout.buffer.write(output)
        sys.stdout.flush()
