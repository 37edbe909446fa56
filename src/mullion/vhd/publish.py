"""A new file: whole under its name, or not there.

Durability: the file is made without a name (O_TMPFILE, or a temporary name where that is not supported), filled,
synced, and only then linked to its name; then the folder is synced. A crash, or an error while it is filled, leaves the
finished file or none; a file that was there keeps its content until the new one takes its place in one step.
"""

from __future__ import annotations

import contextlib
import errno
import os
import uuid
from collections.abc import Iterator
from typing import Final

from mullion.base.errors import AlreadyExistsError, InvalidError, NotFoundError

_NAME_LIMIT: Final = 255
_NO_TMPFILE: Final = (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL)


@contextlib.contextmanager
def new_file(path: str, *, replace: bool = False, durable: bool = True) -> Iterator[int]:
    """A descriptor to fill; the file gets its name when the block ends without an error.

    `replace` takes the place of a file of that name, which is otherwise refused; `durable=False` leaves out the syncs.
    Raises: AlreadyExistsError; NotFoundError when there is no such folder; InvalidError for an empty path; OSError.
    """
    if not path:
        raise InvalidError("an empty path names no file", remedy="Give the path of the new file.")
    if not replace and os.path.lexists(path):
        raise AlreadyExistsError(f"{path} exists already", path=path)
    folder = os.path.dirname(path) or "."
    temporary: str | None = None
    try:
        try:
            fd = os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o660)
        except OSError as error:
            if error.errno not in _NO_TMPFILE or not os.path.isdir(folder):
                raise
            temporary = _beside(path)
            fd = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o660)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotFoundError(f"there is no folder {folder}", remedy="Create it first.", path=folder) from error
    try:
        yield fd
        if durable:
            os.fsync(fd)
        # A directory descriptor makes Python call linkat(2), and only that follows the link in /proc to the file.
        with _opened_folder(folder) as folder_fd:
            source = temporary or f"/proc/self/fd/{fd}"
            if replace:
                if temporary is None:
                    temporary = _beside(path)
                    os.link(source, temporary, src_dir_fd=folder_fd)
                os.rename(temporary, path)
            else:
                os.link(source, path, src_dir_fd=folder_fd)
            if durable:
                os.fsync(folder_fd)
    except FileExistsError as error:
        raise AlreadyExistsError(f"{path} exists already", path=path) from error
    finally:
        os.close(fd)
        if temporary is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)


def hidden_beside(path: str, suffix: str) -> str:
    """The name of a hidden file that belongs to another: `.NAME` and the suffix, in its folder, never too long."""
    folder, name = os.path.split(path)
    room = _NAME_LIMIT - len(suffix) - 1
    return os.path.join(folder, f".{os.fsdecode(os.fsencode(name)[:room])}{suffix}")


def _beside(path: str) -> str:
    """A name in the same folder that nobody has."""
    folder = os.path.dirname(os.path.abspath(path))
    return os.path.join(folder, f".{os.path.basename(path)[:50]}.{uuid.uuid4().hex[:8]}")


@contextlib.contextmanager
def _opened_folder(folder: str) -> Iterator[int]:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)
