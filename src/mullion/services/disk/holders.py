"""Which process holds the lock of a disk file: a lock does not say whose it is, but /proc does, to who may look.

Source: proc(5), `/proc/PID/fdinfo/N`: a line `lock:` for each lock of that open file.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator


def lock_holders(path: str) -> tuple[str, ...]:
    """`process 4711 (qemu-img)` for each other process that has the file open with a lock. Blocking: some 10 ms."""
    try:
        status = os.stat(path)
    except OSError:
        return ()
    file = (status.st_dev, status.st_ino)
    pids = sorted(int(entry) for entry in os.listdir("/proc") if entry.isdigit())
    return tuple(f"process {pid} ({_name_of(pid)})" for pid in pids if pid != os.getpid() and _has_lock(pid, file))


def _has_lock(pid: int, file: tuple[int, int]) -> bool:
    return any(_is_locked(pid, fd) for fd in _descriptors_of(pid, file))


def _descriptors_of(pid: int, file: tuple[int, int]) -> Iterator[str]:
    folder = f"/proc/{pid}/fd"
    try:
        names = os.listdir(folder)
    except OSError:  # it has ended, or we may not look
        return
    for name in names:
        with contextlib.suppress(OSError):
            status = os.stat(f"{folder}/{name}")
            if (status.st_dev, status.st_ino) == file:
                yield name


def _is_locked(pid: int, fd: str) -> bool:
    try:
        with open(f"/proc/{pid}/fdinfo/{fd}", encoding="ascii", errors="replace") as info:
            return any(line.startswith("lock:") for line in info)
    except OSError:
        return False


def _name_of(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as file:
            text = file.read().strip()
    except OSError:
        return "ended"
    return "".join(char if char.isprintable() else "?" for char in text)
