"""`tests/guest/iocheck.c` from the outside: build it, say what it shall do, read what it says."""

from __future__ import annotations

import json
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Self

SOURCE = Path(__file__).parent.parent / "guest" / "iocheck.c"

STATUS_IO_ERRORS = 1
STATUS_USAGE = 2
STATUS_WRONG_DATA = 3

_PROGRESS = re.compile(
    r"iocheck: alive elapsed_ms=(\d+) writes=(\d+) reads=(\d+) errors=(\d+) flushed=(\d+) longest_pause_ms=(\d+)"
)


def build_iocheck(folder: Path) -> Path:
    """Compile it, static, so that it runs under any Linux kernel with nothing beside it."""
    program = folder / "iocheck"
    argv = ["gcc", "-std=c11", "-O2", "-static", "-Wall", "-Wextra", "-Werror", "-pthread", "-o", program, SOURCE]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"gcc failed (packages gcc and libc6-dev are needed): {done.stderr}"
    return program


def iocheck_argv(
    program: str | Path,
    device: str | Path,
    *,
    seconds: int | None = None,
    writes: int | None = None,
    verify_flushed: int | None = None,
    depth: int = 1,
    seed: int = 1,
    range_bytes: int | None = None,
    report_file: str | Path | None = None,
    progress: bool = False,
) -> tuple[str, ...]:
    """Its command line. Exactly one of `seconds`, `writes` and `verify_flushed`: what to do."""
    argv = [str(program), "--device", str(device), "--depth", str(depth), "--seed", str(seed)]
    if verify_flushed is not None:
        argv += ["--verify-only", "--flushed", str(verify_flushed)]
    for name, value in (("seconds", seconds), ("writes", writes), ("range", range_bytes), ("report-file", report_file)):
        if value is not None:
            argv += [f"--{name}", str(value)]
    if progress:
        argv.append("--progress")
    return tuple(argv)


@dataclass(frozen=True, slots=True)
class IocheckReport:
    """What it reports in the end."""

    writes: int
    reads: int
    flushes: int
    wrong: int
    torn: int
    errors: int
    longest_pause_ms: int
    flushed: int
    seed: int
    depth: int
    range: int
    elapsed_ms: int

    @classmethod
    def find(cls, text: str) -> Self | None:
        """The last report in what it, or a console, printed; None while there is none."""
        found = None
        for line in text.splitlines():
            start = line.find('{"writes"')
            if start >= 0 and line.rstrip().endswith("}"):
                found = cls(**json.loads(line[start:]))
        return found


@dataclass(frozen=True, slots=True)
class IocheckProgress:
    """A line that says that it is alive."""

    elapsed_ms: int
    writes: int
    reads: int
    errors: int
    flushed: int
    longest_pause_ms: int

    @classmethod
    def find(cls, text: str) -> Self | None:
        """The last whole progress line in what it, or a console, printed; None while there is none."""
        found = None
        for match in _PROGRESS.finditer(text):
            if text[match.end() : match.end() + 1] in ("\r", "\n"):
                found = cls(*map(int, match.groups()))
        return found
