"""What the storage refuses, as an error that a person can act on."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from typing import Final

from mullion.base.block import LostDataError
from mullion.base.errors import DeniedError, InvalidError, MullionError, NoSpaceError, OperationFailedError

_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT})
_FORBIDDEN: Final = frozenset({errno.EACCES, errno.EPERM})
_NO_NAME: Final = frozenset({errno.ENAMETOOLONG, errno.ELOOP, errno.EISDIR, errno.ENOTDIR})


def is_full(error: OSError) -> bool:
    """Does the storage have no room, or the user no more of it?"""
    return error.errno in _FULL


def has_lacked_room(error: OSError) -> bool:
    """The same, also where only a sync said so: who does a whole operation again writes again what it lost."""
    cause = error.__cause__
    return is_full(error) or (isinstance(error, LostDataError) and isinstance(cause, OSError) and is_full(cause))


def explained(error: OSError, path: str) -> MullionError:
    """The error for what the system said about a file."""
    reason = error.strerror or str(error)
    if has_lacked_room(error):
        return NoSpaceError(f"{path} cannot be written: {reason}", path=path)
    if error.errno == errno.EFBIG:
        return NoSpaceError(
            f"{path} cannot be written: {reason}",
            path=path,
            remedy="The filesystem, or a limit of this user (`ulimit -f`), does not allow files of that size.",
        )
    if error.errno in _FORBIDDEN:
        return DeniedError(f"{path}: {reason}", path=path)
    if error.errno == errno.EROFS:
        return DeniedError(
            f"{path}: {reason}",
            path=path,
            remedy="Choose a path on another filesystem, or mount this one for writing (`mount -o remount,rw`).",
        )
    if error.errno in _NO_NAME:
        return InvalidError(f"{path}: {reason}", path=path, remedy="Choose another path.")
    return OperationFailedError(
        f"{path}: {reason}", path=path, remedy="Look into the host's log (`dmesg`): its storage reports this."
    )


@contextlib.contextmanager
def storage_explained(path: str) -> Iterator[None]:
    """An OSError of the block becomes a MullionError that names the file; that a pipe's reader left stays as it is."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise explained(error, path) from error
