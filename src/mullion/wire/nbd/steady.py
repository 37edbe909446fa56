"""A disk to read behind an NBD server that comes and goes: whoever asks waits for it.

Only the way to the server is waited for. An error that the server answers, such as a damaged chunk of a backup, is the
request's.

Invariants: one caller at a time is answered, those that wait for the server hold nothing that `close` needs. `close`
ends whoever waits.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Final, TypeVar

from mullion.base.block import Extent, ExtentKind
from mullion.base.errors import DeadlineError, MullionError, NotFoundError, UnavailableError
from mullion.wire.nbd.client import NbdClient
from mullion.wire.nbd.messages import NbdProtocolError

log = logging.getLogger(__name__)

_RETRY_S: Final = 0.2
_TIMEOUT_S: Final = 60.0

_T = TypeVar("_T")


class SteadyReader:
    """What is read is at the unix socket `path`; who waits longer than `patience_s` gets an error (None: nobody).

    `on_wait` is told why, again and again while somebody waits.
    """

    def __init__(
        self,
        path: str,
        export: str,
        *,
        patience_s: float | None = None,
        on_wait: Callable[[str], None] = lambda _reason: None,
    ) -> None:
        self._path = path
        self._export = export
        self._patience_s = patience_s
        self._on_wait = on_wait
        self._lock = threading.Lock()
        self._client: NbdClient | None = None
        self._closed = threading.Event()
        self._callers = 0
        self._callers_lock = threading.Lock()
        self.asked_s = float("-inf")
        """When somebody asked last, by `time.monotonic`."""
        self.reason: str | None = None
        """Why requests wait; None when they do not."""

    @property
    def is_waited_for(self) -> bool:
        """Whether somebody waits for the server to come back."""
        return self.reason is not None and self._callers > 0

    @property
    def size_bytes(self) -> int:
        """Raises: as `preadv`."""
        return self._persist(lambda client: client.size_bytes)

    def preadv(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """Fill the buffers one after the other; past the end with zeros. Waits for the server.

        Raises: OSError with the server's error, or when it is closed meanwhile; UnavailableError at the end of the
        patience.
        """
        for buffer in buffers:
            self._persist(partial(_read, offset, buffer))
            offset += len(buffer)

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        """What is where; holes past the end. Raises: as `preadv`."""
        here = max(0, min(length, self.size_bytes - offset))
        if here:
            yield from self._persist(lambda client: list(client.extents(offset, here)))
        if here < length:
            yield Extent(offset + here, length - here, ExtentKind.HOLE)

    def close(self) -> None:
        """End whoever waits, with an error."""
        self._closed.set()
        if (client := self._client) is not None:
            client.abort()
        with self._lock:
            self._drop()

    def _persist(self, ask: Callable[[NbdClient], _T]) -> _T:
        """Ask until the server answers."""
        self.asked_s = time.monotonic()
        with self._callers_lock:
            self._callers += 1
        try:
            return self._ask_again(ask)
        finally:
            with self._callers_lock:
                self._callers -= 1

    def _ask_again(self, ask: Callable[[NbdClient], _T]) -> _T:
        begun_s = time.monotonic()
        while True:
            with self._lock:
                if self._closed.is_set():
                    raise OSError(errno.ESHUTDOWN, "the disk's backup is not asked any more", self._path)
                try:
                    if self._client is None:
                        self._client = NbdClient(self._path, self._export, read_only=True, timeout_s=_TIMEOUT_S)
                        if self.reason is not None:
                            log.info("disk %s: the backup answers again", self._export)
                            self.reason = None
                    return ask(self._client)
                except (UnavailableError, DeadlineError, NotFoundError, NbdProtocolError) as error:
                    self._drop()
                    if self.reason is None:
                        log.warning("disk %s: requests wait for the backup: %s", self._export, error)
                    self.reason = str(error)
                    waited_s = time.monotonic() - begun_s
                    if self._patience_s is not None and waited_s > self._patience_s:
                        raise UnavailableError(
                            f"blocks of disk {self._export} are in its backup only, which could not be read for "
                            f"{waited_s:.0f} s: {error}",
                            remedy="Mend the way to the backup repository (`mullion partition show` says why), then "
                            "try again.",
                            path=self._path,
                        ) from error
            self._on_wait(self.reason or "")
            self._closed.wait(_RETRY_S)

    def _drop(self) -> None:
        if self._client is not None:
            with contextlib.suppress(MullionError, OSError):
                self._client.close()
            self._client = None


def _read(offset: int, buffer: memoryview, client: NbdClient) -> None:
    here = max(0, min(len(buffer), client.size_bytes - offset))
    if here:
        client.pread(offset, buffer[:here])
    buffer[here:] = bytes(len(buffer) - here)
