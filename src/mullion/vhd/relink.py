"""A frozen differencing disk put on another parent that holds the same as its old one did, while others read it.

After a merge of layer U into the layer L below it, what lies on U may as well lie on L. A child that is frozen is read
by a provider and perhaps others, so the lock for writing is not to be had; none is needed, since only its header
changes, in one instant (`header_switch`), and whoever has it open has read that already.

Durability: the child names its old parent or the new one after a crash at any instant, and both hold the same.
"""

from __future__ import annotations

import os

from mullion.vhd.errors import DiskBusyError, ParentMismatchError, VhdDamagedError
from mullion.vhd.fileio import SYSTEM, FileIO
from mullion.vhd.image import load_image, open_file
from mullion.vhd.layout import DiskType
from mullion.vhd.locking import is_locked_for_writing
from mullion.vhd.parent_header import set_parent


def relink_frozen(child_path: str, parent_path: str, *, file_io: FileIO = SYSTEM) -> None:
    """Name another parent in a disk that nobody writes. May be repeated.

    Raises: DiskBusyError when somebody writes it; VhdDamagedError when it may not be written; ParentMismatchError when
    it has no parent; NotFoundError; OSError.
    """
    parent_fd = open_file(parent_path)
    try:
        parent_id = load_image(parent_fd, parent_path).footer.unique_id
    finally:
        os.close(parent_fd)
    fd = open_file(child_path, writable=True)
    try:
        if is_locked_for_writing(fd):
            raise DiskBusyError(f"{child_path} is being written: it is not frozen", path=child_path)
        child = load_image(fd, child_path)
        if child.damage:
            raise VhdDamagedError(
                f"{child_path} can only be read: {'; '.join(child.damage)}", path=child_path, structure="file"
            )
        if child.kind is not DiskType.DIFFERENCING or child.header is None:
            raise ParentMismatchError(f"{child_path} is {child.kind.word} and has no parent", path=child_path)
        set_parent(child, parent_path, parent_id, file_io)  # also where it is named already: it may not be durable
    finally:
        os.close(fd)
