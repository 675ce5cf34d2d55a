"""The record that a step of a recipe leaves, so that it is neither repeated nor continued with other settings."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ggro_hf.jsonl import differing


class StepError(ValueError):
    """A step that cannot be done: one before it is missing, or it was done with other settings."""


class Step:
    """A directory with the record of the step that fills it: its settings and, once it is done, its results.

    `continues` is whether a step that is not done left something to continue; where it did not, other settings are no
    matter.

    Raises StepError where the step was done, or begun, with other settings, or its record is damaged.
    """

    def __init__(self, directory: Path, settings: Mapping[str, Any], *, continues: bool = True) -> None:
        self.directory = directory
        self._path = directory / "record.json"
        self._settings = json.loads(json.dumps(settings, default=str))
        self.record: dict[str, Any] | None = None
        if self._path.is_file():
            found = _read(self._path)
            if found["settings"] != self._settings and (found["done"] or continues):
                raise StepError(
                    f"{directory} was made with other settings ({differing(found['settings'], self._settings)}); "
                    "repeat them, choose another output, or delete it"
                )
            self.record = found if found["done"] else None

    def start(self) -> None:
        """Note the settings, so that nothing is continued with others."""
        self._write({"settings": self._settings, "done": False})

    def finish(self, results: Mapping[str, Any]) -> None:
        """Note the results."""
        self.record = {"settings": self._settings, "done": True, **results}
        self._write(self.record)

    def done(self) -> dict[str, Any]:
        """The record of a step that is done."""
        assert self.record is not None
        return self.record

    def _write(self, record: Mapping[str, Any]) -> None:
        if int(os.environ.get("RANK", 0)):
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        partial = self._path.with_suffix(".partial")
        try:
            partial.write_text(json.dumps(record, indent=2, default=float) + "\n", encoding="utf-8")
            os.replace(partial, self._path)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from error


def is_done(directory: Path) -> bool:
    """Whether the step that fills the directory was done, with whatever settings; raises StepError as `Step` does."""
    path = directory / "record.json"
    return path.is_file() and bool(_read(path)["done"])


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise StepError(f"{path} is damaged ({error}); delete {path.parent} and repeat the step") from None
    if not isinstance(found, dict) or not isinstance(found.get("settings"), dict) or "done" not in found:
        raise StepError(f"{path} is no record of a step; delete {path.parent} and repeat the step")
    return found
