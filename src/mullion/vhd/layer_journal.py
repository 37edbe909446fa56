"""The journal of a merge that runs while others read the chain: the durable mark on the layer that is merged into.

From the first change of the lower layer until the last one is durable, that file by itself is a mixture of two layers.
Through the upper layer, which hides all that changes, the disk reads as ever. So whoever opens a file looks for its
journal (`check_whole`): a file with an unfinished one may be read only through the layer that the journal names.

File `.NAME.mullion-merging` (NAME: that of the lower file), beside it:

    0      512   slot A
    512    512   slot B
    1024   ...   JSON in UTF-8: {"upper": {"path", "id"}, "lower": {"id"}}

Slot (little-endian):

    0    8   magic "MULMERG1"          32   8   inode of the upper file      56   8   inode of the lower file
    8    8   generation                40   8   its length                   64   4   length of the JSON
    16   4   state: 1 copying, 2 done  48   8   its time of change, ns       68   4   CRC-32 of the JSON
    24   8   bytes of the disk that are durable, from its start              72   4   CRC-32 of the bytes before

The path is relative to the journal's folder, so that a chain that is moved as a whole is still understood. The file is
written in place, through a descriptor, because whoever merges may not have the right to make files in the folder.

Invariants: the valid slot of the higher generation counts, and each is written over the older one, so a torn write
leaves the one before. A journal with nothing in its slots is of a merge that has changed nothing yet. Where to go on is
believed only while both files are those that the journal knows; otherwise the merge starts anew.

Durability: `begin` returns when the mark is durable, and must be called before the first change; `note` is to be called
when what it says is durable; after `finish` the lower layer is whole, whether or not the file is ever removed.
"""

from __future__ import annotations

import json
import os
import shlex
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from mullion.base.errors import ConflictError
from mullion.base.files import sync_folder
from mullion.base.units import SECTOR_BYTES
from mullion.vhd.errors import DiskBusyError, HalfMergedError, VhdDamagedError
from mullion.vhd.fileio import FileIO
from mullion.vhd.image import Image, open_file
from mullion.vhd.journal_fields import read_id, read_path
from mullion.vhd.locking import is_locked_for_merge
from mullion.vhd.parents import real_path, shown
from mullion.vhd.publish import hidden_beside

_SUFFIX: Final = ".mullion-merging"
_SLOT: Final = struct.Struct("<8sQI4xQQQQQII")
_SEAL: Final = struct.Struct("<I")
_MAGIC: Final = b"MULMERG1"
_COPYING: Final = 1
_DONE: Final = 2
_TEXT_OFFSET: Final = 2 * SECTOR_BYTES
_TEXT_LIMIT: Final = 64 * 1024


@dataclass(frozen=True, slots=True)
class Mark:
    """What a journal says."""

    path: str
    """Of the journal."""
    upper_path: str
    upper_id: bytes
    lower_id: bytes
    is_done: bool
    """Does the lower layer hold everything, so that it is a disk of its own again?"""
    done_bytes: int
    files: tuple[int, int, int, int]
    """Upper inode, length and time of change, lower inode: the files that `done_bytes` is about."""
    generation: int
    text: bytes
    """The JSON as it is in the file."""


def layer_journal_path(lower_path: str) -> str:
    """Where the journal of a merge into that file is: beside what it really is."""
    return hidden_beside(os.path.realpath(lower_path), _SUFFIX)


def read_mark(path: str) -> Mark | None:
    """What the journal of that path says; None when there is none, or it is of a merge that has changed nothing.

    Raises: VhdDamagedError when it cannot be understood; NotVhdError when it is not a regular file; OSError.
    """
    if not os.path.lexists(path):
        return None
    fd = open_file(path, follow=False)
    try:
        return _read(fd, path)
    finally:
        os.close(fd)


def check_whole(image: Image, child: Image | None) -> None:
    """May this file be read as the parent of `child`, or, when that is None, as a disk of its own?

    Raises: DiskBusyError while something is merged into it; HalfMergedError when that was interrupted;
    VhdDamagedError for a journal that cannot be understood.
    """
    mark = read_mark(hidden_beside(real_path(image.fd), _SUFFIX))
    if mark is None or mark.is_done or mark.lower_id != image.footer.unique_id:
        return
    if child is not None and child.footer.unique_id == mark.upper_id:
        return
    if is_locked_for_merge(image.fd):
        raise DiskBusyError(
            f"{shown(mark.upper_path)} is being merged into {image.path}, which until then is a mixture of both",
            remedy="Wait until the merge is done, or open the disk through the layer that is merged.",
            path=image.path,
            holder="a merge",
        )
    raise HalfMergedError(
        f"{image.path} is a mixture: a merge of {shown(mark.upper_path)} into it was begun and is not finished",
        path=image.path,
        structure="merge journal",
        remedy=(
            f"Open it through {shown(mark.upper_path)}, which reads right; or finish the merge: "
            f"{_command(mark.upper_path, image.path)}"
        ),
    )


def check_marks(images: Sequence[Image]) -> None:
    """May this chain, top first, be read? Raises: as `check_whole`."""
    for number, image in enumerate(images):
        check_whole(image, images[number - 1] if number else None)


def forget_layer_merge(lower_path: str, file_io: FileIO) -> None:
    """Remove the journal of a merge that is finished, or of a file that is gone; durable when this returns.

    Raises: ConflictError when the merge is not finished and the file is there; OSError.
    """
    path = layer_journal_path(lower_path)
    mark = read_mark(path)
    if mark is not None and not mark.is_done and os.path.exists(lower_path):
        raise ConflictError(
            f"{path}: the merge into {lower_path} is not finished",
            remedy=f"Finish it: {_command(mark.upper_path, lower_path)}",
            path=path,
        )
    remove_journal(path, file_io)


def remove_journal(path: str, file_io: FileIO) -> None:
    """Remove a journal, where there is one, because its file is known to be whole or gone. Raises: OSError."""
    if os.path.lexists(path):
        file_io.remove_file(path)
        file_io.sync_folder(os.path.dirname(path))


def open_layer_journal(lower_path: str) -> int:
    """A descriptor of the journal, which is made when it is not there: empty, and its name durable. Raises: OSError.

    Everybody may read it: a provider, which serves the chain without any rights, has to know of the merge.
    """
    path = layer_journal_path(lower_path)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o644)
    try:
        sync_folder(os.path.dirname(path))
    except BaseException:
        os.close(fd)
        raise
    return fd


class LayerJournal:
    """The journal of the merge that runs, open for writing. The descriptor stays the caller's."""

    def __init__(self, fd: int, path: str, file_io: FileIO) -> None:
        self._fd = fd
        self._path = path
        self._io = file_io
        self._generation = 0
        self._files = (0, 0, 0, 0)
        self._text = b""

    def begin(self, upper: Image, lower: Image) -> int:
        """Mark the lower layer, durable when this returns; from which byte of the disk on there is something to do.

        Raises: ConflictError when the merge of another layer into it is not finished; VhdDamagedError; OSError.
        """
        mark = _read(self._fd, self._path)
        self._files = _identify(upper, lower)
        relative = os.path.relpath(real_path(upper.fd), os.path.dirname(self._path))
        done = 0
        if mark is not None and not mark.is_done and mark.lower_id == lower.footer.unique_id:
            if mark.upper_id != upper.footer.unique_id:
                raise ConflictError(
                    f"{lower.path}: the merge of {shown(mark.upper_path)} into it was begun and must be finished first",
                    remedy=f"Finish it: {_command(mark.upper_path, lower.path)}",
                    path=lower.path,
                )
            done = mark.done_bytes if mark.files == self._files else 0
            self._generation = mark.generation
            self._text = mark.text
        else:
            newest = _newest(self._fd)
            self._generation = newest[1] if newest is not None else 0
            self._text = json.dumps(
                {
                    "upper": {"path": relative, "id": upper.footer.unique_id.hex()},
                    "lower": {"id": lower.footer.unique_id.hex()},
                }
            ).encode()
            self._io.write_all(self._fd, [self._text], _TEXT_OFFSET)
            self._io.sync_file(self._fd)
        for _ in range(2):  # into both slots, so that one of them going bad does not take the mark away
            self._put(_COPYING, done)
        return done

    def note(self, done_bytes: int) -> None:
        """The disk is durable in the lower layer up to there. Raises: OSError."""
        self._put(_COPYING, done_bytes)

    def finish(self, size_bytes: int) -> None:
        """The lower layer is whole. Raises: OSError."""
        self._put(_DONE, size_bytes)

    def _put(self, state: int, done_bytes: int) -> None:
        self._generation += 1
        body = _SLOT.pack(
            _MAGIC,
            self._generation,
            state,
            done_bytes,
            *self._files,
            len(self._text),
            zlib.crc32(self._text),
        )
        raw = (body + _SEAL.pack(zlib.crc32(body))).ljust(SECTOR_BYTES, b"\0")
        self._io.write_all(self._fd, [raw], self._generation % 2 * SECTOR_BYTES)
        self._io.sync_file(self._fd)


def _identify(upper: Image, lower: Image) -> tuple[int, int, int, int]:
    status = os.fstat(upper.fd)
    return status.st_ino, status.st_size, status.st_mtime_ns, os.fstat(lower.fd).st_ino


def _newest(fd: int) -> tuple[bytes, int, int, int, int, int, int, int, int, int] | None:
    """The fields of the slot that counts."""
    found = []
    for at in (0, SECTOR_BYTES):
        raw = os.pread(fd, _SLOT.size + _SEAL.size, at)
        if len(raw) == _SLOT.size + _SEAL.size and raw[:8] == _MAGIC:
            body = raw[: _SLOT.size]
            if _SEAL.unpack(raw[_SLOT.size :])[0] == zlib.crc32(body):
                found.append(_SLOT.unpack(body))
    return max(found, key=lambda fields: fields[1], default=None)


def _read(fd: int, path: str) -> Mark | None:
    slot = _newest(fd)
    if slot is None:
        if any(os.pread(fd, _TEXT_OFFSET, 0)):
            raise _refused(path, "neither of its slots is whole")
        return None
    _, generation, state, done_bytes, *files, length, seal = slot
    text = os.pread(fd, length, _TEXT_OFFSET) if length <= _TEXT_LIMIT else b""
    if zlib.crc32(text) != seal or len(text) != length:
        if state == _DONE:  # of an earlier merge; the next one had only begun to write its text
            return None
        raise _refused(path, "its text is not the one that was written")
    try:
        fields = json.loads(text)
        upper = read_path(fields["upper"]["path"], os.path.dirname(path))
        upper_id, lower_id = read_id(fields["upper"]["id"]), read_id(fields["lower"]["id"])
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise _refused(path, f"it lacks something: {error}") from error
    if state not in (_COPYING, _DONE):
        raise _refused(path, f"state {state} is not known")
    inode, length, changed_ns, lower_inode = files
    return Mark(
        path,
        upper,
        upper_id,
        lower_id,
        state == _DONE,
        done_bytes,
        (inode, length, changed_ns, lower_inode),
        generation,
        text,
    )


def _command(upper_path: str, lower_path: str) -> str:
    """What finishes a merge; where other disks lie on the upper layer, the refusal names the right one."""
    return f"mullion vhd merge {shlex.quote(shown(upper_path))} --into {shlex.quote(lower_path)}"


def _refused(path: str, why: str) -> VhdDamagedError:
    return VhdDamagedError(
        f"{path}: this journal of a merge cannot be understood: {why}",
        path=path,
        structure="merge journal",
        remedy=(
            "Open the disk through the layer above this one, which reads right. Only when you know that the merge was "
            f"finished, or changed nothing: remove {path}"
        ),
    )
