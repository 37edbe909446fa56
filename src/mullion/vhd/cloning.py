"""A clone: a disk file of the same kind and content, with an identity of its own.

The file is copied as it is, sharing its room where the filesystem can do that; then it gets another unique id, and a
child's locators are written anew for the place where the clone lies. Its parent is the original's.

Durability: that of `publish`. Nobody knows the file before it is finished, so the order of its changes is free.
"""

from __future__ import annotations

import errno
import fcntl
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from mullion.base.progress import Progress, no_progress
from mullion.base.units import GIB, MIB
from mullion.vhd.chain import open_chain
from mullion.vhd.copying import check_target
from mullion.vhd.errors import VhdDamagedError
from mullion.vhd.fileio import SYSTEM
from mullion.vhd.image import Image, load_image
from mullion.vhd.layout import DiskType
from mullion.vhd.offline import reload
from mullion.vhd.parent_header import set_parent
from mullion.vhd.publish import new_file
from mullion.vhd.storage import storage_explained
from mullion.vhd.zeros import next_data, next_hole

_FICLONE: Final = 0x4004_9409
"""ioctl of file systems that share room between files; linux/fs.h."""
_CANNOT_SHARE: Final = (errno.EOPNOTSUPP, errno.ENOTTY, errno.EINVAL, errno.EXDEV, errno.ENOSYS, errno.EPERM)
_STEP_BYTES: Final = 64 * MIB


@dataclass(frozen=True, slots=True)
class Clone:
    """What was made."""

    unique_id: bytes
    is_shared: bool
    """Does it share its room with the original, until one of them is written?"""


def clone_disk(
    path: str,
    target_path: str,
    *,
    allowed_dirs: Sequence[str] | None = None,
    replace_target: bool = False,
    durable: bool = True,
    progress: Progress = no_progress,
) -> Clone:
    """Clone a disk file; a child keeps its parent, which is looked for and must be there.

    Raises: what `open_chain` raises; VhdDamagedError for a disk that can be read only; AlreadyExistsError,
    InvalidError and DiskBusyError for the target; NoSpaceError.
    """
    with open_chain(path, read_only=True, allowed_dirs=allowed_dirs) as chain:
        source = chain.images[0]
        check_target(target_path, chain.paths, replace=replace_target)
        if source.damage:
            raise VhdDamagedError(
                f"{path} is not cloned as it is damaged: {source.damage[0]}",
                path=path,
                remedy="Repair it first (`mullion vhd repair`), or copy its content (`mullion vhd convert`).",
            )
        with storage_explained(target_path), new_file(target_path, replace=replace_target, durable=durable) as fd:
            is_shared = _share(source.fd, fd)
            if not is_shared:
                _copy(source, fd, progress)
            clone = load_image(fd, target_path)
            _rename(clone)
            if clone.kind is DiskType.DIFFERENCING:
                parent = chain.images[1]
                set_parent(clone, parent.path, parent.footer.unique_id, SYSTEM)
            return Clone(clone.footer.unique_id, is_shared)


def _share(source_fd: int, fd: int) -> bool:
    try:
        fcntl.ioctl(fd, _FICLONE, source_fd)
    except OSError as error:
        if error.errno not in _CANNOT_SHARE:
            raise
        return False
    return True


def _copy(source: Image, fd: int, progress: Progress) -> None:
    """Copy what is no hole; the kernel does it."""
    at, end = 0, source.file_bytes
    SYSTEM.ftruncate(fd, end)
    report_at = 0
    while (at := next_data(source.fd, at, end)) < end:
        stop = min(next_hole(source.fd, at, end), at + _STEP_BYTES)
        SYSTEM.copy_range(source.fd, at, fd, at, stop - at)
        at = stop
        if at >= report_at:
            progress("copying", at, end)
            report_at = at + min(max(end // 200, _STEP_BYTES), GIB)
    progress("copying", end, end)


def _rename(clone: Image) -> None:
    """Give it an id of its own, in both copies of the footer."""
    footer = replace(clone.footer, unique_id=uuid.uuid4().bytes)
    raw = footer.pack()
    SYSTEM.write_all(clone.fd, [raw], clone.footer_offset)
    if clone.header is not None:
        SYSTEM.write_all(clone.fd, [raw], 0)
    reload(clone)
