"""The logs that a failing test shows: the ends of all that the service and its guests wrote below a home."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

LOG_NAMES = ("mullion.log", "serve.out", "provider.log", "qemu.log", "console.log")
TAIL_BYTES = 6000


def log_tails(home: str | Path) -> Iterator[tuple[str, str]]:
    """Path and end of every log below the home that is not empty, the service's own first."""
    found = [path for path in Path(home).rglob("*") if path.name in LOG_NAMES and path.is_file()]
    for path in sorted(found, key=lambda path: (LOG_NAMES.index(path.name), path)):
        text = tail(path)
        if text:
            yield str(path), text


def tail(path: Path, size_bytes: int = TAIL_BYTES) -> str:
    """The end of a file, from the beginning of a line on."""
    with path.open("rb") as file:
        start = max(0, os.fstat(file.fileno()).st_size - size_bytes)
        file.seek(start)
        content = file.read()
    if start:
        content = content[content.find(b"\n") + 1 :]
    return content.decode(errors="replace").rstrip()
