"""Forgetting backups, and giving back the room that nothing uses any more.

Under an exclusive lease: nobody else writes, so what is not reachable from a manifest is not needed. Order, and what an
end in between leaves:

1. manifests of forgotten backups are deleted, durably, whoever began that: chunks that nothing refers to; the next
   prune takes them;
2. live chunks of packs that are mostly waste are copied to new packs, durably: chunks that are there twice;
3. the index of what stays is put: the same;
4. the old segments are deleted, durably: packs that no index names; the next backup takes them up, the next prune sorts
   it out;
5. packs without a live chunk, and those that were copied, are deleted.

A manifest that is kept, or a node of it, that cannot be read ends the prune before step 1: what cannot be followed may
hold anything. A damaged manifest can be forgotten, by its id.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from mullion.base.progress import Progress, no_progress
from mullion.repository.chunks import ChunkReader
from mullion.repository.directories import unindexed_packs
from mullion.repository.errors import RepositoryDamagedError
from mullion.repository.index import Index, build_segment, collect
from mullion.repository.lease import Lease
from mullion.repository.manifest import FOLDER as BACKUPS
from mullion.repository.manifest import Manifest, manifest_name
from mullion.repository.pack import HEADER_BYTES, PackEntry, pack_id_of, pack_name
from mullion.repository.repository import Repository, mark_name
from mullion.repository.stream import ChunkWriter, put_segment
from mullion.repository.tree import ZERO_ID, node_ids, walk_nodes

REPACK_BELOW: Final = 0.6
"""A pack of which less than this share is live is copied."""
_REMEDY: Final = (
    "`mullion backup verify` says which backup that is: forget it by its id (`mullion backup prune BACKUP`), or let "
    "`mullion backup repair` and a full backup (`mullion backup create PARTITION --full`) store again what was lost."
)


@dataclass(frozen=True, slots=True)
class Pruned:
    """What was done, or would be."""

    forgotten: tuple[str, ...]
    kept: int
    packs_deleted: int
    packs_copied: int
    freed_bytes: int
    live_bytes: int


def prune(
    repository: Repository,
    forget: Iterable[str] = (),
    *,
    dry_run: bool = False,
    repack_below: float = REPACK_BELOW,
    progress: Progress = no_progress,
) -> Pruned:
    """Forget backups by their ids, and delete what no backup needs.

    Raises: RepositoryBusyError while somebody backs up or reads; RepositoryDamagedError; what the storage raises.
    """
    forgotten = set(forget)
    with Lease(repository.backend, repository.keys, "prune", exclusive=True) as lease:
        gone = tuple(backup_id for backup_id in repository.backup_ids() if backup_id in forgotten)
        kept = repository.backups(but=forgotten)
        index = repository.reload_index()
        for pack_id, entries in unindexed_packs(repository.backend, repository.keys, index.pack_ids):
            index.add(pack_id, entries)
        live = mark(repository, index, kept, progress)
        plan = _Plan(repository, index, live, repack_below)
        if not dry_run:
            lease.check()
            for backup_id in gone:
                repository.backend.delete(manifest_name(backup_id))
                repository.backend.delete(mark_name(backup_id))
            # Also with none to forget: what a prune forgot that died may come back, and would not find its chunks.
            repository.backend.settle(BACKUPS)
            _sweep(repository, index, plan, lease, progress)
        repository.reload_index()
        return Pruned(
            forgotten=gone,
            kept=len(kept),
            packs_deleted=len(plan.dead),
            packs_copied=len(plan.copied),
            freed_bytes=plan.freed_bytes,
            live_bytes=plan.live_bytes,
        )


Offsets = dict[bytes, dict[int, PackEntry]]
"""Chunks by pack and offset: each that is used, at one place."""


def mark(
    repository: Repository, index: Index, manifests: Iterable[Manifest], progress: Progress = no_progress
) -> Offsets:
    """All chunks and nodes that manifests reach. What several share is looked at once.

    Raises: RepositoryDamagedError when one is not in the index, or a node cannot be read.
    """
    reader = ChunkReader(repository.backend, repository.keys, index, lambda: index)
    live: Offsets = {}
    visited: set[tuple[bytes, int]] = set()

    def use(chunk_id: bytes) -> None:
        place = index.find(chunk_id)
        if place is None:
            raise RepositoryDamagedError(
                f"{repository.location}: chunk {chunk_id.hex()[:16]} is in no pack, and a backup needs it",
                repository=repository.location,
                remedy=_REMEDY,
            )
        live.setdefault(place.pack_id, {})[place.entry.offset] = place.entry

    def enter(node_id: bytes, level: int, _first: int) -> bool:
        if (node_id, level) in visited:
            return False
        visited.add((node_id, level))
        use(node_id)
        return True

    chosen = list(manifests)
    for number, manifest in enumerate(chosen):
        progress("marking", number, len(chosen))
        for stored in manifest.contents.values():
            for _, leaf in walk_nodes(stored.tree, reader.load_node, enter):
                for chunk_id in node_ids(leaf):
                    if chunk_id != ZERO_ID:
                        use(chunk_id)
    return live


class _Plan:
    """Which packs stay, are copied, or go."""

    def __init__(self, repository: Repository, index: Index, live: Offsets, repack_below: float) -> None:
        known = index.pack_ids
        self.stay: dict[bytes, list[PackEntry]] = {}
        self.copied: dict[bytes, list[PackEntry]] = {}
        self.dead: list[bytes] = []
        self.freed_bytes = self.live_bytes = 0
        for listed in repository.backend.list("packs"):
            pack_id = pack_id_of(listed.name)
            if pack_id is None or pack_id not in known:  # not a pack, or one whose directory cannot be read
                continue
            entries = sorted(live.get(pack_id, {}).values(), key=lambda entry: entry.offset)
            used_bytes = sum(entry.stored_bytes for entry in entries)
            self.live_bytes += used_bytes
            if not entries:
                self.dead.append(pack_id)
                self.freed_bytes += listed.size_bytes
            elif used_bytes < repack_below * (listed.size_bytes - HEADER_BYTES):
                self.copied[pack_id] = entries
                self.freed_bytes += listed.size_bytes - used_bytes
            else:
                self.stay[pack_id] = entries
        for pack_id in live.keys() - self.stay.keys() - self.copied.keys():
            raise RepositoryDamagedError(
                f"{repository.location}: {pack_name(pack_id)} is missing, and a backup needs it",
                repository=repository.location,
                name=pack_name(pack_id),
                remedy=_REMEDY,
            )


def _sweep(repository: Repository, index: Index, plan: _Plan, lease: Lease, progress: Progress) -> None:
    if not plan.dead and not plan.copied:
        return
    backend, keys = repository.backend, repository.keys
    old = list(repository.object_names("index"))
    writer = ChunkWriter(backend, keys, Index())
    try:
        _copy(repository, index, plan.copied, writer, progress)
        writer.finish()
    finally:
        writer.close()
    lease.check()
    backend.settle("packs")  # what is to stay, and was left by a backup that died
    put_segment(backend, keys, build_segment(_whole_packs(index, plan.stay)))
    _delete_all(repository, old, "deleting the old index", progress)
    backend.settle("index")  # before what it knows is gone; and what a backup, or a prune that died, took away
    gone = [pack_name(pack_id) for pack_id in (*plan.dead, *plan.copied)]
    _delete_all(repository, gone, "deleting packs", progress)


def _copy(
    repository: Repository,
    index: Index,
    packs: Mapping[bytes, list[PackEntry]],
    writer: ChunkWriter,
    progress: Progress,
) -> None:
    """Store the live chunks of packs again; each is authenticated on the way."""
    reader = ChunkReader(repository.backend, repository.keys, index, lambda: index)
    for number, entries in enumerate(packs.values()):
        progress("copying live chunks", number, len(packs))
        for chunk_id, content in reader.read_any(entry.chunk_id for entry in entries):
            writer.add_chunk(chunk_id, content)


def _whole_packs(index: Index, stay: Mapping[bytes, list[PackEntry]]) -> dict[bytes, list[PackEntry]]:
    """The packs that stay with all of their chunks, also those that are not used now: a later backup may use them."""
    known = index.recent_entries() | collect(index.segments)
    return {pack_id: known[pack_id] for pack_id in stay}


def _delete_all(repository: Repository, names: list[str], stage: str, progress: Progress) -> None:
    for number, name in enumerate(names):
        progress(stage, number, len(names))
        repository.backend.delete(name)
