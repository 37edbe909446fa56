"""What a disk that is being restored reads where its files have nothing: a backup's disk, by NBD, and the way home.

    guest ─► chain ─┬─ what the files have
                    └─ else ─► Backing ─► NBD ─► backup server ─► repository
    Homecoming ─► Backing, piece by piece ─► `Chain.fill` ─► the disk's own top

A request waits while the server is away, and is not failed: the server may be started again at any time. An error that
the server answers, such as a damaged chunk, is the request's.

Invariants: the connection of requests is not that of the homecoming, so that a guest's read waits for at most one piece
of other guests' reads; what the guest wrote is never overwritten (`Chain.fill`); `is_home` is said only when all that
the backup has is in the files, durable.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Final, TypeVar

from mullion.base.block import ExtentKind
from mullion.base.errors import DeadlineError, MullionError, NotFoundError, StateError, UnavailableError
from mullion.base.units import KIB, MIB, SECTOR_BYTES
from mullion.vhd import Chain
from mullion.wire.nbd import NbdClient
from mullion.wire.nbd.messages import NbdProtocolError

log = logging.getLogger(__name__)

_RETRY_S: Final = 0.2
_TIMEOUT_S: Final = 60.0
_PIECE_BYTES: Final = 512 * KIB
_BYTES_PER_S: Final = 64 * MIB
"""At most that fast: the guest's own requests come first."""
_TROUBLE_S: Final = 5.0
"""Until what could not be written or read is tried again."""
_NICE: Final = 10

_T = TypeVar("_T")


class Backing:
    """A backup's disk behind an NBD server that comes and goes. `close` ends whoever waits, with an error."""

    def __init__(self, path: str, export: str) -> None:
        self._path = path
        self._export = export
        self._lock = threading.Lock()
        self._client: NbdClient | None = None
        self._closed = threading.Event()
        self.reason: str | None = None
        """Why requests wait; None when they do not."""

    def preadv(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """Fill the buffers; past the end with zeros. Waits for the server.

        Raises: OSError with the server's error, or when it is closed meanwhile.
        """
        for buffer in buffers:
            here = max(0, min(len(buffer), self.size_bytes - offset))
            if here:
                self._persist(partial(_read, offset, buffer[:here]))
            buffer[here:] = bytes(len(buffer) - here)
            offset += len(buffer)

    @property
    def size_bytes(self) -> int:
        return self._persist(lambda client: client.size_bytes)

    def data(self, offset: int, length: int) -> list[tuple[int, int]]:
        """Where a range has data: (offset, length)."""
        return self._persist(
            lambda client: [
                (extent.offset, extent.length)
                for extent in client.extents(offset, length)
                if extent.kind is ExtentKind.DATA
            ]
        )

    def close(self) -> None:
        self._closed.set()
        if (client := self._client) is not None:
            client.abort()
        with self._lock:
            self._drop()

    def _persist(self, ask: Callable[[NbdClient], _T]) -> _T:
        """Ask until the server answers."""
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
            self._closed.wait(_RETRY_S)

    def _drop(self) -> None:
        if self._client is not None:
            with contextlib.suppress(MullionError, OSError):
                self._client.close()
            self._client = None


class Homecoming:
    """The thread that brings home what the backing has, and how far it is."""

    def __init__(self, disk: str, chain: Chain, path: str, announce: Callable[[], None]) -> None:
        self._disk = disk
        self._chain = chain
        self._path = path
        self._announce = announce
        self._backing = Backing(path, disk)
        self._source = Backing(path, disk)
        """The homecoming's own connection."""
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"homecoming of {disk}", daemon=True)
        self._done_bytes = 0
        self._total_bytes = 0
        self._trouble: str | None = None
        self.is_home = False
        chain.backing = self._backing

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread; requests that wait for the server end with an error. May be called again."""
        self._stopped.set()
        self._source.close()
        self._backing.close()
        if self._thread.is_alive():
            self._thread.join()

    def release(self) -> None:
        """The chain reads on without it; nobody reads or writes meanwhile. Raises: StateError."""
        if not self.is_home:
            raise StateError(f"disk {self._disk} still has blocks in its backup", state="coming home", required="home")
        self._chain.backing = None
        self.stop()

    def status(self) -> Mapping[str, object]:
        """As JSON values."""
        return {
            "path": self._path,
            "is_home": self.is_home,
            "done_bytes": self._done_bytes,
            "total_bytes": self._total_bytes,
            "reason": self._backing.reason or self._source.reason or self._trouble,
        }

    def _run(self) -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
        while not self._stopped.is_set():
            try:
                if self._bring_all():
                    self._chain.flush()
                    self.is_home = True
                    log.info("disk %s: all of the backup is home", self._disk)
                    self._announce()
                    return
            except (OSError, MullionError) as error:
                if self._trouble is None and not self._stopped.is_set():
                    log.error("disk %s: the backup does not come home: %s", self._disk, error)
                self._trouble = str(error)
            self._stopped.wait(_TROUBLE_S)

    def _bring_all(self) -> bool:
        """One pass over the disk; False when it was stopped. Raises: what reading or writing raises."""
        chain, source = self._chain, self._source
        end = min(chain.size_bytes, -(-source.size_bytes // SECTOR_BYTES) * SECTOR_BYTES)
        runs = source.data(0, source.size_bytes) if source.size_bytes else []
        self._total_bytes = sum(length for _, length in runs)
        self._done_bytes = 0
        for offset, length in _pieces(runs):
            if self._stopped.is_set():
                return False
            count = min(length, end - offset)
            if count > 0 and chain.lacks(offset, count):
                begun_s = time.monotonic()
                buffer = bytearray(-(-count // SECTOR_BYTES) * SECTOR_BYTES)
                source.preadv(offset, (memoryview(buffer),))
                chain.fill(offset, buffer)
                self._stopped.wait(max(0.0, count / _BYTES_PER_S - (time.monotonic() - begun_s)))
            self._done_bytes += length
            self._trouble = None
        return True


def _read(offset: int, buffer: memoryview, client: NbdClient) -> None:
    client.pread(offset, buffer)


def _pieces(runs: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    for offset, length in runs:
        for start in range(offset, offset + length, _PIECE_BYTES):
            yield start, min(_PIECE_BYTES, offset + length - start)
