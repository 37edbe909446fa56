"""Files that are whole or not there, logs that do not grow for ever, and how many files may be open."""

from __future__ import annotations

import contextlib
import os
from typing import Final

DESCRIPTOR_LIMIT: Final = 65536
LOG_ROTATE_BYTES: Final = 4 * 1024 * 1024


def replace_file(path: str, content: bytes, *, durable: bool = True, mode: int = 0o640) -> None:
    """Write a file so that a crash at any instant leaves the old content or the new one, never a mixture."""
    temporary = f"{path}.new"
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
    try:
        with contextlib.closing(os.fdopen(fd, "wb")) as file:
            file.write(content)
            file.flush()
            if durable:
                os.fsync(fd)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    if durable:
        sync_folder(os.path.dirname(path))


def sync_folder(path: str) -> None:
    """Make names in a folder durable: files that came, went or were renamed; an empty path is the present folder."""
    folder = os.open(path or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def rotate_log(path: str) -> None:
    """Put a log of more than 4 MiB aside as `.1`, in place of the one that is there; for when nobody writes to it."""
    with contextlib.suppress(FileNotFoundError):
        if os.stat(path).st_size > LOG_ROTATE_BYTES:
            os.replace(path, f"{path}.1")


def raise_descriptor_limit() -> None:
    """Let this process, and those it starts, have 65536 open files, or as many as the host allows; 1024 is usual.

    No more than that, because some programs close every descriptor that they might have. For programs that never call
    `select` with descriptors above 1023.
    """
    import resource  # here, so that commands which need no descriptors start without it

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = DESCRIPTOR_LIMIT if hard == resource.RLIM_INFINITY else min(DESCRIPTOR_LIMIT, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
