"""Manifests: what a backup is. A sealed object `backups/ID`, its payload MessagePack of `Manifest`.

A manifest is put last: all that it refers to is durable by then. Its own content is small, whatever the disks' sizes:
each disk is the root of a tree of chunks (see `tree`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

import msgspec

from mullion.repository.errors import RepositoryDamagedError
from mullion.repository.keys import ID_BYTES
from mullion.repository.tree import SIZE_LIMIT_BYTES, Tree

FOLDER: Final = "backups"
ENTRIES_LIMIT: Final = 1024
_BACKUP_ID: Final = re.compile(r"[0-9a-f]{16}")


class Stored(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """A disk, or another piece of content."""

    root: bytes
    size_bytes: int
    data_bytes: int
    """How much of it is stored, in this backup and those before; zeros and holes are not."""
    read_bytes: int
    """How much was read for this backup."""
    new_bytes: int
    """How much this backup added to the repository, compressed."""
    notes: dict[str, str] = {}
    """What the caller wants to find again: the VHD's unique id, the checkpoint's name, how a blob is to be read."""

    @property
    def tree(self) -> Tree:
        return Tree(self.root, self.size_bytes)


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A backup. Sizes in bytes, times in nanoseconds since 1970."""

    id: str
    partition: str
    """Name of the partition; backups of one name are one series for retention."""
    partition_id: str = ""
    begun_ns: int
    ended_ns: int
    base: str = ""
    """Id of the backup whose unchanged chunks were taken over; the backup is whole without it all the same."""
    host: str = ""
    definition: str = ""
    """The partition's definition, as text."""
    disks: dict[str, Stored]
    blobs: dict[str, Stored] = {}
    """Firmware variables, TPM state, saved memory: by names that the caller chooses."""
    notes: dict[str, str] = {}

    @property
    def size_bytes(self) -> int:
        """What the disks promise the guest."""
        return sum(disk.size_bytes for disk in self.disks.values())

    @property
    def new_bytes(self) -> int:
        """What this backup added to the repository."""
        return sum(stored.new_bytes for stored in (*self.disks.values(), *self.blobs.values()))

    @property
    def contents(self) -> Mapping[str, Stored]:
        """Disks and blobs, by names that say which."""
        return {f"disk {name}": stored for name, stored in self.disks.items()} | {
            f"blob {name}": stored for name, stored in self.blobs.items()
        }


def is_backup_id(text: str) -> bool:
    return _BACKUP_ID.fullmatch(text) is not None


def manifest_name(backup_id: str) -> str:
    return f"{FOLDER}/{backup_id}"


def encode(manifest: Manifest) -> bytes:
    return msgspec.msgpack.encode(manifest)


def decode(payload: bytes, name: str, location: str) -> Manifest:
    """Raises: RepositoryDamagedError when it is no manifest, or says what cannot be."""
    try:
        manifest = msgspec.msgpack.decode(payload, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _damaged(location, name, str(error)) from error
    if manifest_name(manifest.id) != name:
        raise _damaged(location, name, "it belongs to another name")
    if len(manifest.disks) + len(manifest.blobs) > ENTRIES_LIMIT:
        raise _damaged(location, name, f"it has more than {ENTRIES_LIMIT} disks and blobs")
    for what, stored in manifest.contents.items():
        if len(stored.root) != ID_BYTES or not 0 <= stored.size_bytes <= SIZE_LIMIT_BYTES:
            raise _damaged(location, name, f"{what} cannot be of this size, or has no root")
    return manifest


def _damaged(location: str, name: str, why: str) -> RepositoryDamagedError:
    return RepositoryDamagedError(f"{location}: {name} is damaged: {why}", repository=location, name=name)
