"""What the store keeps of backups: the repositories that are known, and where each series of backups stands.

    repositories/NAME              a repository; its passphrase is in a file that only the service reads
    backup-bases/PARTITION/NAME    the last backup of a partition in a repository, and the checkpoint it was made of

The base's checkpoint stays until the next backup: what its child holds is what has changed since.
"""

from __future__ import annotations

import contextlib
import glob
import os
from typing import Final, Self

import msgspec

from mullion.base.files import replace_file

REPOSITORIES: Final = "repositories/"
BASES: Final = "backup-bases/"
MARK: Final = "backup:"
"""Begins the `schedule` of checkpoints that backups made: they come and go with them."""
_UNFINISHED: Final = ".restoring"
_NOTE_LIMIT_BYTES: Final = 64 * 1024


class RepositoryRecord(msgspec.Struct, frozen=True):
    """A repository that backups may go to. `url` is a folder, `sftp://…` or `s3://…`."""

    name: str
    url: str
    added_at: str
    repository_id: str = ""
    """Its own, whatever the place: another repository cannot take its name."""

    @property
    def key(self) -> str:
        return f"{REPOSITORIES}{self.name}"

    def encode(self) -> bytes:
        return msgspec.json.encode(self)

    @classmethod
    def decode(cls, value: bytes) -> Self:
        return msgspec.json.decode(value, type=cls)


class BackupBase(msgspec.Struct, frozen=True):
    """Where the next backup begins."""

    partition: str
    repository: str
    backup: str
    checkpoint: str

    @property
    def key(self) -> str:
        return base_key(self.partition, self.repository)

    def encode(self) -> bytes:
        return msgspec.json.encode(self)

    @classmethod
    def decode(cls, value: bytes) -> Self:
        return msgspec.json.decode(value, type=cls)


def unfinished(path: str) -> str:
    """What a disk that is being restored is called until it is whole."""
    folder, name = os.path.split(path)
    return os.path.join(folder, f".{name}{_UNFINISHED}")


def unfinished_in(folder: str) -> list[str]:
    """Disks that were being restored when the service was killed, and notes of what was made for them."""
    return glob.glob(f"{glob.escape(folder)}/.*{_UNFINISHED}*")


def note_files(disk: str, files: tuple[str, ...]) -> None:
    """Beside a disk of a partition that is being restored, which files are made for it, durably. Raises: OSError.

    Until the partition is there these are nobody's: `give_up`.
    """
    replace_file(unfinished(disk), msgspec.json.encode(files))


def noted_files(path: str) -> tuple[str, ...]:
    """What a file of `unfinished_in` says was being made, all beside it; nothing when it is a part of a disk."""
    with open(path, "rb") as file:
        raw = file.read(_NOTE_LIMIT_BYTES)
    try:
        files = msgspec.json.decode(raw, type=tuple[str, ...])
    except msgspec.MsgspecError:
        return ()
    return tuple(one for one in files if os.path.dirname(one) == os.path.dirname(path))


def give_up(note: str) -> None:
    """Take away what a restore was making, as a file of `unfinished_in` says, and that. Blocking. Raises: OSError."""
    folder, name = os.path.split(note)
    disk = os.path.join(folder, name.removeprefix(".").removesuffix(_UNFINISHED))
    made = noted_files(note)
    if not made and os.path.exists(disk) and os.path.samefile(disk, note):  # it had just got its name
        made = (disk,)
    for path in (*made, note):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


def base_key(partition: str, repository: str) -> str:
    return f"{BASES}{partition}/{repository}"
