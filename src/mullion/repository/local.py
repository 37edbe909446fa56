"""A repository in a folder of this host, or of a filesystem that is mounted here.

Durability: an object is written without a name (O_TMPFILE; where that is not supported under a name in `tmp/`), synced,
linked to its name in one step, and its folder is synced. A crash leaves the whole object or none; what it leaves in
`tmp/` is taken away when the repository is opened for the next time and nobody has it locked.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import uuid
from collections.abc import Iterable, Iterator
from typing import Final, Self

from mullion.base.block import Buffer
from mullion.base.files import sync_folder
from mullion.base.units import MIB
from mullion.repository.backend import Listed, ObjectMissingError, is_name
from mullion.repository.errors import (
    TargetDeniedError,
    TargetFaultError,
    TargetFullError,
    TargetUnreachableError,
)

PACK_BYTES: Final = 16 * MIB
"""Two are in memory, and fresh memory is dear: clearing it costs more than encrypting into it."""
_DIRECT_BYTES: Final = MIB
_ALIGNMENT_BYTES: Final = 4096
"""In the file and in memory: no storage asks for more; where one does, the page cache is used."""
_NO_TMPFILE: Final = (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL)
_TMP: Final = "tmp"


class FolderBackend:
    """A `Backend` of files below one folder, readable by their owner only."""

    pack_bytes: Final = PACK_BYTES

    def __init__(self, folder: str) -> None:
        self._root = os.path.abspath(folder)
        self._folders: set[str] = set()
        self._sweep()

    @classmethod
    def create(cls, folder: str) -> Self:
        """The folder, made when it is not there; its parent must be. Raises: Target… errors."""
        try:
            with contextlib.suppress(FileExistsError):
                os.mkdir(folder, 0o700)
            sync_folder(os.path.dirname(os.path.abspath(folder)))
        except OSError as error:
            raise _explain(error, f"making {folder}", folder) from error
        return cls(folder)

    @property
    def location(self) -> str:
        return self._root

    def put(self, name: str, buffers: Iterable[Buffer], *, durable: bool = True) -> None:
        path = self._path(name)
        folder = os.path.dirname(path)
        with self._explained("writing", name):
            self._make_folder(folder)
            temporary: str | None = None
            try:
                fd = os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
            except OSError as error:
                if error.errno not in _NO_TMPFILE:
                    raise
                temporary = self._temporary()
                fd = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
                fcntl.flock(fd, fcntl.LOCK_EX)
            try:
                _write_all(fd, buffers)
                if durable:
                    os.fsync(fd)
                self._give_name(fd, temporary, path)
                temporary = None
                if durable:
                    sync_folder(folder)
            finally:
                if temporary is not None:
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(temporary)
                os.close(fd)

    def get(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        with self._explained("reading", name):
            fd = os.open(self._path(name), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                status = os.fstat(fd)
                if not stat.S_ISREG(status.st_mode):
                    raise OSError(errno.EINVAL, "it is not a regular file")
                size = status.st_size
                wanted = max(0, size - offset) if length is None else min(length, max(0, size - offset))
                found = os.pread(fd, wanted, offset)
                while len(found) < wanted:  # the kernel gives at most 2 GiB at once
                    more = os.pread(fd, wanted - len(found), offset + len(found))
                    if not more:
                        break
                    found += more
                return found
            finally:
                os.close(fd)

    def size(self, name: str) -> int | None:
        with self._explained("looking at", name):
            try:
                return os.lstat(self._path(name)).st_size
            except (FileNotFoundError, NotADirectoryError):
                return None

    def list(self, prefix: str) -> Iterator[Listed]:
        top = os.path.join(self._root, prefix) if prefix else self._root
        with self._explained("listing", prefix or "everything"):
            for folder, folders, files in os.walk(top, onerror=_raise_unless_missing):
                if folder == self._root and _TMP in folders:
                    folders.remove(_TMP)
                for file in files:
                    path = os.path.join(folder, file)
                    with contextlib.suppress(FileNotFoundError):  # deleted by somebody since
                        yield Listed(os.path.relpath(path, self._root), os.lstat(path).st_size)

    def delete(self, name: str) -> None:
        with self._explained("deleting", name), contextlib.suppress(FileNotFoundError):
            os.unlink(self._path(name))

    def settle(self, folder: str) -> None:
        with contextlib.suppress(ObjectMissingError), self._explained("making durable what is in", folder):
            sync_folder(self._path(folder))

    def close(self) -> None:
        pass

    def _path(self, name: str) -> str:
        assert is_name(name), name
        return os.path.join(self._root, name)

    def _temporary(self) -> str:
        folder = os.path.join(self._root, _TMP)
        self._make_folder(folder)
        return os.path.join(folder, uuid.uuid4().hex)

    def _give_name(self, fd: int, temporary: str | None, path: str) -> None:
        if temporary is None:
            folder_fd = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:  # a directory descriptor makes Python call linkat(2), and only that follows the link in /proc
                with contextlib.suppress(FileExistsError):
                    os.link(f"/proc/self/fd/{fd}", path, src_dir_fd=folder_fd)
                    return
                temporary = self._temporary()
                os.link(f"/proc/self/fd/{fd}", temporary, src_dir_fd=folder_fd)
            finally:
                os.close(folder_fd)
        os.rename(temporary, path)

    def _make_folder(self, folder: str) -> None:
        """Make a folder below the repository's own, durably, once; the repository's own must be there."""
        if folder in self._folders:
            return
        if folder != self._root:
            parent = os.path.dirname(folder)
            self._make_folder(parent)
            with contextlib.suppress(FileExistsError):
                os.mkdir(folder, 0o700)
            sync_folder(parent)  # in any case: whoever made it may have died before that
        self._folders.add(folder)

    def _sweep(self) -> None:
        """Take away what writers that died have left in `tmp/`; whoever writes there holds a lock on its file."""
        folder = os.path.join(self._root, _TMP)
        try:
            names = os.listdir(folder)
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            return
        for name in names:
            with contextlib.suppress(OSError):
                fd = os.open(os.path.join(folder, name), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    os.unlink(os.path.join(folder, name))
                finally:
                    os.close(fd)

    @contextlib.contextmanager
    def _explained(self, act: str, name: str) -> Iterator[None]:
        """An error of the filesystem as one of ours."""
        try:
            yield
        except (FileNotFoundError, NotADirectoryError) as error:
            if os.path.isdir(self._root):
                raise ObjectMissingError(
                    f"{self._root}: {name} is missing", repository=self._root, object=name
                ) from error
            raise TargetUnreachableError(
                f"{self._root} is not there any more",
                remedy="Mount or connect its storage again, then start again: what was stored already is used.",
                repository=self._root,
            ) from error
        except OSError as error:
            raise _explain(error, f"{act} {self._root}/{name}", self._root) from error


def _explain(error: OSError, what: str, location: str) -> Exception:
    reason = f"{what}: {error.strerror}"
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT:
            return TargetFullError(reason, repository=location)
        case errno.EACCES | errno.EPERM | errno.EROFS:
            return TargetDeniedError(
                reason,
                remedy="Give this user the right to read and write the folder, or mount it for writing.",
                repository=location,
            )
        case errno.ESTALE | errno.ENOTCONN | errno.EHOSTDOWN | errno.EHOSTUNREACH | errno.ENODEV | errno.ENXIO:
            return TargetUnreachableError(reason, repository=location)
        case _:
            return TargetFaultError(reason, repository=location)


def _write_all(fd: int, buffers: Iterable[Buffer]) -> None:
    """Write buffers one after the other, as they come: large ones around the page cache, as far as that goes.

    What is written once is not read soon, and the copy in memory would push out what guests read.
    """
    offset, can_be_direct = 0, True
    for buffer in buffers:
        view = memoryview(buffer).cast("B")
        done = 0
        if can_be_direct and len(view) >= _DIRECT_BYTES and not offset % _ALIGNMENT_BYTES:
            aligned = view[: len(view) // _ALIGNMENT_BYTES * _ALIGNMENT_BYTES]
            done = _write_direct(fd, aligned)
            can_be_direct = done == len(aligned)
        while done < len(view):
            done += os.write(fd, view[done:])
        offset += len(view)


def _write_direct(fd: int, view: memoryview) -> int:
    """Write around the page cache; how many bytes went so. None when the filesystem or the memory is not fit for it."""
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    done = 0
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_DIRECT)
        while done < len(view) and not done % _ALIGNMENT_BYTES:
            done += os.write(fd, view[done:])
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    finally:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags)
    return done


def _raise_unless_missing(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error
