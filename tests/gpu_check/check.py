"""Where the steps of the check run, and what becomes of them."""

import json
import os
import shutil
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from glob import glob
from pathlib import Path

from tests.gpu_check import commands
from tests.gpu_check.plugin import OUT_OF_TIME

ROOT = Path(__file__).resolve().parents[2]

PASSED, FAILED, CUT, LEFT_OUT = "passed", "failed", OUT_OF_TIME, "left out"

NOTHING_TO_DO = 77
"""The exit code of a program that says why it has nothing to do here."""

# The toolkit's programs where an image leaves them out of PATH.
TOOLKIT = ("/usr/local/cuda/bin", "/opt/nvidia/nsight-compute/*")


@dataclass(frozen=True)
class Result:
    """What became of a step."""

    step: str
    status: str
    """One of PASSED, FAILED, CUT (some of it is missing, nothing failed) and LEFT_OUT (there was nothing to do)."""
    note: str
    seconds: float = 0.0
    details: tuple[str, ...] = ()
    """For the report: failures, reasons."""


class Check:
    """Where the steps run and what they leave."""

    def __init__(self, folder: Path, wheels: Path | None = None) -> None:
        self.folder = folder
        self._wheels = wheels
        self._site = folder / "site"
        folder.mkdir(parents=True, exist_ok=True)

    def run(self, step: str, command: list[str], seconds: float, **variables: str) -> int | None:
        """Run a command for a step; its exit code, None where its time ran out."""
        environment = {**self.environment(), **variables}
        return commands.run(command, self.folder / f"{step}.log", seconds, cwd=ROOT, environment=environment)

    def tool(self, name: str) -> str | None:
        """Where a program is that the commands find."""
        return shutil.which(name, path=self.environment()["PATH"])

    def log(self, step: str) -> str:
        """What the commands of a step have said so far."""
        path = self.folder / f"{step}.log"
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""

    def install_wheels(self) -> bool:
        """Install the folder of wheels beside the check, for its own steps only."""
        if self._wheels is None:
            return True
        files = sorted(map(str, self._wheels.glob("*.whl")))
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
        pip += ["--no-cache-dir", "--upgrade", "--target", str(self._site)]
        return bool(files) and self.run("wheels", [*pip, *files], 120.0) == 0

    def keep(self, result: Result) -> None:
        """Write a result down."""
        path = self.folder / f"{result.step}.json"
        path.write_text(json.dumps(asdict(result), indent=1) + "\n", encoding="utf-8")

    def results(self, steps: Iterable[str]) -> list[Result]:
        """Those of these steps, in this and in earlier runs."""
        found = [self.folder / f"{step}.json" for step in steps]
        loaded = [json.loads(path.read_text(encoding="utf-8")) for path in found if path.exists()]
        return [Result(**{**fields, "details": tuple(fields["details"])}) for fields in loaded]

    def forget(self, *names: str) -> None:
        """Remove what an earlier run left."""
        for name in names:
            (self.folder / name).unlink(missing_ok=True)

    def environment(self) -> dict[str, str]:
        """That of the commands: the kernels of this tree, compiled and chosen as they are by default."""
        paths = [str(self._site)] if self._site.exists() else []
        paths += [str(ROOT), str(ROOT / "python")]
        if os.environ.get("PYTHONPATH"):
            paths.append(os.environ["PYTHONPATH"])
        # cmake and ninja may lie beside the interpreter.
        folders = [str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]
        folders += [path for pattern in TOOLKIT for path in sorted(glob(pattern), reverse=True)]
        search = os.pathsep.join(folders)
        inherited = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "GGRO_IMPL")}
        return {**inherited, "PYTHONPATH": os.pathsep.join(paths), "PATH": search, "PYTHONUNBUFFERED": "1"}
