"""What a repair changed, kept in a small file that can be put back.

Format: JSON, UTF-8, one object.

    format       "mullion-vhd-repair"     file_bytes_before   length of the disk's file before
    version      1                        file_bytes_after    length after
    path         of the disk, absolute    changes             in the order in which they were written:
    made         RFC 3339, UTC              structure, offset (bytes), before, after (zlib, then base64)

`before` ends where the file ended. Bytes that a repair cut off at the end are changes with an empty `after`; of more
than a MiB only the last MiB is kept: what belongs to nothing may be as long as the disk.

Durability: the file is whole and durable (`publish`) before the first byte of the disk changes. Putting it back may be
interrupted and repeated: each range may have the bytes of before or of after, anything else means that the disk was
used since, and is refused.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Self

from mullion.base.errors import ConflictError, InvalidError
from mullion.base.units import MIB, format_time
from mullion.vhd.fileio import SYSTEM, FileIO
from mullion.vhd.image import open_file
from mullion.vhd.locking import lock_file
from mullion.vhd.publish import new_file

FORMAT: Final = "mullion-vhd-repair"
_VERSION: Final = 1
_KEPT_TAIL_BYTES: Final = MIB
_MAX_BACKUP_BYTES: Final = 64 * MIB
_MAX_CHANGE_BYTES: Final = 4 * MIB


@dataclass(frozen=True, slots=True)
class Change:
    """A range of a disk's file: what was there (shorter where the file ended) and what is written."""

    structure: str
    offset: int
    before: bytes
    after: bytes

    @classmethod
    def of(cls, fd: int, structure: str, offset: int, after: bytes) -> Self:
        return cls(structure, offset, os.pread(fd, len(after), offset), after)


def keep_backup(fd: int, path: str, changes: Sequence[Change], file_bytes: int, name: str | None) -> str:
    """Write the backup of a repair that will leave a file of `file_bytes`; returns its path.

    Raises: AlreadyExistsError when `name` is taken; OSError.
    """
    now_ns = time.time_ns()
    length = os.fstat(fd).st_size
    kept = [*changes]
    if file_bytes < length:
        begin = max(file_bytes, length - _KEPT_TAIL_BYTES)
        kept.append(Change("cut off", begin, os.pread(fd, length - begin, begin), b""))
    fields = {
        "format": FORMAT,
        "version": _VERSION,
        "path": os.path.abspath(path),
        "made": format_time(now_ns),
        "file_bytes_before": length,
        "file_bytes_after": file_bytes,
        "changes": [
            {
                "structure": change.structure,
                "offset": change.offset,
                "before": _packed(change.before),
                "after": _packed(change.after),
            }
            for change in kept
        ],
    }
    backup = name or _free_name(path, now_ns)
    with new_file(backup) as backup_fd:
        SYSTEM.write_all(backup_fd, [json.dumps(fields, indent=1).encode()], 0)
    return backup


def undo_repair(backup: str, path: str, *, file_io: FileIO = SYSTEM) -> list[str]:
    """Put back what a repair changed; says what was done.

    Raises: InvalidError when the backup is none; ConflictError when the disk changed since; NotFoundError, DeniedError,
    DiskBusyError, OSError.
    """
    before_bytes, after_bytes, changes = _read_backup(backup)
    fd = open_file(path, writable=True)
    try:
        lock_file(fd, path, for_writing=True)
        length = os.fstat(fd).st_size
        if length not in (before_bytes, after_bytes) or not all(_is_known(fd, change, length) for change in changes):
            raise ConflictError(
                f"{path} was changed since {backup} was made: putting it back would break it",
                remedy="Restore the disk from a backup of the whole file, or repair it again.",
                path=path,
            )
        if length < before_bytes:
            file_io.ftruncate(fd, before_bytes)
        for change in reversed(changes):
            file_io.write_all(fd, [change.before], change.offset)
            file_io.sync_file(fd)
        if length > before_bytes:
            file_io.ftruncate(fd, before_bytes)
        file_io.sync_file(fd)
    finally:
        os.close(fd)
    return [f"{change.structure} at byte {change.offset}: {len(change.before)} bytes put back" for change in changes]


def _is_known(fd: int, change: Change, file_bytes: int) -> bool:
    """Has the range the bytes of before or after the repair? What was cut off is there again, or still gone."""
    if not change.after:
        return True
    now = os.pread(fd, len(change.after), change.offset)
    before = change.before.ljust(len(now), b"\0") if change.offset + len(now) <= file_bytes else change.before
    return now in (change.after, change.before, before)


def _free_name(path: str, now_ns: int) -> str:
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(now_ns // 1_000_000_000))
    first = name = f"{path}.mullion-repair-{stamp}"
    number = 2
    while os.path.lexists(name):
        name = f"{first}-{number}"
        number += 1
    return name


def _packed(raw: bytes) -> str:
    return base64.b64encode(zlib.compress(raw)).decode()


def _read_backup(backup: str) -> tuple[int, int, list[Change]]:
    """Length before, length after, changes. Raises: InvalidError."""
    fd = open_file(backup)
    try:
        raw = os.pread(fd, _MAX_BACKUP_BYTES, 0)
    finally:
        os.close(fd)
    try:
        fields = json.loads(raw)
        if fields["format"] != FORMAT or fields["version"] != _VERSION:
            raise ValueError("another format or version")
        before_bytes, after_bytes = int(fields["file_bytes_before"]), int(fields["file_bytes_after"])
        changes = [
            Change(str(entry["structure"]), int(entry["offset"]), _unpacked(entry["before"]), _unpacked(entry["after"]))
            for entry in fields["changes"]
        ]
        if min(before_bytes, after_bytes, *(change.offset for change in changes)) < 0:
            raise ValueError("a negative number")
    except (ValueError, KeyError, TypeError, zlib.error, binascii.Error, RecursionError) as error:
        raise InvalidError(
            f"{backup} is not the backup of a repair: {error}",
            remedy="Name the file PATH.mullion-repair-TIME that the repair made.",
            path=backup,
        ) from error
    return before_bytes, after_bytes, changes


def _unpacked(text: str) -> bytes:
    unpacker = zlib.decompressobj()
    raw = unpacker.decompress(base64.b64decode(text, validate=True), _MAX_CHANGE_BYTES)
    if unpacker.unconsumed_tail:
        raise ValueError("more than was ever kept")
    return raw
