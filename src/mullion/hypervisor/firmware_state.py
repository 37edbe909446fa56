"""What firmware keeps of a partition besides its disks: UEFI variables and the TPM's memory, copied and put back.

A copy is a folder with a file for each of the two that there is.

Durability: a copy is made as `FOLDER.new`, synced and renamed: whole or not there. Putting back replaces the variables,
then the TPM's folder, each whole; a crash in between is mended by putting back again, which its caller does until it
has succeeded.

Invariants: what is read and what is removed belongs to QEMU's and the TPM's user and is hostile: no link is followed,
nothing but files of a sane size is taken.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
from typing import Final

from mullion.base.errors import InvalidError, NotFoundError
from mullion.base.files import replace_file, sync_folder
from mullion.base.paths import PartitionPaths
from mullion.base.units import MIB

_VARIABLES: Final = "firmware-vars.fd"
_TPM: Final = "tpm2-00.permall"
"""The name that swtpm gives the permanent state of a TPM 2.0."""
_LIMIT_BYTES: Final = 64 * MIB


def copy_firmware_state(paths: PartitionPaths, folder: str) -> None:
    """Copy what there is into a new folder, durably; the partition is paused or stopped. Blocking.

    Raises: InvalidError when a file is not what it should be; OSError. Nothing is left then.
    """
    unfinished = f"{folder}.new"
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(unfinished)
    os.mkdir(unfinished, 0o700)
    try:
        for name, source in ((_VARIABLES, paths.firmware_vars), (_TPM, f"{paths.tpm_state}/{_TPM}")):
            content = _read(source)
            if content is not None:
                replace_file(f"{unfinished}/{name}", content, mode=0o600)
        sync_folder(unfinished)
        os.rename(unfinished, folder)
    except BaseException:
        shutil.rmtree(unfinished)
        raise
    sync_folder(os.path.dirname(folder))


def restore_firmware_state(paths: PartitionPaths, folder: str, owner: tuple[int, int] | None = None) -> None:
    """Put a copy back, durably; what it does not have is removed. The partition is stopped. Blocking.

    `owner` is the user and group that QEMU and the TPM run as.
    Raises: NotFoundError when there is no such copy; InvalidError; OSError.
    """
    if not os.path.isdir(folder):
        raise NotFoundError(f"there is no copy of the firmware's state in {folder}", path=folder)
    variables, tpm = _read(f"{folder}/{_VARIABLES}"), _read(f"{folder}/{_TPM}")
    if variables is None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(paths.firmware_vars)
    else:
        replace_file(paths.firmware_vars, variables, mode=0o600)
        if owner is not None:
            os.chown(paths.firmware_vars, *owner, follow_symlinks=False)
    _restore_tpm(paths, tpm, owner)
    sync_folder(paths.data)


def _restore_tpm(paths: PartitionPaths, content: bytes | None, owner: tuple[int, int] | None) -> None:
    """A new folder takes the old one's place: in the old one, which is the TPM's own, we write nothing."""
    unfinished = f"{paths.tpm_state}.new"
    for old in (unfinished, *((paths.tpm_state,) if content is None else ())):
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(old)
    if content is None:
        return
    os.mkdir(unfinished, 0o700)
    replace_file(f"{unfinished}/{_TPM}", content, mode=0o600)
    if owner is not None:
        os.chown(f"{unfinished}/{_TPM}", *owner)
        os.chown(unfinished, *owner)
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(paths.tpm_state)
    os.rename(unfinished, paths.tpm_state)


def _read(path: str) -> bytes | None:
    """A file's content; None when it is not there. Raises: InvalidError; OSError."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise _no_file(path) from error
        raise
    with os.fdopen(fd, "rb") as file:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_size > _LIMIT_BYTES:
            raise _no_file(path)
        return file.read(_LIMIT_BYTES)


def _no_file(path: str) -> InvalidError:
    return InvalidError(
        f"{path} is no file of at most {_LIMIT_BYTES // MIB} MiB",
        remedy="Stop the partition and move it away: a new one is made at the next start.",
        path=path,
    )
