"""What happens when the storage is full: rings wait, nothing fails, nothing is lost.

A ring cannot block (its thread must still answer the front-end), so it reports the stall, keeps the request in the
guest's ring and tries again when its waker is called or a retry interval has passed. The state is visible in `status`,
and changes are events. NBD clients are told ENOSPC instead: QEMU stops the guest and repeats the request itself.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

RETRY_INTERVAL_S: Final = 1.0
_NO_SPACE: Final = frozenset({errno.ENOSPC, errno.EDQUOT})


def is_no_space(error: OSError) -> bool:
    """Whether an error means that room has to be made, on the filesystem or in the owner's quota."""
    return error.errno in _NO_SPACE


@dataclass(frozen=True, slots=True)
class Shortage:
    """A disk that waits for space: since when (seconds since the epoch), where, and what the system said."""

    since_s: float
    filesystem: str
    reason: str


class SpaceGate:
    """All disks of one provider that wait for space. Used by every thread."""

    def __init__(self, notify: Callable[[str, str, Shortage | None], None]) -> None:
        """`notify(event, disk, shortage)` hears of `no_space` and `space`, once each per change."""
        self._notify = notify
        self._lock = threading.Lock()
        self._shortages: dict[str, Shortage] = {}
        self._paths: dict[str, str] = {}
        self._wakers: list[Callable[[], None]] = []

    def register(self, disk_id: str, path: str) -> None:
        """Name the file whose filesystem a disk grows on."""
        self._paths[disk_id] = path

    def add_waker(self, waker: Callable[[], None]) -> None:
        """Call this when a retry is due at once."""
        self._wakers.append(waker)

    def shortage(self, disk_id: str) -> Shortage | None:
        with self._lock:
            return self._shortages.get(disk_id)

    def report(self, error: OSError, disk_id: str) -> None:
        """A write met a full filesystem: record it and say so, once."""
        with self._lock:
            if disk_id in self._shortages:
                return
            path = self._paths.get(disk_id, "")
            shortage = Shortage(time.time(), mount_point(path) if path else "", error.strerror or str(error))
            self._shortages[disk_id] = shortage
        self._notify("no_space", disk_id, shortage)

    def recovered(self, disk_id: str) -> None:
        """A write of this disk succeeded (again)."""
        with self._lock:
            if self._shortages.pop(disk_id, None) is None:
                return
        self._notify("space", disk_id, None)

    def retry(self) -> None:
        """Room was made: let every ring that waits try again now."""
        for waker in self._wakers:
            waker()


def mount_point(path: str) -> str:
    """The mount point of the filesystem that holds a path; the path itself when that cannot be found out."""
    path = os.path.realpath(path)
    try:
        device = os.stat(path).st_dev
        while path != "/":
            above = os.path.dirname(path)
            if os.stat(above).st_dev != device:
                return path
            path = above
    except OSError:
        return path
    return path
