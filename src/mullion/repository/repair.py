"""Repairing a repository: its index is made again from the packs, and damaged packs are left behind.

After a repair nothing leads to bytes that cannot be read, so the next backup that meets what was lost stores it again:
as long as the index names a damaged chunk, a backup takes it for stored. Order, under an exclusive lease (nobody else
reads or writes), and what an end in between leaves:

1. each pack is read. What is whole in a damaged one, and nowhere else, is copied into new packs, durably. Where a
   pack's own directory is lost, the old index says what is in it; an end leaves chunks that are there twice;
2. the index is put: of whole packs all, of damaged ones that they exist and that nothing of them is used: the same;
3. the old segments are deleted: from here on no damaged pack is used;
4. with `discard`, damaged packs are deleted: nothing that can be read is only in them;
5. everything is followed again from the manifests, and backups that have lost something are marked.

A damaged pack stays without `discard`, until a prune: a copy of it from elsewhere, put into its place, and another
repair bring back all of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from mullion.base.progress import Progress, no_progress
from mullion.repository import sealing
from mullion.repository.backend import ObjectMissingError
from mullion.repository.chunks import id_key_of
from mullion.repository.errors import RepositoryDamagedError
from mullion.repository.index import Index, Segment, build_segment, collect
from mullion.repository.lease import Lease
from mullion.repository.pack import PACK_LIMIT_BYTES, PackEntry, PackKey, open_chunk, pack_id_of, pack_name
from mullion.repository.repository import Repository
from mullion.repository.stream import ChunkWriter, put_segment
from mullion.repository.verify import Finding, Report, scan_packs, verify


@dataclass(slots=True)
class Repair:
    """What a repair found and did, and what is left."""

    found: list[Finding] = field(default_factory=list)
    """What was wrong before."""
    indexed_packs: int = 0
    indexed_chunks: int = 0
    rescued_chunks: int = 0
    """Copied out of damaged packs."""
    lost_chunks: int = 0
    """Known once, and in no pack any more."""
    left: list[str] = field(default_factory=list)
    """Damaged packs that are still there; nothing uses them."""
    discarded: list[str] = field(default_factory=list)
    after: Report = field(default_factory=Report)
    """What a verification that reads no data finds now."""

    @property
    def is_whole(self) -> bool:
        return self.after.is_whole and not self.left


@dataclass(slots=True)
class _Sorted:
    """The packs, as reading them has shown."""

    whole: dict[bytes, list[PackEntry]] = field(default_factory=dict)
    damaged: dict[bytes, list[PackEntry]] = field(default_factory=dict)
    """With what is in them, or was, as far as anybody knows."""
    missing: dict[bytes, list[PackEntry]] = field(default_factory=dict)


def repair(
    repository: Repository, *, read_data: bool = True, discard: bool = False, progress: Progress = no_progress
) -> Repair:
    """Make the index again, durable before the old one goes, and leave damaged packs behind.

    `read_data=False` reads the packs' directories only: enough for a lost index, while damaged chunks stay unseen. What
    an earlier repair has left behind stays so, for nobody looks whether it is whole.
    Raises: RepositoryBusyError while anybody else works on the repository; LeaseLostError; what the storage raises.
    """
    done = Repair()
    backend, keys = repository.backend, repository.keys
    with Lease(backend, keys, "repair", exclusive=True) as lease:
        before = Report()
        old = list(repository.object_names("index"))
        packs = _sort(repository, _known(repository, old, before), before, read_data=read_data, progress=progress)
        done.found = before.findings
        _rescue(repository, packs, done, are_read=read_data, progress=progress)
        lease.check()
        backend.settle("packs")
        # Named with nothing in them, or the next backup would take damaged packs for those of an interrupted one.
        put_segment(backend, keys, build_segment({**packs.whole, **dict.fromkeys(packs.damaged, ())}))
        for name in old:
            backend.delete(name)
        backend.settle("index")
        for name in map(pack_name, packs.damaged):
            if discard:
                backend.delete(name)
            (done.discarded if discard else done.left).append(name)
    index = repository.reload_index()
    done.indexed_packs, done.indexed_chunks = len(index.pack_ids), index.count
    done.after = verify(repository, read_data=False)
    return done


def _known(repository: Repository, names: Iterable[str], report: Report) -> dict[bytes, list[PackEntry]]:
    """What the old index says of packs, as far as it can be read."""
    segments = []
    for name in names:
        try:
            payload = sealing.fetch(sealing.Kind.INDEX, name, repository.backend, repository.keys)
            segments.append(Segment(payload, name, repository.location))
        except (RepositoryDamagedError, ObjectMissingError) as error:
            report.add(error, name)
    return collect(segments)


def _sort(
    repository: Repository,
    known: dict[bytes, list[PackEntry]],
    report: Report,
    *,
    read_data: bool,
    progress: Progress,
) -> _Sorted:
    """Read each pack. Raises: what the storage raises."""
    packs = _Sorted()
    sizes = {listed.name: listed.size_bytes for listed in repository.backend.list("packs")}
    packs_by_name = {name: pack_id for name in sizes if (pack_id := pack_id_of(name)) is not None}
    for name, scanned in scan_packs(
        repository, {name: sizes[name] for name in packs_by_name}, lambda _: read_data, progress
    ):
        pack_id = packs_by_name[name]
        for error in scanned.errors:
            report.add(error, name)
        if scanned.errors:
            packs.damaged[pack_id] = known.get(pack_id, []) if scanned.entries is None else scanned.entries
            continue
        assert scanned.entries is not None
        if not read_data and scanned.entries and known.get(pack_id) == []:
            report.say(name, f"{repository.location}: {name} was left behind by an earlier repair, and is not read now")
            packs.damaged[pack_id] = scanned.entries
        else:
            packs.whole[pack_id] = scanned.entries
    gone = known.keys() - packs.whole.keys() - packs.damaged.keys()
    packs.missing = {pack_id: known[pack_id] for pack_id in gone if known[pack_id]}
    for pack_id in packs.missing:
        report.say(pack_name(pack_id), f"{repository.location}: {pack_name(pack_id)} is missing")
    return packs


def _rescue(repository: Repository, packs: _Sorted, done: Repair, *, are_read: bool, progress: Progress) -> None:
    """Copy what is whole in damaged packs, and nowhere else, into new packs and a segment of their own; durable.

    Where packs were not read, nobody knows whether a copy in one of them is whole: then that does not count.
    """
    stored = Index()
    for pack_id, entries in packs.whole.items():
        stored.add(pack_id, entries)
    writer = ChunkWriter(repository.backend, repository.keys, Index())
    rescued: set[bytes] = set()
    try:
        for number, (pack_id, entries) in enumerate(packs.damaged.items()):
            progress("rescuing", number, len(packs.damaged))
            wanted = [
                entry
                for entry in entries
                if entry.chunk_id not in rescued and not (are_read and entry.chunk_id in stored)
            ]
            for chunk_id, content in _readable(repository, pack_id, wanted):
                if chunk_id not in rescued:
                    writer.add_chunk(chunk_id, content)
                    rescued.add(chunk_id)
        writer.finish()
    finally:
        writer.close()
    gone = {
        entry.chunk_id
        for entries in (*packs.damaged.values(), *packs.missing.values())
        for entry in entries
        if entry.chunk_id not in stored and entry.chunk_id not in rescued
    }
    done.rescued_chunks, done.lost_chunks = len(rescued), len(gone)


def _readable(repository: Repository, pack_id: bytes, entries: Iterable[PackEntry]) -> Iterator[tuple[bytes, bytes]]:
    """Those chunks and nodes of a damaged pack that authenticate."""
    wanted = list(entries)
    if not wanted:
        return
    key = PackKey(pack_id, repository.keys)
    try:
        content = memoryview(repository.backend.get(pack_name(pack_id), 0, PACK_LIMIT_BYTES))
    except ObjectMissingError:
        return
    for entry in wanted:
        stored = content[entry.offset : entry.offset + entry.stored_bytes]
        try:
            chunk = open_chunk(key, entry, stored, id_key_of(entry, repository.keys), repository.location)
        except RepositoryDamagedError:
            continue  # told when the pack was read, or counted as lost
        yield entry.chunk_id, chunk
