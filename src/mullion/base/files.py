"""Files that are whole or not there."""

from __future__ import annotations

import contextlib
import os


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
        directory = os.open(os.path.dirname(path) or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
