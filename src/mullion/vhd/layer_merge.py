"""Merging a frozen layer into the frozen layer below it, while others read the chain.

    before   TOP ... UPPER  LOWER ... base        after   the same files; LOWER by itself reads as UPPER did

All that UPPER holds is copied into LOWER (`merge_copy`). Whoever has both open sees nothing of it, because UPPER hides
every sector that changes, and because blocks of LOWER never move: structures that a reader has in memory stay right,
and bits that he finds set meanwhile are of sectors that he looks for in UPPER first. So nobody is stopped, and the
merge may end at any instant and be repeated from any point. Taking UPPER out of the chain is the caller's work.

Locks: both files are locked against writers, and LOWER against every other merge and whoever reads it by itself.

Durability, each step before the next:

    1  the journal beside LOWER: it is a mixture now, to be read through UPPER only (`layer_journal`)
    2  LOWER is mended where its last writer was killed, and grows when UPPER is larger
    3  data, bitmaps, BAT entries, in the order of `top`; now and then the journal notes how far all of it is durable
    4  LOWER ends as a writer leaves it; the journal says that it is whole

A crash leaves a chain that reads as before. The next call goes on where the journal says, or from the start when one
of the files is not the one that it knows.

Not handled: children of LOWER in other folders, which nobody knows; what the pending log of a killed provider holds is
not part of a file.
"""

from __future__ import annotations

import contextlib
import os
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final, Self

from mullion.base.errors import ConflictError, InvalidError, MullionError, NoSpaceError
from mullion.base.progress import Progress, no_progress
from mullion.base.units import MIB, format_size
from mullion.vhd.children import find_children
from mullion.vhd.errors import VhdDamagedError
from mullion.vhd.fileio import SYSTEM, FileIO
from mullion.vhd.image import Image, load_image, open_file
from mullion.vhd.layer_journal import (
    LayerJournal,
    check_whole,
    layer_journal_path,
    open_layer_journal,
)
from mullion.vhd.layout import DiskType
from mullion.vhd.locking import lock_file, lock_for_merge
from mullion.vhd.merge_copy import LowerLayer, UpperLayers, merge_block
from mullion.vhd.pacing import Pace, PacedIO
from mullion.vhd.parents import check_parent
from mullion.vhd.pending import has_session
from mullion.vhd.recovery import end_top, open_top
from mullion.vhd.resize import grow_file
from mullion.vhd.storage import explained, has_lacked_room
from mullion.vhd.top import TopWriter

HOLDER: Final = "a merge"
NOTE_BYTES: Final = 64 * MIB
"""After so much that was copied it is made durable and noted: what a crash has done again, at most."""


@dataclass(slots=True)
class LayerFiles:
    """The files of a merge, opened and locked with the rights of whoever starts it; it needs none afterwards."""

    upper_fd: int
    upper_path: str
    lower_fd: int
    lower_path: str
    journal_fd: int
    direct_fd: int | None
    """LOWER without the page cache, where its file system can do that."""

    @classmethod
    def open(cls, upper_path: str, lower_path: str) -> Self:
        """Nothing of a file's content is looked at here. Raises: NotFoundError, DeniedError, DiskBusyError; OSError."""
        with contextlib.ExitStack() as opened:

            def kept(fd: int) -> int:
                opened.callback(os.close, fd)
                return fd

            upper_fd = kept(open_file(upper_path, follow=False))
            lower_fd = kept(open_file(lower_path, writable=True, follow=False))
            lock_file(upper_fd, upper_path, for_writing=False)
            lock_for_merge(lower_fd, lower_path)
            direct_fd = None
            with contextlib.suppress(OSError):
                direct_fd = kept(os.open(f"/proc/self/fd/{lower_fd}", os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC))
            journal_fd = kept(open_layer_journal(lower_path))
            opened.pop_all()
            return cls(upper_fd, upper_path, lower_fd, lower_path, journal_fd, direct_fd)

    def drop_empty_journal(self) -> None:
        """Nothing was begun: leave no file behind, where we have the right to remove it; it says nothing either way."""
        if os.fstat(self.journal_fd).st_size == 0:
            with contextlib.suppress(OSError):
                os.unlink(layer_journal_path(self.lower_path))

    def close(self) -> None:
        for fd in (self.upper_fd, self.lower_fd, self.journal_fd, self.direct_fd):
            if fd is not None:
                os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()


@dataclass(slots=True)
class LayerMerged:
    """What a merge did."""

    copied_bytes: int = 0
    """In this call."""
    resumed_bytes: int = 0
    """Of the disk, from its start, that an earlier call had merged."""
    notes: list[str] = field(default_factory=list)


def merge_layer(
    files: LayerFiles,
    *,
    pace: Pace | None = None,
    below_bytes: int | None = None,
    progress: Progress = no_progress,
    note_bytes: int = NOTE_BYTES,
    file_io: FileIO = SYSTEM,
) -> LayerMerged:
    """Copy all that the upper layer holds into the lower one; it may be called again after any end.

    `pace` limits and stops it (default: no limit); `below_bytes` is the size of the largest disk below LOWER, which
    must be known only where LOWER is a differencing disk smaller than UPPER. The files stay open and locked.

    `progress` is called after each block of the disk.

    Raises: InvalidError, ConflictError; VhdError for what is wrong with a file, with nothing written; NoSpaceError,
    after which the same call goes on when there is room; StoppedError; DeniedError, OperationFailedError.
    """
    pace = pace or Pace(0)
    upper, lower = load_image(files.upper_fd, files.upper_path), load_image(files.lower_fd, files.lower_path)
    try:
        _check(upper, lower, below_bytes)
    except MullionError:
        files.drop_empty_journal()
        raise
    report = LayerMerged()
    if has_session(upper.fd):
        report.notes.append(
            f"{upper.path}: its last writer did not end cleanly; what it had not flushed may be missing"
        )
    with _storage_explained(lower.path):
        journal = LayerJournal(files.journal_fd, layer_journal_path(files.lower_path), file_io)
        report.resumed_bytes = journal.begin(upper, lower)
        paced = PacedIO(file_io, pace, files.direct_fd)
        writer, said = open_top(lower, pending_path=None, holder=HOLDER, file_io=file_io)
        report.notes.extend(f"{lower.path}: {text}" for text in said)
        if lower.size_bytes < upper.size_bytes:
            grow_file(lower, upper.size_bytes, file_io)
            writer = None if writer is None else TopWriter(lower, file_io)
        copying = _Copying(upper, lower, writer, journal, paced)
        try:
            copying.run(report, progress, note_bytes)
        except (Exception, KeyboardInterrupt) as error:
            # What is not durable after an error of the storage may never be, and no sync says so a second time.
            with contextlib.suppress(OSError):  # what ended it is the one to tell
                copying.end(is_noted=not isinstance(error, OSError))
            raise
        copying.end()
        journal.finish(lower.size_bytes)
    return report


class _Copying:
    """Step 3."""

    def __init__(
        self, upper: Image, lower: Image, writer: TopWriter | None, journal: LayerJournal, paced: PacedIO
    ) -> None:
        self._image = lower
        self._upper = UpperLayers([upper])
        self._writer = writer
        self._lower = LowerLayer(lower, writer, paced)
        self._journal = journal
        self._io = paced
        self._reached = 0

    def run(self, report: LayerMerged, progress: Progress, note_bytes: int) -> None:
        self._reached = report.resumed_bytes
        size_bytes = self._lower.size_bytes
        total = sum(length for _, length in self._upper.blocks(size_bytes))
        done = total - sum(length for _, length in self._upper.blocks(size_bytes, self._reached))
        noted = 0
        progress("copying", done, total)
        for offset, length in self._upper.blocks(size_bytes, self._reached):
            report.copied_bytes += merge_block(self._upper, self._lower, offset, length)
            self._reached = offset + length
            done += length
            progress("copying", done, total)
            if report.copied_bytes - noted >= note_bytes:
                noted = report.copied_bytes
                self._note()
        progress("making durable", total, total)

    def _note(self) -> None:
        self._lower.flush()
        self._journal.note(self._reached)

    def end(self, *, is_noted: bool = True) -> None:
        """Leave LOWER as every writer does, and note how far it is. Raises: OSError."""
        self._lower.close()
        end_top(self._image, self._writer, self._io)
        if is_noted:
            self._journal.note(self._reached)


def _check(upper: Image, lower: Image, below_bytes: int | None) -> None:
    """Refuse what would lose something, or change what another disk reads, before anything is written."""
    check_parent(upper, lower)
    check_whole(upper, None)
    for image in (upper, lower):
        if image.damage:
            raise VhdDamagedError(
                f"{image.path} is damaged, so it is not merged: {'; '.join(image.damage)}",
                path=image.path,
                structure="file",
                remedy=f"Mend it first: mullion vhd repair {shlex.quote(image.path)}",
            )
    is_small = upper.size_bytes > lower.size_bytes and lower.kind is DiskType.DIFFERENCING
    if is_small and (below_bytes is None or below_bytes > lower.size_bytes):
        raise InvalidError(
            f"{lower.path} has {format_size(lower.size_bytes)} and is smaller than the layers above and below it: "
            "growing it would show what lies below",
            remedy=f"Copy the disk instead: mullion vhd flatten {shlex.quote(upper.path)} NEW.vhd",
        )


def check_only_child(upper_path: str, lower_path: str) -> None:
    """Is the upper layer the only child of the lower one, in its folder? Raises: ConflictError; VhdError; OSError."""
    fd = open_file(lower_path)
    try:
        unique_id = load_image(fd, lower_path).footer.unique_id
    finally:
        os.close(fd)
    others = [
        path
        for folder_of in {os.path.dirname(upper_path): upper_path, os.path.dirname(lower_path): lower_path}.values()
        for path in find_children(folder_of, unique_id)
        if not os.path.samefile(path, upper_path)
    ]
    if others:
        raise ConflictError(
            f"{lower_path} is the parent of other disks, which would read another content: {others[0]}",
            remedy="Merge or delete these first, or make them independent with mullion vhd flatten.",
            path=lower_path,
        )


@contextlib.contextmanager
def _storage_explained(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if has_lacked_room(error):
            raise NoSpaceError(
                f"there is no room to merge into {path}: {error.strerror}; nothing was lost, the disk reads as before",
                remedy="Make room on its filesystem, then start the merge again: it goes on.",
                path=path,
            ) from error
        raise explained(error, path) from error
