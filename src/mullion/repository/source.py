"""What a backup reads: the chunks of a device that hold data, in order, in pieces; or a stream."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import BinaryIO, Final

from mullion.base.block import BlockDevice, ExtentKind
from mullion.base.errors import InvalidError
from mullion.base.progress import Progress
from mullion.repository.keys import CHUNK_BYTES
from mullion.repository.rooms import Rooms
from mullion.repository.stream import PIECE_BYTES, Piece
from mullion.repository.tree import chunks_of

Range = tuple[int, int]
"""Offset and length in bytes."""
Run = tuple[int, int]
"""The first chunk, and the one behind the last."""

_PIECE_CHUNKS: Final = PIECE_BYTES // CHUNK_BYTES
_PROGRESS_STEPS: Final = 200


def changed_runs(ranges: Iterable[Range], size_bytes: int) -> list[Run]:
    """The chunks that ranges touch, in order, each once. Raises: InvalidError for a range outside the disk."""
    runs: list[Run] = []
    for offset, length in sorted(ranges):
        if offset < 0 or length < 0 or offset + length > size_bytes:
            raise InvalidError(
                f"the change of {length} bytes at {offset} is outside a disk of {size_bytes} bytes",
                remedy="Give changes of this disk, after it was resized.",
            )
        first, end = offset // CHUNK_BYTES, -(-(offset + length) // CHUNK_BYTES)
        if runs and first <= runs[-1][1]:
            runs[-1] = (runs[-1][0], max(runs[-1][1], end))
        elif length:
            runs.append((first, end))
    return runs


class DevicePieces:
    """The pieces of a device's runs; iterate once. `read_bytes` counts what was read."""

    def __init__(
        self, device: BlockDevice, runs: Sequence[Run], rooms: Rooms, *, with_zeros: bool, progress: Progress
    ) -> None:
        """`with_zeros`: give pieces without content for what is known to be zeros, too."""
        self._device = device
        self._runs = runs
        self._rooms = rooms
        self._with_zeros = with_zeros
        self._progress = progress
        self._total_bytes = sum(end - first for first, end in runs) * CHUNK_BYTES
        self._done_bytes = 0
        self._said_bytes = -1
        self.read_bytes = 0

    def __iter__(self) -> Iterator[Piece]:
        for first, end in self._runs:
            for begin, stop, is_data in data_runs(self._device, first, end):
                if is_data:
                    yield from self._read(begin, stop)
                elif self._with_zeros:
                    yield Piece(begin, stop - begin, None)
                self._done(stop - begin if not is_data else 0)
        self._progress("reading", self._total_bytes, self._total_bytes)

    def _read(self, first: int, end: int) -> Iterator[Piece]:
        for begin in range(first, end, _PIECE_CHUNKS):
            count = min(_PIECE_CHUNKS, end - begin)
            content = self._rooms.take()[: count * CHUNK_BYTES]
            offset = begin * CHUNK_BYTES
            length = min(len(content), self._device.size_bytes - offset)
            self._device.pread(offset, content[:length])
            content[length:] = bytes(len(content) - length)  # the last chunk is filled up with zeros
            self.read_bytes += length
            yield Piece(begin, count, content)
            self._done(count)

    def _done(self, chunks: int) -> None:
        self._done_bytes += chunks * CHUNK_BYTES
        if self._done_bytes - self._said_bytes >= self._total_bytes // _PROGRESS_STEPS:
            self._said_bytes = self._done_bytes
            self._progress("reading", self._done_bytes, self._total_bytes)


class StreamPieces:
    """The pieces of a stream; iterate once. `read_bytes` is its length at the end."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.read_bytes = 0

    def __iter__(self) -> Iterator[Piece]:
        first = 0
        while content := self._fill():
            self.read_bytes += len(content)
            count = chunks_of(len(content))
            yield Piece(first, count, content + bytes(count * CHUNK_BYTES - len(content)))
            first += count

    def _fill(self) -> bytes:
        """A full piece, or less at the end of the stream: a pipe gives what it has."""
        parts, length = [], 0
        while length < PIECE_BYTES and (part := self._stream.read(PIECE_BYTES - length)):
            parts.append(part)
            length += len(part)
        return b"".join(parts)


def data_runs(device: BlockDevice, first: int, end: int) -> Iterator[tuple[int, int, bool]]:
    """The chunks from `first` to `end` in order, as (first, end, whether any part of them holds data)."""
    position = first
    stop = min(end * CHUNK_BYTES, device.size_bytes)
    pending: Run | None = None
    for extent in device.extents(first * CHUNK_BYTES, stop - first * CHUNK_BYTES):
        if extent.kind is not ExtentKind.DATA:
            continue
        begin, behind = extent.offset // CHUNK_BYTES, chunks_of(extent.offset + extent.length)
        if pending is not None and begin <= pending[1]:
            pending = (pending[0], max(pending[1], behind))
            continue
        if pending is not None:
            yield (*pending, True)
            position = pending[1]
        if begin > position:
            yield position, begin, False
            position = begin
        pending = (begin, behind)
    if pending is not None:
        yield (*pending, True)
        position = pending[1]
    if position < end:
        yield position, end, False
