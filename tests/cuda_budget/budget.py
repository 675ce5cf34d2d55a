"""The recorded budget: a file for people to review, a line per kernel.

A line holds the most registers on every architecture, rounded up to what a GPU allots (8), and whether a kernel loads
and stores 16 bytes at a time. What no kernel may do is not recorded: spill, have a stack, address memory of an unknown
kind.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tests.cuda_budget.compilation import Usage

WIDE = 16
ALLOTTED = 8


@dataclass(frozen=True)
class Line:
    """What one kernel may use."""

    registers: dict[str, int]
    """By architecture."""
    wide: frozenset[str]
    """What must move 16 bytes at a time: "loads", "stores"."""


@dataclass(frozen=True)
class Budget:
    """Of all kernels, and the compiler that it was recorded with."""

    release: str
    lines: dict[str, Line]

    def faults(self, usage: Usage) -> list[str]:
        """What is wrong with a kernel on an architecture."""
        found = []
        if usage.spilled_bytes:
            found.append(f"spills {usage.spilled_bytes} bytes")
        elif usage.stack_bytes:
            found.append(f"has a stack of {usage.stack_bytes} bytes")
        if usage.generic:
            found.append(f"{usage.generic} loads and stores by generic addresses")
        line = self.lines.get(usage.kernel)
        if line is None or usage.architecture not in line.registers:
            return [*found, "not in the budget"]
        if usage.registers > line.registers[usage.architecture]:
            found.append(f"{usage.registers} registers instead of {line.registers[usage.architecture]}")
        found += [f"no {WIDE}-byte {what}" for what in sorted(line.wide - wide(usage))]
        return found

    def gone(self, usages: list[Usage]) -> list[str]:
        """Recorded kernels that are not there any more."""
        return sorted(self.lines.keys() - {usage.kernel for usage in usages})


def wide(usage: Usage) -> frozenset[str]:
    """What a kernel moves 16 bytes at a time."""
    moved = {"loads": usage.loads, "stores": usage.stores}
    return frozenset(what for what, widths in moved.items() if max(widths, default=0) >= WIDE)


def recorded(usages: Iterable[Usage], release: str, before: Budget | None = None) -> Budget:
    """The budget that these kernels just keep; what had to move 16 bytes at a time `before` still has to."""
    registers: dict[str, dict[str, int]] = {}
    wides: dict[str, frozenset[str]] = {}
    for usage in usages:
        allotted = -(-usage.registers // ALLOTTED) * ALLOTTED
        registers.setdefault(usage.kernel, {})[usage.architecture] = allotted
        wides[usage.kernel] = wides.get(usage.kernel, frozenset({"loads", "stores"})) & wide(usage)
    kept = {} if before is None else before.lines
    for kernel in wides.keys() & kept.keys():
        wides[kernel] |= kept[kernel].wide
    return Budget(release, {kernel: Line(registers[kernel], wides[kernel]) for kernel in sorted(registers)})


def write(budget: Budget, path: Path) -> None:
    """A table, the kernels in alphabetical order."""
    architectures = sorted({name for line in budget.lines.values() for name in line.registers})
    width = max(map(len, budget.lines), default=0)
    header = [f"{'kernel':{width}}", *(f"{name:>7}" for name in architectures), "16 bytes"]
    rows = ["  ".join(header)]
    for kernel, line in budget.lines.items():
        cells = [f"{kernel:{width}}", *(f"{line.registers.get(name, '-'):>7}" for name in architectures)]
        rows.append("  ".join([*cells, " ".join(sorted(line.wide)) or "-"]))
    about = f"# Most registers a thread, and what moves 16 bytes at a time; nvcc {budget.release}. `make cuda-budget`"
    path.write_text("\n".join([about, *rows]) + "\n", encoding="utf-8")


def read(path: Path) -> Budget:
    """What `write` wrote."""
    about, header, *rows = path.read_text(encoding="utf-8").splitlines()
    release = re.search(r"nvcc ([\w.]*\w)", about)
    _, *architectures, _ = re.split(r"\s{2,}", header)
    lines = {}
    for row in rows:
        kernel, *registers, moved = re.split(r"\s{2,}", row.strip())
        counts = {name: int(count) for name, count in zip(architectures, registers, strict=True) if count != "-"}
        lines[kernel] = Line(counts, frozenset(moved.split()) - {"-"})
    return Budget(release[1] if release else "unknown", lines)
