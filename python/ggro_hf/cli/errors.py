"""How a command gives up."""

import os
from pathlib import Path


class CommandError(Exception):
    """Ends a command with exit code 2; the message is one line that names what is wrong and the mend."""


def one_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def check_writable(option: str, path: str | None) -> None:
    """Raise CommandError where a file that is written at the end could not be: before the work, not after it."""
    if path is None:
        return
    file = Path(path)
    if file.is_dir() or not file.parent.is_dir() or not os.access(file if file.exists() else file.parent, os.W_OK):
        raise CommandError(f"{option} {path!r} cannot be written; name a file in an existing, writable directory")
