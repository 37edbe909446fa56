"""A disk of a backup as a block device: for NBD (instant restore), for reading files, and for restoring it."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final, NoReturn

from mullion.base.block import BlockDevice, Buffer, Extent, ExtentKind, WritableBuffer
from mullion.base.errors import InvalidError, StateError
from mullion.base.progress import Progress, no_progress
from mullion.base.units import MIB
from mullion.repository.chunks import ChunkReader
from mullion.repository.keys import CHUNK_BYTES, ID_BYTES, NODE_IDS
from mullion.repository.manifest import Stored
from mullion.repository.tree import ZERO_ID, ZERO_NODE, find_leaf, walk_nodes

_WINDOW_BYTES: Final = 2 * MIB
_RESTORE_THREADS: Final = 4
_ZERO_CHUNK: Final = bytes(CHUNK_BYTES)


class BackupDisk:
    """A `BlockDevice` that is only read. Safe from any thread.

    Every byte that it gives was authenticated; where that fails, the read raises RepositoryDamagedError.
    """

    def __init__(self, stored: Stored, reader: ChunkReader) -> None:
        self._tree = stored.tree
        self._reader = reader
        self._lock = threading.Lock()
        self._is_closed = False

    @property
    def size_bytes(self) -> int:
        return self._tree.size_bytes

    @property
    def read_only(self) -> bool:
        return True

    def pread(self, offset: int, buffer: WritableBuffer) -> None:
        view = memoryview(buffer)
        self._check(offset, len(view))
        done = 0
        while done < len(view):
            length = min(len(view) - done, _WINDOW_BYTES)
            self._read_window(offset + done, view[done : done + length])
            done += length

    def pwrite(self, offset: int, buffer: Buffer) -> None:
        self._refuse()

    def discard(self, offset: int, length: int) -> None:
        self._refuse()

    def write_zeroes(self, offset: int, length: int) -> None:
        self._refuse()

    def flush(self) -> None:
        pass

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        self._check(offset, length)
        end = offset + length
        kind, begin = None, offset
        for chunk, span, is_data in self._spans(offset // CHUNK_BYTES, -(-end // CHUNK_BYTES)):
            found = ExtentKind.DATA if is_data else ExtentKind.HOLE
            if found is not kind:
                at = max(offset, chunk * CHUNK_BYTES)
                if kind is not None and at > begin:
                    yield Extent(begin, at - begin, kind)
                kind, begin = found, at
            assert span > 0
        if kind is not None and begin < end:
            yield Extent(begin, end - begin, kind)

    def close(self) -> None:
        self._is_closed = True

    def restore(self, target: BlockDevice, *, is_zero: bool = False, progress: Progress = no_progress) -> int:
        """Copy the disk onto a device of the same size or larger, and flush it; the bytes of data written.

        `is_zero`: the target is known to read as zeros, so only data is written. When it raises RepositoryDamagedError
        the target has right data up to some place and is not complete: nothing wrong was written.
        """
        if target.size_bytes < self.size_bytes:
            raise InvalidError(
                f"the target has {target.size_bytes} bytes, and the disk of the backup {self.size_bytes}",
                remedy="Restore to a disk of the same size or larger.",
            )
        written = done = 0
        waiting: deque[tuple[int, int, Future[int]]] = deque()
        with ThreadPoolExecutor(_RESTORE_THREADS, "repository-restore") as workers:
            try:
                for extent in self._pieces():
                    if extent.kind is ExtentKind.DATA:
                        future = workers.submit(self._copy, extent, target)
                        waiting.append((extent.length, extent.offset, future))
                        if len(waiting) >= 2 * _RESTORE_THREADS:
                            written += waiting.popleft()[2].result()
                    elif not is_zero:
                        target.write_zeroes(extent.offset, extent.length)
                    done = extent.offset + extent.length
                    progress("restoring", done, self.size_bytes)
                while waiting:
                    written += waiting.popleft()[2].result()
            finally:
                for _, _, future in waiting:
                    future.cancel()
        target.flush()
        return written

    # ------------------------------------------------------------------

    def _pieces(self) -> Iterator[Extent]:
        """All of the disk, data in pieces of the window's size."""
        for extent in self.extents(0, self.size_bytes) if self.size_bytes else ():
            if extent.kind is not ExtentKind.DATA:
                yield extent
                continue
            for offset in range(extent.offset, extent.offset + extent.length, _WINDOW_BYTES):
                yield Extent(offset, min(_WINDOW_BYTES, extent.offset + extent.length - offset), ExtentKind.DATA)

    def _copy(self, extent: Extent, target: BlockDevice) -> int:
        buffer = bytearray(extent.length)
        self.pread(extent.offset, buffer)
        target.pwrite(extent.offset, buffer)
        return extent.length

    def _read_window(self, offset: int, view: memoryview) -> None:
        first, end = offset // CHUNK_BYTES, -(-(offset + len(view)) // CHUNK_BYTES)
        ids = [self._chunk_id(chunk) for chunk in range(first, end)]
        contents = self._reader.read(chunk_id for chunk_id in ids if chunk_id != ZERO_ID)
        for number, chunk_id in enumerate(ids, first):
            begin = max(offset, number * CHUNK_BYTES)
            stop = min(offset + len(view), (number + 1) * CHUNK_BYTES)
            content = _ZERO_CHUNK if chunk_id == ZERO_ID else contents[chunk_id]
            inner = begin - number * CHUNK_BYTES
            view[begin - offset : stop - offset] = memoryview(content)[inner : inner + stop - begin]

    def _chunk_id(self, chunk: int) -> bytes:
        leaf = find_leaf(self._tree, chunk, self._reader.load_node)
        offset = chunk % NODE_IDS * ID_BYTES
        return leaf[offset : offset + ID_BYTES]

    def _spans(self, first: int, end: int) -> Iterator[tuple[int, int, bool]]:
        """Chunks from `first` to `end` in order: number, how many, whether they have data. No gaps."""
        position = first
        for leaf_first, leaf in walk_nodes(
            self._tree,
            self._reader.load_node,
            lambda _, level, start: start < end and start + NODE_IDS ** (level + 1) > first,
        ):
            if leaf_first > position:
                yield position, leaf_first - position, False
            begin, stop = max(first, leaf_first), min(end, leaf_first + NODE_IDS)
            if leaf == ZERO_NODE:
                yield begin, stop - begin, False
            else:
                for chunk in range(begin, stop):
                    place = (chunk - leaf_first) * ID_BYTES
                    yield chunk, 1, leaf[place : place + ID_BYTES] != ZERO_ID
            position = stop
        if position < end:
            yield position, end - position, False

    def _check(self, offset: int, length: int) -> None:
        if self._is_closed:
            raise StateError("the disk of the backup is closed", state="closed", required="open")
        if offset < 0 or length < 0 or offset + length > self.size_bytes:
            raise InvalidError(
                f"bytes {offset} to {offset + length} are outside a disk of {self.size_bytes} bytes",
                remedy="Stay within the disk.",
            )

    def _refuse(self) -> NoReturn:
        raise StateError(
            "a disk of a backup is never written",
            state="a backup",
            required="a disk of a partition",
            remedy="Restore it to a new disk, or put a differencing disk over it.",
        )
