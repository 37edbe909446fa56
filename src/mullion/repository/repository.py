"""A backup repository: made, opened, listed, read.

Objects: `config` and `keys/…` (see `keys`), `packs/…` (`pack`), `index/…` (`index`), `backups/…` (`manifest`),
`leases/…` (`lease`). Any number of processes may read and back up at the same time.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
import uuid
from collections.abc import Collection, Sequence
from types import TracebackType
from typing import Final, Self

from mullion.base.errors import MullionError, NotFoundError
from mullion.repository import sealing
from mullion.repository.backend import Backend, ObjectMissingError, is_name
from mullion.repository.chunks import CACHE_BYTES, ChunkReader
from mullion.repository.directories import unindexed_packs
from mullion.repository.disk import BackupDisk
from mullion.repository.errors import (
    RepositoryDamagedError,
    RepositoryExistsError,
    RepositoryMissingError,
)
from mullion.repository.index import Index, Segment
from mullion.repository.index_cache import IndexCache
from mullion.repository.keys import SCRYPT_LOG2_N, SECRET_BYTES, SMALL_OBJECT_BYTES, Config, Keys
from mullion.repository.lease import Lease
from mullion.repository.manifest import FOLDER, Manifest, Stored, decode, is_backup_id, manifest_name
from mullion.repository.slots import KEYS_FOLDER, passphrase_bytes, put_slot, slot_names, unlock

log = logging.getLogger(__name__)

_INDEX_FOLDER: Final = "index"
_LIST_TRIES: Final = 5


class Repository:
    """An open repository; a context manager. Its methods may be called from several threads.

    The backend becomes the repository's, which closes it.
    """

    def __init__(self, backend: Backend, config: Config, keys: Keys, index_cache: IndexCache | None = None) -> None:
        """Use `create` or `open`."""
        self.backend = backend
        self.config = config
        self.keys = keys
        self.index_cache = index_cache
        self._index: Index | None = None

    @classmethod
    def create(cls, backend: Backend, passphrase: str, *, scrypt_log2_n: int = SCRYPT_LOG2_N) -> Self:
        """Make a repository in an empty place.

        Raises: RepositoryExistsError when anything is there; InvalidError for an empty passphrase; what the storage
        raises.
        """
        secret = os.urandom(SECRET_BYTES)
        keys = Keys.of(secret)
        config = Config(uuid.uuid4().bytes, time.time_ns())
        passphrase_bytes(passphrase)
        found = [listed.name for listed in backend.list("")]
        if not all(name.startswith(f"{KEYS_FOLDER}/") and is_name(name) for name in found):
            raise RepositoryExistsError(f"{backend.location} is not empty", repository=backend.location)
        for name in found:  # of a `create` that died: `config` is put last, and makes it a repository
            backend.delete(name)
        put_slot(backend, config, secret, passphrase, scrypt_log2_n)
        backend.put(Config.NAME, [config.pack(keys)])
        return cls(backend, config, keys)

    @classmethod
    def open(cls, backend: Backend, passphrase: str, *, index_cache: IndexCache | None = None) -> Self:
        """Open a repository that is there; with a cache its index is not fetched again each time.

        Raises: RepositoryMissingError; WrongKeyError; RepositoryDamagedError; what the storage raises.
        """
        location = backend.location
        try:
            found = backend.get(Config.NAME, 0, SMALL_OBJECT_BYTES)
        except ObjectMissingError as error:
            raise RepositoryMissingError(f"{location} is no repository", repository=location) from error
        config = Config.unpack(found, location)
        keys = Keys.of(unlock(backend, config, passphrase))
        config.check(found, keys, location)
        return cls(backend, config, keys, index_cache)

    @property
    def location(self) -> str:
        return self.backend.location

    def is_there(self) -> bool:
        """Whether the storage has this repository still: its folder may have been unmounted, or its server be gone."""
        try:
            found = self.backend.get(Config.NAME, 0, SMALL_OBJECT_BYTES)
            return Config.unpack(found, self.location).repository_id == self.config.repository_id
        except MullionError:
            return False

    def close(self) -> None:
        self.backend.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # ------------------------------------------------------------------ keys

    def add_passphrase(self, passphrase: str, *, scrypt_log2_n: int = SCRYPT_LOG2_N) -> tuple[str, ...]:
        """Let another passphrase open it too, durably; the slots that were there before, for `remove_slots`.

        Raises: InvalidError; RepositoryDamagedError when the storage does not give back the slot; what it raises.
        """
        before = slot_names(self.backend)
        name = put_slot(self.backend, self.config, self.keys.secret, passphrase, scrypt_log2_n)
        self._check_slot(passphrase, {name})
        return before

    def remove_slots(self, names: Collection[str], passphrase: str) -> None:
        """Let what `add_passphrase` found open it no more, durably; `passphrase` opens what stays.

        Raises: WrongKeyError, RepositoryDamagedError when it does not: then all stay; what the storage raises.
        """
        self._check_slot(passphrase, set(slot_names(self.backend)) - set(names))
        for name in names:
            self.backend.delete(name)
        self.backend.settle(KEYS_FOLDER)

    def _check_slot(self, passphrase: str, among: Collection[str]) -> None:
        if unlock(self.backend, self.config, passphrase, only=among) != self.keys.secret:
            raise RepositoryDamagedError(
                f"{self.location}: the slot of the new passphrase has another secret", repository=self.location
            )

    # ------------------------------------------------------------------ backups

    def backup_ids(self) -> list[str]:
        """The ids of all backups, those of damaged ones too."""
        names = (listed.name.removeprefix(f"{FOLDER}/") for listed in self.backend.list(FOLDER))
        return sorted(filter(is_backup_id, names))

    def backups(self, partition: str | None = None, *, but: Collection[str] = ()) -> list[Manifest]:
        """The manifests, oldest first, `but` those of some ids.

        Raises: RepositoryDamagedError for the first that cannot be read.
        """
        found = []
        for backup_id in self.backup_ids():
            if backup_id not in but:
                with contextlib.suppress(ObjectMissingError):  # pruned since
                    found.append(self.load(backup_id))
        chosen = [manifest for manifest in found if partition in (None, manifest.partition)]
        return sorted(chosen, key=lambda manifest: (manifest.begun_ns, manifest.id))

    def backup(self, text: str) -> Manifest:
        """The manifest of an id, or of its beginning of four digits and more.

        Raises: NotFoundError when none, or more than one, begins so; RepositoryDamagedError.
        """
        if not is_backup_id(text):
            matching = [found for found in self.backup_ids() if len(text) >= 4 and found.startswith(text)]
            if len(matching) != 1:
                count = "no backup" if not matching else f"{len(matching)} backups"
                raise NotFoundError(
                    f"{self.location}: the ids of {count} begin with {text!r}",
                    remedy="List the repository's backups, and give one's id, or as much of it as is unique.",
                    repository=self.location,
                )
            text = matching[0]
        try:
            return self.load(text)
        except ObjectMissingError as error:
            raise NotFoundError(
                f"{self.location}: there is no backup {text}",
                remedy="List the repository's backups.",
                repository=self.location,
            ) from error

    def load(self, backup_id: str) -> Manifest:
        """The manifest of a whole id. Raises: ObjectMissingError; RepositoryDamagedError."""
        name = manifest_name(backup_id)
        payload = sealing.fetch(sealing.Kind.MANIFEST, name, self.backend, self.keys)
        return decode(payload, name, self.location)

    # ------------------------------------------------------------------ content

    def reader(self, cache_bytes: int = CACHE_BYTES) -> ChunkReader:
        """Chunks by id. Raises: RepositoryDamagedError; what the storage raises."""
        return ChunkReader(self.backend, self.keys, self.index(), self.search_packs, cache_bytes)

    def open_disk(self, manifest: Manifest, disk: str, *, cache_bytes: int = CACHE_BYTES) -> BackupDisk:
        """A disk of a backup as a read-only block device. Raises: NotFoundError; RepositoryDamagedError."""
        return BackupDisk(self._stored(manifest.disks, disk, "disk", manifest), self.reader(cache_bytes))

    def open_blob(self, manifest: Manifest, blob: str) -> BackupDisk:
        """A blob of a backup, as a device of its exact size. Raises: NotFoundError; RepositoryDamagedError."""
        return BackupDisk(self._stored(manifest.blobs, blob, "blob", manifest), self.reader())

    def _stored(self, among: dict[str, Stored], name: str, what: str, manifest: Manifest) -> Stored:
        if (stored := among.get(name)) is None:
            raise NotFoundError(
                f"{self.location}: backup {manifest.id} has no {what} {name!r}",
                remedy=f"It has: {', '.join(sorted(among)) or 'none'}.",
                repository=self.location,
            )
        return stored

    def lease(self, purpose: str, *, exclusive: bool = False) -> Lease:
        """Keep others from deleting what is used here, for as long as it is held. Raises: RepositoryBusyError."""
        return Lease(self.backend, self.keys, purpose, exclusive=exclusive)

    # ------------------------------------------------------------------ index

    def index(self) -> Index:
        """The index, read once. Raises: RepositoryDamagedError; what the storage raises."""
        if self._index is None:
            self._index = self.reload_index()
        return self._index

    def reload_index(self) -> Index:
        """Read the index as it is now."""
        self._index = Index(self.segments())
        return self._index

    def search_packs(self) -> Index:
        """Read the index as it is now, and the directories of packs that it does not name: for what was not found."""
        index = self.reload_index()
        for pack_id, entries in unindexed_packs(self.backend, self.keys, index.indexed_packs):
            index.add(pack_id, entries)
        return index

    def segments(self) -> list[Segment]:
        """The index's segments. One that is merged away while we read is looked for again under its new name.

        A damaged one is left out: what it named is found by the packs' directories.
        """
        loaded: dict[str, Segment] = {}
        for _ in range(_LIST_TRIES):
            names = sorted(self.object_names(_INDEX_FOLDER))  # the same copy of a chunk is found by everybody
            damaged: list[RepositoryDamagedError] = []
            loaded = {name: segment for name, segment in loaded.items() if name in names}
            try:
                for name in names:
                    if name not in loaded:
                        try:
                            loaded[name] = self._segment(name)
                        except RepositoryDamagedError as error:
                            damaged.append(error)
            except ObjectMissingError:
                continue
            if self.index_cache is not None:
                self.index_cache.keep(names)
            for damage in damaged:
                log.warning("%s; the packs themselves are searched (`mullion backup repair` makes it again)", damage)
            return list(loaded.values())
        raise RepositoryDamagedError(
            f"{self.location}: parts of the index vanish as fast as they are listed", repository=self.location
        )

    def _segment(self, name: str) -> Segment:
        """A segment, from our copy when that is whole. Raises: RepositoryDamagedError; ObjectMissingError."""
        cache = self.index_cache
        copy = None if cache is None else cache.get(name)
        if cache is not None and copy is not None:
            try:
                return Segment(self._unseal_segment(name, copy), name, self.location)
            except RepositoryDamagedError as error:
                log.warning("the copy in %s is dropped: %s", cache.folder, error)
                cache.drop(name)
        sealed = self.backend.get(name, 0, sealing.OBJECT_LIMIT_BYTES)
        segment = Segment(self._unseal_segment(name, sealed), name, self.location)
        if cache is not None:
            cache.put(name, sealed)
        return segment

    def _unseal_segment(self, name: str, sealed: bytes) -> bytes:
        return sealing.unseal(sealing.Kind.INDEX, name, sealed, self.keys, self.location)

    def object_names(self, folder: str) -> Sequence[str]:
        """The names in a folder that are names of ours at all."""
        return [listed.name for listed in self.backend.list(folder) if is_name(listed.name)]


def mark_name(backup_id: str) -> str:
    """The empty object that says: chunks of this backup are lost, so nothing must be built on it."""
    return f"damaged/{backup_id}"
