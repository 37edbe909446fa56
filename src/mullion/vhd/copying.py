"""Copying a disk's content into a new file: raw, fixed or dynamic; or into a pipe.

The source is any `BlockDevice`: a chain, a raw file, a foreign disk. One pass: what the source calls data is read in
windows of 2 MiB and looked through for zeros; runs of zeros are left out, so that a dynamic disk has no block for them
and other files have a hole. Threads write what was read while the next window is read (`copy_writers`).

Durability: that of `publish`: the new file has its name when all of it is durable, or it does not exist. An error, ^C
or a kill leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final

from mullion.base.block import BlockDevice, ExtentKind
from mullion.base.errors import AlreadyExistsError, InvalidError, OperationFailedError
from mullion.base.progress import Progress, no_progress
from mullion.base.units import GIB, KIB, MIB, SECTOR_BYTES
from mullion.vhd.chain import Chain
from mullion.vhd.copy_writers import WINDOW_BYTES, CopyWriters
from mullion.vhd.create import DEFAULT_BLOCK_BYTES
from mullion.vhd.fileio import SYSTEM
from mullion.vhd.image import open_file
from mullion.vhd.locking import lock_file
from mullion.vhd.publish import new_file
from mullion.vhd.rawfile import RawFile
from mullion.vhd.storage import storage_explained
from mullion.vhd.targets import PAGE_BYTES, DynamicTarget, FlatTarget, Piece, Target

ZERO_UNIT_BYTES: Final = 64 * KIB
"""Runs of zeros are found in these, and to the page at the ends of data."""

_ZEROS: Final = bytes(ZERO_UNIT_BYTES)

Window = tuple[int, list[tuple[int, int]]]
"""An offset on the disk, a multiple of WINDOW_BYTES, and ranges of data from there: (start, end) in whole pages."""


class TargetKind(Enum):
    """What a disk is copied into."""

    FIXED = "fixed"
    DYNAMIC = "dynamic"
    RAW = "raw"


@dataclass(frozen=True, slots=True)
class Copied:
    """What was made."""

    size_bytes: int
    """Of the new disk."""
    data_bytes: int
    """What was not zero, and was written."""
    padding_bytes: int
    """Zeros behind the source's end, up to a whole sector."""
    verified: bool


def copy_disk(
    source: BlockDevice,
    path: str,
    kind: TargetKind,
    *,
    block_bytes: int | None = None,
    keep_from: Sequence[str] = (),
    replace: bool = False,
    verify: bool = False,
    durable: bool = True,
    progress: Progress = no_progress,
) -> Copied:
    """Copy a disk's content into a new file at `path`.

    `block_bytes` is for a dynamic disk; `keep_from` are the files of the source, which must not be replaced; `replace`
    takes the place of an existing file; `verify` reads the new file back and compares it, before it gets its name.

    Raises: AlreadyExistsError, InvalidError; DiskBusyError when the file to be replaced is in use; NoSpaceError;
    OperationFailedError when what is read back differs; what reading the source raises.
    """
    check_target(path, keep_from, replace=replace)
    size_bytes = -(-source.size_bytes // SECTOR_BYTES) * SECTOR_BYTES
    target = _target(kind, size_bytes, block_bytes)
    with storage_explained(path), new_file(path, replace=replace, durable=durable) as fd:
        data_bytes = _fill(source, target, fd, progress)
        if verify:
            SYSTEM.sync_file(fd)
            if kind is TargetKind.RAW:
                _verify(source, RawFile(f"/proc/self/fd/{fd}"), path, progress)
            else:
                _verify(source, Chain.from_descriptors([os.dup(fd)], [path], read_only=True), path, progress)
    return Copied(size_bytes, data_bytes, size_bytes - source.size_bytes, verify)


def check_target(path: str, keep_from: Sequence[str], *, replace: bool) -> None:
    """May a new file be made at `path`? It may replace a regular file that nobody uses, but none of the source's.

    Raises: AlreadyExistsError, InvalidError, DiskBusyError.
    """
    try:
        status = os.stat(path)
    except OSError:
        return
    for kept in keep_from:
        with contextlib.suppress(OSError):
            if os.path.samestat(status, os.stat(kept)):
                raise InvalidError(
                    f"{path} belongs to the source, so it cannot be the target",
                    remedy="Choose another name for the new file.",
                    path=path,
                )
    if not replace:
        raise AlreadyExistsError(
            f"{path} exists already", remedy="Choose another name, or replace the file with --force.", path=path
        )
    if not stat.S_ISREG(status.st_mode):
        raise InvalidError(
            f"{path} is not a regular file, so it is not replaced", remedy="Choose another name.", path=path
        )
    fd = open_file(path)
    try:
        lock_file(fd, path, for_writing=False)
    finally:
        os.close(fd)


def _target(kind: TargetKind, size_bytes: int, block_bytes: int | None) -> Target:
    if kind is TargetKind.DYNAMIC:
        return DynamicTarget(size_bytes, block_bytes or DEFAULT_BLOCK_BYTES)
    if block_bytes is not None:
        raise InvalidError(f"a {kind.value} disk has no blocks", remedy="Leave --block-size out, or say --to dynamic.")
    return FlatTarget(size_bytes, fixed=kind is TargetKind.FIXED)


# ---------------------------------------------------------------------- copying


def _fill(source: BlockDevice, target: Target, fd: int, progress: Progress) -> int:
    """Write the whole file; the bytes of data in it."""
    total = 0
    if progress is not no_progress:
        total = sum(end - first for _, ranges in data_windows(source) for first, end in ranges)
    meter = CopyMeter("copying", total, progress)
    written = 0
    with CopyWriters(fd, direct=target.is_aligned) as writers:
        for offset, ranges in data_windows(source):
            buffer = writers.take()
            pieces: list[Piece] = []
            for first, end in ranges:
                _read(source, offset, buffer, first, end)
                for start, stop in _data_runs(buffer, first, end):
                    pieces.extend(target.place(offset, buffer, start, stop))
                    written += min(stop, source.size_bytes - offset) - start
                meter.add(end - first)
            writers.give(buffer, pieces)
    for place, parts in target.close():
        SYSTEM.write_all(fd, parts, place)
    SYSTEM.ftruncate(fd, target.file_bytes)
    meter.end()
    return written


def data_windows(source: BlockDevice) -> Iterator[Window]:
    """What may be other than zero on a disk, in ascending order."""
    here = -1
    ranges: list[tuple[int, int]] = []
    for offset, length, kind in source.extents(0, source.size_bytes):
        if kind is not ExtentKind.DATA:
            continue
        start = offset // PAGE_BYTES * PAGE_BYTES
        end = -(-(offset + length) // PAGE_BYTES) * PAGE_BYTES
        while start < end:
            window = start // WINDOW_BYTES * WINDOW_BYTES
            stop = min(end, window + WINDOW_BYTES)
            if window != here:
                if ranges:
                    yield here, ranges
                here, ranges = window, []
            if ranges and start - window <= ranges[-1][1]:
                ranges[-1] = ranges[-1][0], max(ranges[-1][1], stop - window)
            else:
                ranges.append((start - window, stop - window))
            start = stop
    if ranges:
        yield here, ranges


def _read(source: BlockDevice, offset: int, buffer: memoryview, first: int, end: int) -> None:
    """Fill `buffer[first:end]` with the disk's bytes from `offset + first` on, zeros behind its end."""
    inside = min(end, source.size_bytes - offset)
    read_source(source, offset + first, buffer[first:inside])
    if inside < end:
        buffer[inside:end] = _ZEROS[: end - inside]


def read_source(source: BlockDevice, offset: int, buffer: memoryview) -> None:
    """Read from the source. Raises: OperationFailedError in place of an OSError, which could be the target's."""
    try:
        source.pread(offset, buffer)
    except OSError as error:
        raise OperationFailedError(
            f"the source cannot be read at byte {offset} of the disk: {error.strerror or error}",
            remedy="Look into the host's log (`dmesg`): the storage below the source reports this.",
            offset=offset,
        ) from error


def _data_runs(buffer: memoryview, first: int, end: int) -> Iterator[tuple[int, int]]:
    """The runs of `buffer[first:end]` that are not zeros: (start, end) in whole pages."""
    start = -1
    for at in range(first, end, ZERO_UNIT_BYTES):
        stop = min(at + ZERO_UNIT_BYTES, end)
        if not _ZEROS.startswith(buffer[at:stop]):  # memcmp; a memoryview would compare byte by byte
            if start < 0:
                start = at
        elif start >= 0:
            yield _trimmed(buffer, start, at)
            start = -1
    if start >= 0:
        yield _trimmed(buffer, start, end)


def _trimmed(buffer: memoryview, start: int, end: int) -> tuple[int, int]:
    """A run without the pages of zeros at its ends; it is not all zeros."""
    while _ZEROS.startswith(buffer[start : start + PAGE_BYTES]):
        start += PAGE_BYTES
    while _ZEROS.startswith(buffer[end - PAGE_BYTES : end]):
        end -= PAGE_BYTES
    return start, end


class CopyMeter:
    """Counts what was done and passes it on now and then."""

    def __init__(self, stage: str, total_bytes: int, progress: Progress) -> None:
        self._stage = stage
        self._progress = progress
        self._done = 0
        self._next = 0
        self._total = total_bytes
        self._step = min(max(self._total // 200, MIB), GIB)
        self.reach(0)

    def add(self, count: int) -> None:
        self.reach(self._done + count)

    def reach(self, done_bytes: int) -> None:
        self._done = done_bytes
        if self._done >= self._next:
            self._next = self._done + self._step
            self._progress(self._stage, self._done, self._total)

    def end(self) -> None:
        self._progress(self._stage, self._total, self._total)


# ---------------------------------------------------------------------- verifying


def _verify(source: BlockDevice, made: RawFile | Chain, path: str, progress: Progress) -> None:
    """Read the new file back, as anybody would, and compare it with the source."""
    with made:
        meter = CopyMeter("verifying", made.size_bytes, progress)
        ours, theirs = memoryview(bytearray(MIB)), bytearray(MIB)
        for offset, length in _either_has(source, made):
            inside = max(0, min(length, source.size_bytes - offset))
            made.pread(offset, ours[:length])
            if inside < MIB:
                theirs[:] = bytes(MIB)
            read_source(source, offset, memoryview(theirs)[:inside])
            if theirs != ours and theirs[:length] != ours[:length]:
                raise _differs(path, f"bytes {offset} to {offset + length} of the disk are not the source's")
            meter.reach(offset + length)
        meter.end()


def _either_has(source: BlockDevice, made: BlockDevice) -> Iterator[tuple[int, int]]:
    """Pieces of at most a MiB that are data in either disk: (offset, length) inside the new one."""
    pending: list[Iterator[Window]] = [data_windows(source), data_windows(made)]
    heads = [next(windows, None) for windows in pending]
    while any(heads):
        window = min(head[0] for head in heads if head)
        for number, head in enumerate(heads):
            if head and head[0] == window:
                heads[number] = next(pending[number], None)
        for offset in range(window, min(window + WINDOW_BYTES, made.size_bytes), MIB):
            yield offset, min(MIB, made.size_bytes - offset)


def _differs(path: str, what: str) -> OperationFailedError:
    return OperationFailedError(
        f"{path}: what was written reads differently: {what}; the file was not kept",
        remedy="The storage or the memory of this host is not sound: check both before you trust it with a disk.",
        path=path,
    )
