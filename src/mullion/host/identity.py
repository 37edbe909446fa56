"""User ids of partitions: each QEMU and its provider run under a number of their own, so that one cannot touch another.

Numbers come from 30000 to 59999: Debian's range for users (policy 9.2.2: 1000 to 59999), far above what adduser hands
out, below the globally allocated ones (60000 and up) and the sub-ids of containers (100000 and up). They need no entry
in /etc/passwd; the group has the same number. The caller keeps the choice with the partition: files on disk belong
to it. Only root can do this; without it all runs under our own user.

Who owns what:

    run/p/NAME      root:gid 0750     sockets, identities, exit status: QEMU cannot write, so it cannot forge them
    data/…/NAME     root:gid 0750     logs; the console log and the firmware's variables belong to uid
    the folders above                 0711: passable, not readable
"""

from __future__ import annotations

import os
import pwd
from collections.abc import Collection
from typing import Final

from mullion.base.errors import ConflictError
from mullion.base.paths import HostPaths, PartitionPaths

FIRST_UID: Final = 30_000
LAST_UID: Final = 59_999


def isolates(isolation: str) -> bool:
    """Whether partitions get users of their own: setting `isolation` says auto, and we are root."""
    return isolation == "auto" and os.geteuid() == 0


def allocate_uid(taken: Collection[int], first: int = FIRST_UID, last: int = LAST_UID) -> int:
    """The lowest number that no partition and no account of the host has.

    Raises: ConflictError when none is left.
    """
    accounts = {entry.pw_uid for entry in pwd.getpwall()}
    for uid in range(first, last + 1):
        if uid not in taken and uid not in accounts:
            return uid
    raise ConflictError(
        f"all user ids from {first} to {last} are taken", remedy="Delete partitions that are not needed any more."
    )


def prepare_host_folders(paths: HostPaths, *, isolated: bool) -> None:
    """Make the service's folders. Isolated: others may pass through them, not look."""
    mode = 0o711 if isolated else 0o750
    for folder in (
        paths.data_dir,
        paths.run_dir,
        f"{paths.data_dir}/partitions",
        f"{paths.run_dir}/p",
    ):
        make_folder(folder, mode)
    for folder in (paths.disks, paths.images):
        if not os.path.isdir(folder):  # an administrator may have put a link to other storage here
            make_folder(folder, mode)


def prepare_partition_folders(paths: PartitionPaths, run_as: tuple[int, int] | None) -> None:
    """Make a partition's folders; with `run_as` its group may pass and look, and write into `pending` only."""
    for folder in (paths.data, paths.run):
        make_folder(folder, 0o750, group=None if run_as is None else run_as[1])
    make_folder(paths.pending_dir, 0o750, owner=run_as)


def make_folder(path: str, mode: int, *, owner: tuple[int, int] | None = None, group: int | None = None) -> None:
    """Make a folder, or give an existing one this mode and owner. Raises: OSError."""
    os.makedirs(path, mode=mode, exist_ok=True)
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if owner is not None:
            os.fchown(fd, *owner)
        elif group is not None:
            os.fchown(fd, 0, group)
        os.fchmod(fd, mode)
    finally:
        os.close(fd)
