"""Files and folders out of a disk, onto the host: whole under their name, or not there.

Everything that the disk says is hostile: names are checked one by one, folders are new ones of ours, links are made
after everything else (so nothing is ever written through one), devices and sockets are left out.

Durability: a file is made by `new_file`; a folder is filled under a hidden name beside the target, synced with its
filesystem, and renamed. A crash may leave that hidden folder, never a part of a tree under its final name.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import tempfile
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from typing import Final, Protocol

from mullion.base.errors import AlreadyExistsError, InvalidError
from mullion.base.files import sync_folder
from mullion.base.progress import Progress, no_progress
from mullion.media.errors import FilesystemError
from mullion.media.filesystems.entries import FileEntry, Hole, Piece
from mullion.vhd.publish import new_file

_NAME_LIMIT_BYTES: Final = 255
_SPARSE_STEP_BYTES: Final = 64 << 10
_ZEROS: Final = bytes(_SPARSE_STEP_BYTES)


class TreeSource(Protocol):
    """Whatever gives the files of a volume: the reader of one, or a service that reads it elsewhere."""

    def tree(self, path: str) -> Generator[Piece, None, None]:
        """Everything from a path on: each entry, followed by its bytes when it is a file that can be read."""
        ...


@dataclass(slots=True)
class Extracted:
    """What was taken out, and what was left out and why."""

    files: int = 0
    folders: int = 0
    links: int = 0
    content_bytes: int = 0
    begun_bytes: int = 0
    """Of the files that were begun, as far as their folders say."""
    left_out: list[str] = field(default_factory=list)


def extract(
    reader: TreeSource,
    path: str,
    target: str,
    *,
    force: bool = False,
    links: bool = False,
    skip: bool = False,
    progress: Progress = no_progress,
) -> Extracted:
    """Take a file, a stream (`file:stream`) or a whole folder out of a volume, to that name.

    `force` takes the place of an existing file, never of a folder; `links` makes symbolic links, which are left out
    otherwise; `skip` leaves out what cannot be read, which otherwise ends the work with nothing made.
    Raises: AlreadyExistsError; NotFoundError; FilesystemError; InvalidError; OSError.
    """
    if os.path.lexists(target) and not (force and os.path.isfile(target)):
        remedy = "Choose another name, or --force." if os.path.isfile(target) else "Choose another name."
        raise AlreadyExistsError(f"{target} exists already", remedy=remedy, path=target)
    answer = reader.tree(path)
    try:
        first = next(answer)
        assert isinstance(first, FileEntry)
        work = _Work(path, Extracted(), links=links, skip=skip, progress=progress)
        if first.type == "folder":
            _extract_folder(work, answer, first, target)
        elif first.type == "file":
            _extract_file(work, answer, first, target, force=force)
        else:
            what = "a link" if first.type == "link" else "a device or socket"
            raise InvalidError(f"{path} is {what}", remedy="Name a file or a folder; `ls -l` shows which is which.")
        return work.done
    finally:
        answer.close()


@dataclass(slots=True)
class _Work:
    path: str
    done: Extracted
    links: bool
    skip: bool
    progress: Progress

    def leave_out(self, entry: FileEntry, why: str) -> None:
        """Note what is left out. Raises: FilesystemError when nothing may be."""
        where = f"{self.path.rstrip('/')}/{entry.path}" if entry.path else self.path
        text = f"{_shown(where)}: {why}"
        if not self.skip:
            raise FilesystemError(text, remedy="Leave out what cannot be read: --skip.")
        self.done.left_out.append(text)


def _extract_file(work: _Work, answer: Iterator[Piece], entry: FileEntry, target: str, *, force: bool) -> None:
    if entry.unreadable:
        raise FilesystemError(f"{work.path}: {entry.unreadable}", remedy="Copy it out in Windows, which can read it.")
    work.done.begun_bytes += entry.size_bytes
    with new_file(target, replace=force) as fd:
        following = _fill(work, fd, answer)
        if following is not None:
            raise FilesystemError(f"{work.path}: {following.unreadable or 'its content does not end'}")
        _dress(fd, entry)
    work.done.files += 1


def _fill(work: _Work, fd: int, answer: Iterator[Piece]) -> FileEntry | None:
    """Write the pieces of a file, holes where they are zeros; the entry that follows, or None at the end."""
    at = 0
    following = None
    for item in answer:
        if isinstance(item, FileEntry):
            following = item
            break
        if isinstance(item, Hole):
            at += item.length
            continue
        view = memoryview(item)
        for start in range(0, len(view), _SPARSE_STEP_BYTES):
            part = view[start : start + _SPARSE_STEP_BYTES]
            if part != _ZEROS[: len(part)]:
                _write(fd, part, at + start)
        at += len(view)
        work.done.content_bytes += len(view)
        work.progress("reading", work.done.content_bytes, work.done.begun_bytes)
    os.ftruncate(fd, at)
    return following


def _write(fd: int, part: memoryview, at: int) -> None:
    while part:
        count = os.pwrite(fd, part, at)
        part, at = part[count:], at + count


def _dress(fd: int, entry: FileEntry) -> None:
    """Its times, and its permissions as far as the caller's umask lets them be; never set-user-id."""
    umask = os.umask(0o077)
    os.umask(umask)
    os.fchmod(fd, entry.mode & 0o777 & ~umask | 0o600)
    if entry.modified_ns is not None:
        os.utime(fd, ns=(entry.accessed_ns or entry.modified_ns, entry.modified_ns))


def _extract_folder(work: _Work, answer: Iterator[Piece], first: FileEntry, target: str) -> None:
    target = os.path.normpath(target)
    beside, name = os.path.split(os.path.abspath(target))
    if not os.path.isdir(beside):
        raise InvalidError(f"there is no folder {beside}", remedy="Create it first.", path=beside)
    temporary = tempfile.mkdtemp(prefix=f".{name[:50]}.", dir=beside)
    try:
        root = os.path.join(temporary, "tree")
        os.mkdir(root)
        _fill_folder(work, answer, root, first)
        _sync_filesystem(temporary)
        if os.path.lexists(target):
            raise AlreadyExistsError(f"{target} exists already", remedy="Choose another name.", path=target)
        os.rename(root, target)
        sync_folder(beside)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _fill_folder(work: _Work, answer: Iterator[Piece], root: str, first: FileEntry) -> None:
    folders: dict[str, FileEntry] = {"": first}
    links: list[FileEntry] = []
    item: Piece | None = next(answer, None)
    while item is not None:
        following: Piece | None = None
        if not isinstance(item, FileEntry):  # of a file that was left out
            pass
        elif (why := _objection(item, folders)) is not None:
            work.leave_out(item, why)
        elif item.type == "folder":
            _make_folder(work, root, item, folders)
        elif item.type == "link":
            links.append(item)
        elif item.type == "other":
            work.done.left_out.append(f"{_shown(item.path)}: it is a device, a socket or a pipe")
        elif item.type == "file":
            following = _fill_one(work, answer, root, item)
        item = following if following is not None else next(answer, None)
    if links and not work.links:
        work.done.left_out.append(f"{len(links)} symbolic links, which --links makes")
    for link in links if work.links else ():
        if link.target:
            with _making(work, link):
                os.symlink(link.target, os.path.join(root, link.path))
                work.done.links += 1
    for path, entry in reversed(folders.items()):  # the deepest last made come first: filling one changes its time
        fd = os.open(os.path.join(root, path), os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            os.fchmod(fd, 0o755)
            if entry.modified_ns is not None:
                os.utime(fd, ns=(entry.accessed_ns or entry.modified_ns, entry.modified_ns))
        finally:
            os.close(fd)


def _shown(path: str) -> str:
    """Harmless for a terminal."""
    return "".join(char if char.isprintable() else "?" for char in path)


def _objection(entry: FileEntry, folders: dict[str, FileEntry]) -> str | None:
    """Why an entry cannot be made on the host, where it cannot."""
    above, _, name = entry.path.rpartition("/")
    if name != entry.name or name in ("", ".", "..") or "\0" in name:
        return "its name is none that a file can have here"
    if len(os.fsencode(name)) > _NAME_LIMIT_BYTES:
        return "its name is too long"
    if above not in folders:
        return "the folder that it is in was left out"
    if entry.unreadable:
        return entry.unreadable
    return None


def _fill_one(work: _Work, answer: Iterator[Piece], root: str, entry: FileEntry) -> FileEntry | None:
    """One file of a tree; the entry that follows."""
    work.done.begun_bytes += entry.size_bytes
    path = os.path.join(root, entry.path)
    flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = -1
    with _making(work, entry):
        fd = os.open(path, flags, 0o600)
    if fd < 0:
        return None
    try:
        following = _fill(work, fd, answer)
        _dress(fd, entry)
    finally:
        os.close(fd)
    if following is not None and following.path == entry.path and following.unreadable:
        os.unlink(path)
        work.leave_out(following, following.unreadable)
        return None
    work.done.files += 1
    return following


def _make_folder(work: _Work, root: str, entry: FileEntry, folders: dict[str, FileEntry]) -> None:
    with _making(work, entry):
        os.mkdir(os.path.join(root, entry.path))
        folders[entry.path] = entry
        work.done.folders += 1


@contextlib.contextmanager
def _making(work: _Work, entry: FileEntry) -> Iterator[None]:
    """Make something; a name that is taken or impossible on the host is left out, what else fails is an error."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.EEXIST:
            work.leave_out(entry, "its folder holds two of that name")
        elif error.errno in (errno.ENAMETOOLONG, errno.EINVAL, errno.EILSEQ):
            work.leave_out(entry, f"it cannot be made here: {error.strerror}")
        else:
            raise


def _sync_filesystem(path: str) -> None:
    """syncfs(2): one sync for all files of a tree."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if ctypes.CDLL(None, use_errno=True).syncfs(fd) != 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), path)
    finally:
        os.close(fd)
