"""One disk file opened to have its structures changed, by a command and not under a guest.

It is opened as any writer opens it: locked, mended, in a session of its own, so that no pending log of a writer that
was killed can be replayed over what the command does.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import fields

from mullion.vhd.chain import Chain, open_chain
from mullion.vhd.fileio import FileIO
from mullion.vhd.image import Image, load_image, open_file
from mullion.vhd.locking import lock_file
from mullion.vhd.storage import storage_explained


@contextlib.contextmanager
def open_for_change(
    path: str,
    *,
    holder: str,
    file_io: FileIO,
    with_parents: bool = True,
    allowed_dirs: Sequence[str] | None = None,
) -> Iterator[Chain]:
    """The disk, open for writing until the block ends; `with_parents=False` when only the file itself matters.

    What a differencing disk without its parents reads is not its content. An OSError of the block becomes an error
    that names the file. Raises: what `open_chain` raises; NoSpaceError, DeniedError, OperationFailedError.
    """
    with storage_explained(path), _opened(path, holder, file_io, with_parents, allowed_dirs) as chain:
        yield chain


@contextlib.contextmanager
def _opened(
    path: str, holder: str, file_io: FileIO, with_parents: bool, allowed_dirs: Sequence[str] | None
) -> Iterator[Chain]:
    if with_parents:
        chain = open_chain(path, allowed_dirs=allowed_dirs, holder=holder, file_io=file_io)
    else:
        chain = _open_alone(path, holder=holder, file_io=file_io)
    try:
        yield chain
    except (Exception, KeyboardInterrupt):
        chain.close()
        raise
    except BaseException:
        chain.abandon()
        raise
    chain.close()


def _open_alone(path: str, *, holder: str, file_io: FileIO) -> Chain:
    fd = open_file(path, writable=True)
    try:
        lock_file(fd, path, for_writing=True)
        return Chain([load_image(fd, path)], read_only=False, pending_path=None, holder=holder, file_io=file_io)
    except BaseException:
        os.close(fd)
        raise


def reload(image: Image) -> None:
    """Read the structures of an open file anew, after they were changed.

    Raises: VhdError when they do not hold, which would be a fault of whoever changed them.
    """
    fresh = load_image(image.fd, image.path)
    for field in fields(Image):
        setattr(image, field.name, getattr(fresh, field.name))
