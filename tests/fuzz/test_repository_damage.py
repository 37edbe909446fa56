"""Every byte of a repository that is flipped or cut off is found, and nothing wrong is ever given out."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from blake3 import blake3
from tests.unit.repository.disks import CHUNK, MemoryDisk, back_up, content_of, new_repository, scattered

from mullion.base.units import MIB
from mullion.repository import Manifest, Repository, begin_backup
from mullion.repository.errors import RepositoryDamagedError
from mullion.repository.fake import FakeBackend
from mullion.repository.prune import prune
from mullion.repository.repair import repair
from mullion.repository.verify import verify

pytestmark = pytest.mark.fuzz


def tiny() -> tuple[Repository, FakeBackend, Manifest, bytes]:
    """A repository of some kilobytes with every kind of object in it."""
    repository, backend = new_repository()
    content = bytes(CHUNK) + b"some text " * 7000 + bytes(2 * CHUNK) + b"more\n"
    with begin_backup(repository, "web") as backup:
        backup.add_disk("disk0", MemoryDisk(content))
        manifest = backup.commit()
    return repository, backend, manifest, content


def is_noticed(repository: Repository, name: str) -> bool:
    report = verify(repository)
    return any(finding.name == name for finding in report.findings)


def gives_nothing_wrong_or_tells(repository: Repository, manifest: Manifest, content: bytes) -> None:
    """Reading gives what was stored, or RepositoryDamagedError."""
    try:
        repository.reload_index()
        found = content_of(repository.open_disk(repository.load(manifest.id), "disk0"))
    except RepositoryDamagedError:
        return
    assert found == content


def restore_objects(backend: FakeBackend, name: str, whole: bytes) -> None:
    """Make it whole again, and take away the mark that the verification made."""
    backend.objects[name] = whole
    for mark in [mark for mark in backend.objects if mark.startswith("damaged/")]:
        del backend.objects[mark]


def test_the_repository_is_tiny_and_whole() -> None:
    repository, backend, manifest, content = tiny()
    assert sum(map(len, backend.objects.values())) < 4000
    assert {name.split("/")[0] for name in backend.objects} == {"config", "keys", "packs", "index", "backups"}
    assert verify(repository).is_whole
    assert content_of(repository.open_disk(manifest, "disk0")) == content


def test_every_flipped_byte_is_found() -> None:
    repository, backend, manifest, content = tiny()
    for name, whole in list(backend.objects.items()):
        for place in range(len(whole)):
            damaged = bytearray(whole)
            damaged[place] ^= 1 << place % 8
            backend.objects[name] = bytes(damaged)
            assert is_noticed(repository, name), f"{name} at {place}"
            gives_nothing_wrong_or_tells(repository, manifest, content)
            restore_objects(backend, name, whole)
    assert verify(repository).is_whole


def test_every_truncation_is_found() -> None:
    repository, backend, manifest, content = tiny()
    for name, whole in list(backend.objects.items()):
        for length in range(len(whole)):
            backend.objects[name] = whole[:length]
            assert is_noticed(repository, name), f"{name} cut to {length}"
            gives_nothing_wrong_or_tells(repository, manifest, content)
            restore_objects(backend, name, whole)


def test_every_flipped_byte_of_a_lease_is_found() -> None:
    repository, backend, _, _ = tiny()
    with repository.lease("test") as lease:
        whole = backend.objects[lease.name]
        for place in range(len(whole)):
            damaged = bytearray(whole)
            damaged[place] ^= 1 << place % 8
            backend.objects[lease.name] = bytes(damaged)
            assert is_noticed(repository, lease.name), place
            backend.objects[lease.name] = whole[:place]
            assert is_noticed(repository, lease.name), place
        backend.objects[lease.name] = whole
        assert verify(repository).is_whole


def test_bytes_added_at_an_end_are_found() -> None:
    repository, backend, _, _ = tiny()
    for name, whole in list(backend.objects.items()):
        backend.objects[name] = whole + b"\0"
        assert is_noticed(repository, name), name
        restore_objects(backend, name, whole)


def test_objects_that_change_places_are_found() -> None:
    repository, backend = new_repository(pack_bytes=CHUNK)
    for seed in (1, 2):
        back_up(repository, MemoryDisk(scattered(MIB, seed)))
    for folder in ("packs/", "index/", "backups/"):
        first, second = [name for name in backend.objects if name.startswith(folder)][:2]
        before = dict(backend.objects)
        backend.objects[first], backend.objects[second] = backend.objects[second], backend.objects[first]
        assert is_noticed(repository, first)
        backend.objects = before


def test_a_missing_pack_is_found_and_the_backup_named() -> None:
    repository, backend, manifest, _ = tiny()
    for name in [name for name in backend.objects if name.startswith("packs/")]:
        del backend.objects[name]
    report = verify(repository)
    assert report.damaged == {manifest.id: ["disk disk0"]}
    assert not report.is_whole


def test_without_its_index_everything_is_found_in_the_packs() -> None:
    repository, backend, manifest, content = tiny()
    for name in [name for name in backend.objects if name.startswith("index/")]:
        del backend.objects[name]
    repository = Repository(backend, repository.config, repository.keys)
    report = verify(repository)
    assert report.is_whole
    assert report.unindexed == 1
    assert content_of(repository.open_disk(manifest, "disk0")) == content
    assert back_up(repository, MemoryDisk(content)).new_bytes == 0  # and the next backup makes it again
    assert verify(repository).unindexed == 0


def test_a_lease_that_is_damaged_is_told_and_blocks_nobody() -> None:
    repository, backend, _, _ = tiny()
    backend.objects["leases/aa"] = b"rubbish"
    assert prune(repository).kept == 1
    assert "leases/aa" not in backend.objects


def test_strange_names_are_told_and_left_alone() -> None:
    repository, backend, manifest, content = tiny()
    strange = ("keys/../x", "packs/../config", "packs/xyz", "backups/NOT", "holiday.jpg", "packs/" + "a" * 300)
    for name in strange:
        backend.objects[name] = b"x"
    assert {finding.name for finding in verify(repository).findings} == set(strange)
    assert prune(repository).kept == 1
    assert content_of(repository.open_disk(manifest, "disk0")) == content
    assert set(strange) <= set(backend.objects)


def test_the_index_is_made_again_from_the_packs() -> None:
    repository, backend = new_repository(pack_bytes=CHUNK)
    disks = [MemoryDisk(scattered(3 * MIB, seed)) for seed in range(3)]
    manifests = [back_up(repository, disk, partition=str(number)) for number, disk in enumerate(disks)]
    for name in [name for name in backend.objects if name.startswith("index/")]:
        backend.objects[name] = b"rubbish"
    repository.reload_index()
    assert content_of(repository.open_disk(manifests[0], "disk0")) == disks[0].content
    assert not verify(repository).is_whole
    done = repair(repository)
    assert done.is_whole
    assert all(finding.name.startswith("index/") for finding in done.found)
    for manifest, disk in zip(manifests, disks, strict=True):
        assert content_of(repository.open_disk(manifest, "disk0")) == disk.content
    assert verify(repository).is_whole


def test_what_was_lost_is_stored_again_by_the_next_full_backup() -> None:
    repository, backend = new_repository()
    disk = MemoryDisk(scattered(3 * MIB, 4))
    first = back_up(repository, disk)
    name = next(name for name in backend.objects if name.startswith("packs/"))
    damaged = bytearray(backend.objects[name])
    damaged[1000] ^= 1
    backend.objects[name] = bytes(damaged)
    done = repair(repository)
    assert [finding.name for finding in done.found] == [name]
    assert list(done.after.damaged) == [first.id]
    assert done.lost_chunks == 1
    assert done.left == [name]
    disk.pwrite(MIB, b"changed")
    with begin_backup(repository, "web", base=first) as backup:
        assert backup.base is None  # nothing is built on a backup that has lost something
        backup.add_disk("disk0", disk, changed=[(MIB, 7)])
        second = backup.commit()
    assert content_of(repository.open_disk(second, "disk0")) == disk.content
    assert [name for name in backend.objects if name.startswith("damaged/")]
    assert not verify(repository).damaged
    assert not [name for name in backend.objects if name.startswith("damaged/")]


def test_a_scrub_reads_a_part_of_the_packs_each_time() -> None:
    repository, backend = new_repository(pack_bytes=CHUNK)
    back_up(repository, MemoryDisk(random.Random(1).randbytes(2 * MIB)))
    total = sum(len(content) for name, content in backend.objects.items() if name.startswith("packs/"))
    reports = [verify(repository, part=(number, 3)) for number in range(3)]
    assert sum(report.read_bytes for report in reports) == total
    assert all(report.read_bytes < total for report in reports)
    name = next(name for name in backend.objects if name.startswith("packs/"))
    backend.objects[name] = backend.objects[name][:100] + b"??" + backend.objects[name][102:]
    found = [verify(repository, part=(number, 3)) for number in range(3)]
    assert sum(not report.is_whole for report in found) == 1


def test_a_restore_stops_at_damage_and_has_written_nothing_wrong() -> None:
    repository, backend = new_repository(pack_bytes=CHUNK)
    content = random.Random(1).randbytes(4 * MIB)
    manifest = back_up(repository, MemoryDisk(content))
    place = repository.index().find(next(chunk_ids(repository, content)))
    assert place is not None
    pack = f"packs/{place.pack_id.hex()}"
    damaged = bytearray(backend.objects[pack])
    damaged[place.entry.offset + 5] ^= 1
    backend.objects[pack] = bytes(damaged)
    target = MemoryDisk(bytes(4 * MIB))
    with pytest.raises(RepositoryDamagedError):
        repository.open_disk(manifest, "disk0").restore(target)
    for begin in range(0, 4 * MIB, CHUNK):
        assert target.content[begin : begin + CHUNK] in (bytes(CHUNK), content[begin : begin + CHUNK])


def chunk_ids(repository: Repository, content: bytes) -> Iterator[bytes]:
    """The ids of the chunks in the middle of a disk."""
    for begin in range(2 * MIB, len(content), CHUNK):
        yield blake3(content[begin : begin + CHUNK], key=repository.keys.chunk_id).digest()
