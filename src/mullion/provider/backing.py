"""What a disk that is being restored reads where its files have nothing: a backup's disk, by NBD, and the way home.

    guest ─► chain ─┬─ what the files have
                    └─ else ─► SteadyReader ─► NBD ─► backup server ─► repository
    Homecoming ─► SteadyReader, block by block ─► Filling ─► the file at the chain's bottom

A request waits while the server is away, and is not failed: the server may be started again at any time. An error that
the server answers, such as a damaged chunk, is the request's.

Invariants: the connection of requests is not that of the homecoming, so that a guest's read waits for at most one piece
of other guests' reads; what the guest writes goes to the chain's top, which is another file; `is_home` is said only
when all that the backup has is at the bottom, durable, and that file is as every writer leaves it.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from typing import Final

from mullion.base.block import ExtentKind
from mullion.base.errors import MullionError, StateError
from mullion.base.units import MIB
from mullion.vhd import Chain
from mullion.vhd.filling import Filling
from mullion.wire.nbd import SteadyReader

log = logging.getLogger(__name__)

_DURABLE_BYTES: Final = 64 * MIB
"""After so much what came home is made durable: the most that a kill has to bring again."""
_QUIET_S: Final = 0.02
_LONGEST_S: Final = 0.25
"""A block waits until nobody has asked the backup for so long, but not longer than that: guests' reads come first."""
_TROUBLE_S: Final = 5.0
"""Until what could not be written or read is tried again."""
_NICE: Final = 10


class Homecoming:
    """The thread that brings home what the backing has, and how far it is."""

    def __init__(self, disk: str, chain: Chain, path: str, bytes_per_s: int, announce: Callable[[], None]) -> None:
        """Nobody uses the chain yet, whose bottom is open for writing. Raises: as `Filling`.

        Blocks come home at most at that rate (0: no limit): the guest's own requests come first.
        """
        self._disk = disk
        self._chain = chain
        self._path = path
        self._bytes_per_s = bytes_per_s
        self._announce = announce
        self._backing = SteadyReader(path, disk)
        self._source = SteadyReader(path, disk)
        """The homecoming's own connection."""
        self._filling = Filling(chain, self._backing)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"homecoming of {disk}", daemon=True)
        self._done_bytes = 0
        self._total_bytes = 0
        self._trouble: str | None = None
        self.is_home = False

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread; requests that wait for the server end with an error. What came home is durable.

        May be called again. Raises: OSError when it cannot be made durable.
        """
        self._stopped.set()
        self._source.close()
        self._backing.close()
        if self._thread.is_alive():
            self._thread.join()
        self._filling.end()

    def release(self) -> None:
        """The chain reads on without it; nobody reads or writes meanwhile. Raises: StateError."""
        if not self.is_home:
            raise StateError(f"disk {self._disk} still has blocks in its backup", state="coming home", required="home")
        self._chain.backing = None
        self.stop()

    @property
    def is_waited_for(self) -> bool:
        """Whether requests wait for a server that is out of reach."""
        return self._backing.is_waited_for

    def status(self) -> Mapping[str, object]:
        """As JSON values."""
        return {
            "path": self._path,
            "is_home": self.is_home,
            "done_bytes": self._done_bytes,
            "total_bytes": self._total_bytes,
            "reason": self._backing.reason or self._source.reason or self._trouble,
            "is_waited_for": self.is_waited_for,
        }

    def _run(self) -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
        while not self._stopped.is_set():
            try:
                if self._bring_all():
                    self._filling.end()
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
        filling, source = self._filling, self._source
        end = min(filling.size_bytes, source.size_bytes)
        runs = [
            (extent.offset, extent.length)
            for extent in (source.extents(0, end) if end else ())
            if extent.kind is ExtentKind.DATA
        ]
        self._total_bytes = sum(length for _, length in runs)
        self._done_bytes = waiting_bytes = 0
        for block, pieces in _blocks(runs, filling.block_bytes):
            if self._stopped.is_set():
                return False
            count = sum(length for _, length in pieces)
            if filling.lacks(block):
                self._give_way()
                begun_s = time.monotonic()
                filling.fill(block, [self._read(block, *piece) for piece in pieces])
                waiting_bytes += count
                if waiting_bytes >= _DURABLE_BYTES and not filling.is_doubtful:
                    filling.flush()
                    waiting_bytes = 0
                if self._bytes_per_s:
                    self._stopped.wait(max(0.0, count / self._bytes_per_s - (time.monotonic() - begun_s)))
            self._done_bytes += count
            self._trouble = None
        return True

    def _give_way(self) -> None:
        """Let whoever reads blocks that are not home have the server and the processor to himself."""
        until_s = time.monotonic() + _LONGEST_S
        while (now_s := time.monotonic()) < until_s and now_s - self._backing.asked_s < _QUIET_S:
            if self._stopped.wait(_QUIET_S):
                return

    def _read(self, block: int, offset: int, length: int) -> tuple[int, bytearray]:
        """A piece of the backup, and where in its block it is."""
        buffer = bytearray(length)
        self._source.preadv(offset, (memoryview(buffer),))
        return offset - block * self._filling.block_bytes, buffer


def _blocks(runs: Sequence[tuple[int, int]], block_bytes: int) -> Iterator[tuple[int, list[tuple[int, int]]]]:
    """The runs of data, cut at the blocks' borders: each block with its pieces (offset on the disk, length)."""
    pieces = (
        (start // block_bytes, (max(start, offset), min(start + block_bytes, offset + length) - max(start, offset)))
        for offset, length in runs
        for start in range(offset // block_bytes * block_bytes, offset + length, block_bytes)
    )
    for block, group in groupby(pieces, key=itemgetter(0)):
        yield block, [piece for _, piece in group]
