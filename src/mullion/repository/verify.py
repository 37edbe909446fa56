"""Verifying a repository: every byte of every object is looked at, and every backup followed to its chunks.

Each object is authenticated whole (`config`, key slots, sealed objects) or in parts that leave no gap (packs). The
index is compared with the packs' own directories. A backup is whole when all nodes and chunks that it reaches are in a
pack, unharmed. `repair` mends what can be mended.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Final

import msgspec

from mullion.base.progress import Progress, no_progress
from mullion.repository import sealing
from mullion.repository.backend import ObjectMissingError, is_name
from mullion.repository.chunks import ChunkReader, id_key_of
from mullion.repository.directories import load_directory
from mullion.repository.errors import RepositoryDamagedError
from mullion.repository.index import Index, Segment, collect
from mullion.repository.keys import SMALL_OBJECT_BYTES, Config, KeySlot
from mullion.repository.lease import FOLDER as LEASES
from mullion.repository.lease import Holder, Lease
from mullion.repository.manifest import FOLDER as BACKUPS
from mullion.repository.manifest import is_backup_id
from mullion.repository.pack import (
    HEADER_BYTES,
    MAGIC,
    PACK_LIMIT_BYTES,
    TRAILER,
    PackEntry,
    PackKey,
    directory_bytes,
    open_chunk,
    pack_id_of,
    pack_name,
    read_directory,
)
from mullion.repository.repository import Repository, mark_name
from mullion.repository.tree import ZERO_ID, Tree, node_ids

_THREADS: Final = 2
_FOLDERS: Final = ("packs/", "index/", f"{BACKUPS}/", f"{LEASES}/", "keys/", "damaged/")
_FINDINGS_LIMIT: Final = 10_000
IsRead = Callable[[bytes], bool]
"""Whether all of a pack is read, by its id."""


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is wrong: in which object, where in it, and what."""

    name: str
    offset: int | None
    message: str


@dataclass(slots=True)
class Report:
    """What a verification found."""

    findings: list[Finding] = field(default_factory=list)
    damaged: dict[str, list[str]] = field(default_factory=dict)
    """Backups that cannot be restored whole: their ids, and what of them is hurt."""
    backups: int = 0
    packs: int = 0
    chunks: int = 0
    read_bytes: int = 0
    unindexed: int = 0
    """Packs that no index names: an interrupted backup's, or a part of the index is lost. The next backup uses them."""

    @property
    def is_whole(self) -> bool:
        return not self.findings and not self.damaged

    def add(self, error: RepositoryDamagedError | ObjectMissingError, name: str) -> None:
        """Note an error; of very many only the first ten thousand."""
        if len(self.findings) < _FINDINGS_LIMIT:
            offset = error.offset if isinstance(error, RepositoryDamagedError) else None
            self.findings.append(Finding(name, offset, error.message))

    def say(self, name: str, message: str) -> None:
        if len(self.findings) < _FINDINGS_LIMIT:
            self.findings.append(Finding(name, None, message))


def verify(
    repository: Repository,
    *,
    read_data: bool = True,
    part: tuple[int, int] = (0, 1),
    progress: Progress = no_progress,
) -> Report:
    """Look at everything, and mark backups that have lost something: no backup builds on a marked one.

    `read_data=False` reads directories instead of packs. `part` (number, of how many) reads the data of that share of
    the packs only: one part a day is a scrub. Other processes may back up meanwhile. Raises: RepositoryBusyError while
    somebody prunes; what the storage raises.
    """
    report = Report()
    _check_leases(repository, report)  # first, because whoever takes a lease takes damaged ones away
    with Lease(repository.backend, repository.keys, "verification"):
        names = _check_names(repository, report)
        _check_keys(repository, names, report)
        index = Index(_check_segments(repository, names, report))
        bad = _check_packs(repository, names, index, report, read_data=read_data, part=part, progress=progress)
        _check_backups(repository, names, _Soundness(repository, index, bad), report)
        for backup_id in report.damaged:
            repository.backend.put(mark_name(backup_id), [])
        if read_data and part[1] == 1:  # what was lost may have been stored again since
            for name in names:
                if name.startswith("damaged/") and name.removeprefix("damaged/") not in report.damaged:
                    repository.backend.delete(name)
    return report


def _check_names(repository: Repository, report: Report) -> dict[str, int]:
    """All objects with their sizes; those that are none of ours are told and left out.

    What refers is listed before what it refers to, so that a backup that is made meanwhile does not look incomplete.
    """
    referring = {listed.name for folder in (BACKUPS, "index") for listed in repository.backend.list(folder)}
    names = {}
    for listed in sorted(repository.backend.list("")):
        if listed.name.startswith((f"{BACKUPS}/", "index/")) and listed.name not in referring:
            continue
        is_known = listed.name == Config.NAME or listed.name.startswith(_FOLDERS)
        is_pack = not listed.name.startswith("packs/") or pack_id_of(listed.name) is not None
        is_backup = not listed.name.startswith(f"{BACKUPS}/") or is_backup_id(listed.name.removeprefix(f"{BACKUPS}/"))
        if is_name(listed.name) and is_known and is_pack and is_backup:
            names[listed.name] = listed.size_bytes
        else:
            report.say(listed.name, f"{repository.location}: {listed.name} does not belong into a repository")
    return names


def _check_keys(repository: Repository, names: Iterable[str], report: Report) -> None:
    backend, location = repository.backend, repository.location
    try:
        found = backend.get(Config.NAME, 0, SMALL_OBJECT_BYTES)
        Config.unpack(found, location)
        repository.config.check(found, repository.keys, location)
    except (RepositoryDamagedError, ObjectMissingError) as error:
        report.add(error, Config.NAME)
    for name in names:
        if name.startswith("keys/"):
            try:
                if (
                    KeySlot.unpack(backend.get(name, 0, SMALL_OBJECT_BYTES), location, name).repository_id
                    != repository.config.repository_id
                ):
                    report.say(name, f"{location}: {name} is a key of another repository")
            except ObjectMissingError:
                continue  # the passphrase was changed since: another slot took its place
            except RepositoryDamagedError as error:
                report.add(error, name)


def _check_segments(repository: Repository, names: Iterable[str], report: Report) -> list[Segment]:
    segments = []
    for name in names:
        if name.startswith("index/"):
            try:
                payload = sealing.fetch(sealing.Kind.INDEX, name, repository.backend, repository.keys)
                segment = Segment(payload, name, repository.location)
                segment.check_order()
                for _ in segment.places():
                    pass
            except RepositoryDamagedError as error:
                report.add(error, name)
            except ObjectMissingError:
                continue  # merged into another since: that one names the same packs
            else:
                segments.append(segment)
    return segments


def _check_packs(
    repository: Repository,
    names: dict[str, int],
    index: Index,
    report: Report,
    *,
    read_data: bool,
    part: tuple[int, int],
    progress: Progress,
) -> set[tuple[bytes, int]]:
    """Where the index leads to nothing that can be read: pack and offset."""
    number, parts = part
    indexed: dict[bytes, list[PackEntry]] = collect(index.segments)
    bad: set[tuple[bytes, int]] = set()
    sound: dict[bytes, set[int]] = {}
    packs = {name: size for name, size in names.items() if name.startswith("packs/")}

    def is_read(pack_id: bytes) -> bool:
        return read_data and int.from_bytes(pack_id) % parts == number

    for name, scanned in scan_packs(repository, packs, is_read, progress):
        for error in scanned.errors:
            report.add(error, name)
        report.read_bytes += scanned.read_bytes
        pack_id, entries, damaged = pack_id_of(name), scanned.entries, scanned.damaged
        if pack_id is None or entries is None:
            continue
        sound[pack_id] = {entry.offset for entry in entries} - damaged
        report.packs += 1
        if pack_id not in indexed:
            report.unindexed += 1
            index.add(pack_id, (entry for entry in entries if entry.offset not in damaged))
        report.chunks += len(entries)
        expected = {entry.offset: entry for entry in entries}
        for entry in indexed.get(pack_id, ()):
            if expected.get(entry.offset) != entry:
                bad.add((pack_id, entry.offset))
                report.say(name, f"{repository.location}: the index says of {name} what its directory does not")
    for pack_id, entries in indexed.items():
        if entries and pack_name(pack_id) not in packs:
            report.say(pack_name(pack_id), f"{repository.location}: {pack_name(pack_id)} is missing")
        bad |= {(pack_id, entry.offset) for entry in entries if entry.offset not in sound.get(pack_id, ())}
    return bad


@dataclass(slots=True)
class ScannedPack:
    """What reading a pack has shown."""

    entries: list[PackEntry] | None = None
    """What its directory says; None when that is lost."""
    damaged: set[int] = field(default_factory=set)
    """Offsets of chunks that cannot be read."""
    errors: list[RepositoryDamagedError | ObjectMissingError] = field(default_factory=list)
    read_bytes: int = 0


def scan_packs(
    repository: Repository, packs: dict[str, int], is_read: IsRead, progress: Progress
) -> Iterator[tuple[str, ScannedPack]]:
    """Look at packs, given with their sizes: at every byte of those that are to be read, of others at the directory."""
    total, done = sum(packs.values()), 0

    def scan(name: str) -> ScannedPack:
        return _scan_pack(repository, name, packs[name], is_read)

    with ThreadPoolExecutor(_THREADS, "repository-verify") as workers:
        for name, scanned in zip(packs, workers.map(scan, packs), strict=True):
            done += packs[name]
            progress("verifying", done, total)
            yield name, scanned


def _scan_pack(repository: Repository, name: str, pack_bytes: int, is_read: IsRead) -> ScannedPack:
    scanned = ScannedPack()
    pack_id, location = pack_id_of(name), repository.location
    if pack_id is None:
        return scanned
    try:
        if pack_bytes > PACK_LIMIT_BYTES:
            why = f"{location}: {name} is larger than a pack can be"
            raise RepositoryDamagedError(why, repository=location, name=name)
        if not is_read(pack_id):
            scanned.entries = load_directory(repository.backend, repository.keys, pack_id, pack_bytes)
            return scanned
        _read_pack(repository, pack_id, name, scanned)
    except (RepositoryDamagedError, ObjectMissingError) as error:
        scanned.errors.append(error)
    return scanned


def _read_pack(repository: Repository, pack_id: bytes, name: str, scanned: ScannedPack) -> None:
    """Every byte of a pack: header and trailer compared, directory and chunks authenticated, no gap between them."""
    location = repository.location
    content = memoryview(repository.backend.get(name, 0, PACK_LIMIT_BYTES))
    scanned.read_bytes = len(content)
    if content[:HEADER_BYTES] != MAGIC + pack_id:
        scanned.errors.append(
            RepositoryDamagedError(
                f"{location}: {name} is damaged at byte 0: its header is not there",
                repository=location,
                name=name,
                offset=0,
            )
        )
    key = PackKey(pack_id, repository.keys)
    trailer = bytes(content[-TRAILER.size :])
    length = directory_bytes(trailer, len(content), name, location)
    directory = bytes(content[-TRAILER.size - length : -TRAILER.size])
    scanned.entries = read_directory(key, directory, trailer, pack_bytes=len(content), location=location)
    for entry in scanned.entries:
        stored = content[entry.offset : entry.offset + entry.stored_bytes]
        try:
            open_chunk(key, entry, stored, id_key_of(entry, repository.keys), location)
        except RepositoryDamagedError as error:
            scanned.damaged.add(entry.offset)
            scanned.errors.append(error)


def _check_leases(repository: Repository, report: Report) -> None:
    for name in repository.object_names(LEASES):
        try:
            payload = sealing.fetch(sealing.Kind.LEASE, name, repository.backend, repository.keys)
            msgspec.msgpack.decode(payload, type=Holder)
        except RepositoryDamagedError as error:
            report.add(error, name)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            report.say(name, f"{repository.location}: {name} is no lease: {error}")
        except ObjectMissingError:
            continue  # given back since


class _Soundness:
    """Whether chunks, and whole trees, can be read, as the scan of packs has shown."""

    def __init__(self, repository: Repository, index: Index, bad: set[tuple[bytes, int]]) -> None:
        self._index = index
        self._bad = bad
        self._reader = ChunkReader(repository.backend, repository.keys, index, lambda: index)
        self._known: dict[tuple[bytes, int], bool] = {}

    def is_tree_sound(self, tree: Tree) -> bool:
        return tree.root == ZERO_ID or self._is_node_sound(tree.root, tree.levels - 1)

    def _is_node_sound(self, node_id: bytes, level: int) -> bool:
        verdict = self._known.get((node_id, level))
        if verdict is None:
            verdict = self._known[node_id, level] = self._judge(node_id, level)
        return verdict

    def _judge(self, node_id: bytes, level: int) -> bool:
        if not self._is_chunk_sound(node_id):
            return False
        try:
            children = [child for child in node_ids(self._reader.load_node(node_id)) if child != ZERO_ID]
        except RepositoryDamagedError:
            return False
        if level:
            return all(self._is_node_sound(child, level - 1) for child in children)
        return all(map(self._is_chunk_sound, children))

    def _is_chunk_sound(self, chunk_id: bytes) -> bool:
        place = self._index.find(chunk_id)
        return place is not None and (place.pack_id, place.entry.offset) not in self._bad


def _check_backups(repository: Repository, names: Iterable[str], soundness: _Soundness, report: Report) -> None:
    for name in names:
        if not name.startswith(f"{BACKUPS}/"):
            continue
        backup_id = name.removeprefix(f"{BACKUPS}/")
        report.backups += 1
        try:
            manifest = repository.load(backup_id)
        except RepositoryDamagedError as error:
            report.add(error, name)
            report.damaged[backup_id] = ["its manifest"]
            continue
        except ObjectMissingError:
            report.backups -= 1  # pruned since
            continue
        hurt = [what for what, stored in manifest.contents.items() if not soundness.is_tree_sound(stored.tree)]
        if hurt:
            report.damaged[backup_id] = hurt
