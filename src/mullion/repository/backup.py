"""Making a backup: disks and blobs into the repository, the manifest last.

    with begin_backup(repository, "web", definition=text, base=last) as backup:
        backup.add_disk("disk0", chain, changed=ranges)
        backup.add_blob("firmware-vars", content)
        manifest = backup.commit()

An end at any instant leaves the repository as it was, and packs that the next backup takes up: it hashes again, and
stores only what is not there.
"""

from __future__ import annotations

import io
import logging
import socket
import time
import uuid
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import BinaryIO, Final, Self

import msgspec

from mullion.base.block import BlockDevice
from mullion.base.errors import InvalidError, StateError
from mullion.base.progress import Progress, no_progress
from mullion.repository import sealing
from mullion.repository.chunks import ChunkReader
from mullion.repository.directories import unindexed_packs
from mullion.repository.errors import LeaseLostError
from mullion.repository.index import build_segment, collect
from mullion.repository.keys import CHUNK_BYTES
from mullion.repository.lease import Lease
from mullion.repository.manifest import FOLDER as BACKUPS
from mullion.repository.manifest import Manifest, Stored, encode, manifest_name
from mullion.repository.repository import Repository, mark_name
from mullion.repository.source import DevicePieces, Range, StreamPieces, changed_runs
from mullion.repository.stream import ChunkWriter, put_segment
from mullion.repository.tree import SIZE_LIMIT_BYTES, TreeBuilder, chunks_of, count_data

log = logging.getLogger(__name__)

SEGMENTS_LIMIT: Final = 16
"""With more segments of the index than this, a backup merges the small ones."""
_SMALL_SEGMENT: Final = 100_000


def begin_backup(
    repository: Repository,
    partition: str,
    *,
    partition_id: str = "",
    definition: str = "",
    base: Manifest | None = None,
    notes: Mapping[str, str] | None = None,
    threads: int | None = None,
) -> BackupWriter:
    """Begin a backup of a partition. Raises: RepositoryBusyError while somebody prunes; what the storage raises."""
    return BackupWriter(
        repository,
        Manifest(
            id=uuid.uuid4().hex[:16],
            partition=partition,
            partition_id=partition_id,
            begun_ns=time.time_ns(),
            ended_ns=0,
            base="" if base is None else base.id,
            host=socket.gethostname(),
            definition=definition,
            disks={},
            notes=dict(notes or {}),
        ),
        base,
        threads,
    )


class BackupWriter:
    """A backup being made; a context manager. One thread at a time."""

    def __init__(self, repository: Repository, manifest: Manifest, base: Manifest | None, threads: int | None) -> None:
        self._repository = repository
        self._manifest = manifest
        self._base = base
        self._disks: dict[str, Stored] = {}
        self._blobs: dict[str, Stored] = {}
        self._is_ended = False
        self._lease = Lease(repository.backend, repository.keys, f"backup of {manifest.partition}")
        try:
            if base is not None:
                repository.backup(base.id)  # under the lease: it cannot be pruned any more
                if repository.backend.size(mark_name(base.id)) is not None:
                    log.warning("%s: backup %s is damaged: everything is read again", repository.location, base.id)
                    self._base = None
                    self._manifest = msgspec.structs.replace(manifest, base="")
            self._index = repository.reload_index()
            self._reader = ChunkReader(repository.backend, repository.keys, self._index, lambda: self._index)
            self._writer = ChunkWriter(
                repository.backend,
                repository.keys,
                self._index,
                threads=threads,
                index_cache=repository.index_cache,
            )
        except BaseException:
            self._lease.release()
            raise
        self._adopt()

    def _adopt(self) -> None:
        try:
            for pack_id, entries in unindexed_packs(
                self._repository.backend, self._repository.keys, self._index.indexed_packs
            ):
                self._writer.adopt(pack_id, entries)
        except BaseException:
            self.abort()
            raise

    @property
    def base(self) -> Manifest | None:
        """The backup that this one builds on; none when the one that was asked for has lost chunks."""
        return self._base

    def add_disk(
        self,
        disk: str,
        device: BlockDevice,
        *,
        changed: Iterable[Range] | None = None,
        notes: Mapping[str, str] | None = None,
        progress: Progress = no_progress,
    ) -> Stored:
        """Store a disk.

        `changed` are the ranges that may differ from the same disk in the base backup; everything else is taken over
        from there, unread. Without it, or when the base has no such disk, all that holds data is read. Holes and zeros
        cost nothing. Raises: what the device raises; RepositoryDamagedError; what the storage raises.
        """
        if device.size_bytes > SIZE_LIMIT_BYTES:
            raise InvalidError(f"{disk} has more than 256 TiB", remedy="A backup's disks may have up to 256 TiB.")
        before = self._base.disks.get(disk) if self._base is not None and changed is not None else None
        if before is None or changed is None:
            runs = [(0, chunks_of(device.size_bytes))]
        else:
            runs = changed_runs([*changed, *_resized(before.size_bytes, device.size_bytes)], device.size_bytes)
        pieces = DevicePieces(device, runs, self._writer.piece_rooms, with_zeros=before is not None, progress=progress)
        builder = TreeBuilder(
            device.size_bytes,
            self._reader.load_node,
            self._writer.store_node,
            None if before is None else before.tree,
        )
        stored = self._store(pieces, builder, before, notes)
        self._disks[disk] = stored
        return stored

    def add_blob(self, blob: str, content: bytes | BinaryIO, *, notes: Mapping[str, str] | None = None) -> Stored:
        """Store a stream of bytes of any length: firmware variables, a TPM's state, saved memory.

        Raises: what the stream raises; what the storage raises.
        """
        new_before = self._writer.new_bytes
        pieces = StreamPieces(io.BytesIO(content) if isinstance(content, bytes) else content)
        ids = [chunk_id for _, some in self._writer.store_all(pieces) for chunk_id in some]
        builder = TreeBuilder(pieces.read_bytes, self._reader.load_node, self._writer.store_node)
        builder.set(0, ids)  # how many levels there are is known only at the end of the stream
        self._blobs[blob] = Stored(
            root=builder.finish().root,
            size_bytes=pieces.read_bytes,
            data_bytes=builder.data_chunks * CHUNK_BYTES,
            read_bytes=pieces.read_bytes,
            new_bytes=self._writer.new_bytes - new_before,
            notes=dict(notes or {}),
        )
        return self._blobs[blob]

    def _store(
        self, pieces: DevicePieces, builder: TreeBuilder, before: Stored | None, notes: Mapping[str, str] | None
    ) -> Stored:
        new_before = self._writer.new_bytes
        for first, chunk_ids in self._writer.store_all(pieces):
            builder.set(first, chunk_ids)
        tree = builder.finish()
        if before is not None and before.size_bytes > tree.size_bytes:
            self._writer.finish()  # counting reads the nodes that were just stored
            data_chunks = count_data(tree, self._reader.load_node)
        else:
            data_chunks = builder.data_chunks + (0 if before is None else before.data_bytes // CHUNK_BYTES)
        return Stored(
            root=tree.root,
            size_bytes=tree.size_bytes,
            data_bytes=data_chunks * CHUNK_BYTES,
            read_bytes=pieces.read_bytes,
            new_bytes=self._writer.new_bytes - new_before,
            notes=dict(notes or {}),
        )

    def commit(self) -> Manifest:
        """Make the backup: everything durable, then the index, then the manifest. Nothing of it exists before.

        Raises: LeaseLostError; InvalidError when it has no disk and no blob; what the storage raises.
        """
        if self._is_ended:
            raise StateError("the backup has ended", state="ended", required="begun")
        if not self._disks and not self._blobs:
            raise InvalidError("a backup of nothing", remedy="Add the partition's disks first.")
        self._writer.finish()
        manifest = msgspec.structs.replace(
            self._manifest, disks=self._disks, blobs=self._blobs, ended_ns=time.time_ns()
        )
        name = manifest_name(manifest.id)
        sealed = sealing.seal(sealing.Kind.MANIFEST, name, encode(manifest), self._repository.keys)
        self._lease.check()
        backend = self._repository.backend
        backend.settle("packs")  # what is used, and was put by a backup that died before its name was durable
        backend.put(name, [sealed])
        try:
            self._lease.check()
        except LeaseLostError:
            backend.delete(name)  # a prune may have taken chunks that it did not see in use
            backend.settle(BACKUPS)
            raise
        self._merge_segments()
        self._end()
        return manifest

    def abort(self) -> None:
        """End without a backup; what was stored stays for the next. May be called again, and after `commit`."""
        if not self._is_ended:
            self._end()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end(error)

    def _end(self, error: BaseException | None = None) -> None:
        if not self._is_ended:
            self._is_ended = True
            self._writer.close()
            self._lease.__exit__(None if error is None else type(error), error, None)

    def _merge_segments(self) -> None:
        """Keep the index from falling into many small segments: one new, durable, before the old ones go."""
        repository = self._repository
        if len(repository.object_names("index")) <= SEGMENTS_LIMIT:
            return
        small = [segment for segment in repository.segments() if segment.count < _SMALL_SEGMENT]
        if len(small) > SEGMENTS_LIMIT:
            payload = build_segment(collect(small))
            put_segment(repository.backend, repository.keys, payload, repository.index_cache)
            for segment in small:
                repository.backend.delete(segment.name)


def _resized(before_bytes: int, now_bytes: int) -> list[Range]:
    """What must be read again because the disk has another size: its new part, and the chunk that the end cuts."""
    if before_bytes == now_bytes:
        return []
    first = min(before_bytes, now_bytes) // CHUNK_BYTES * CHUNK_BYTES
    return [(first, now_bytes - first)]
