"""Closes descriptors that others have sent, for those who cannot wait for it.

Whoever is the last to close a guest's memory frees it, which takes a tenth of a second and more for each GiB; a socket
may linger for as long as its sender likes (SO_LINGER).
"""

from __future__ import annotations

import collections
import os
import threading
from collections.abc import Iterable
from contextlib import suppress
from typing import Final

WAITING_LIMIT: Final = 4096
"""So many are waiting only where somebody lets us wait."""


class Closer:
    """Used from any thread. It has a thread of its own while there is something to close."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: collections.deque[int] = collections.deque()
        self._is_running = False

    @property
    def is_behind(self) -> bool:
        """Whether more than `WAITING_LIMIT` descriptors are still open: no more of them should be taken."""
        return len(self._waiting) > WAITING_LIMIT

    def close(self, fds: Iterable[int]) -> None:
        """Close them soon; they are not the caller's any more."""
        with self._lock:
            self._waiting.extend(fds)
            if self._is_running or not self._waiting:
                return
            self._is_running = True
        try:
            threading.Thread(target=self._run, name="closing descriptors", daemon=True).start()
        except RuntimeError:  # the host allows no thread for it
            self._run()

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._is_running = False
                    return
                fd = self._waiting.popleft()
            with suppress(OSError):  # it is closed; what its file says of that is its sender's business
                os.close(fd)
