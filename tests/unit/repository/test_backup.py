"""Backups: what goes in comes out, only what must be read is read, nothing is stored twice."""

from __future__ import annotations

import io
import random
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.repository.disks import (
    CHUNK,
    PASSPHRASE,
    MemoryDisk,
    back_up,
    content_of,
    new_repository,
    scattered,
)

from mullion.base.block import Extent, ExtentKind, WritableBuffer
from mullion.base.errors import InvalidError, NotFoundError, StateError
from mullion.base.units import GIB, KIB, MIB
from mullion.repository import Repository, begin_backup
from mullion.repository.errors import LeaseLostError, RepositoryBusyError, RepositoryExistsError, WrongKeyError
from mullion.repository.fake import FakeBackend
from mullion.repository.prune import prune
from mullion.repository.verify import verify

pytestmark = pytest.mark.unit


class Zeros(MemoryDisk):
    """A disk of any size without data."""

    def __init__(self, size_bytes: int) -> None:
        super().__init__(b"")
        self._size_bytes = size_bytes

    @property
    def size_bytes(self) -> int:
        return self._size_bytes

    def pread(self, offset: int, buffer: WritableBuffer) -> None:
        memoryview(buffer)[:] = bytes(len(buffer))

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        return iter(())


@pytest.mark.parametrize("size", [512, CHUNK - 512, CHUNK, CHUNK + 512, 3 * MIB, 20 * MIB + 512])
def test_a_disk_comes_out_as_it_went_in(size: int) -> None:
    repository, _ = new_repository()
    disk = MemoryDisk(scattered(size, size))
    manifest = back_up(repository, disk)
    restored = repository.open_disk(repository.backup(manifest.id[:6]), "disk0")
    assert content_of(restored) == disk.content
    target = MemoryDisk(b"\xff" * size)
    restored.restore(target)
    assert target.content == disk.content
    empty = MemoryDisk(bytes(size + 512))
    restored.restore(empty, is_zero=True)
    assert empty.content == disk.content + bytes(512)
    assert verify(repository).is_whole


def test_extents_of_a_backup_are_those_of_its_chunks() -> None:
    repository, _ = new_repository()
    content = bytearray(40 * MIB)
    content[17 * MIB : 17 * MIB + 10] = b"something."
    disk = repository.open_disk(back_up(repository, MemoryDisk(content)), "disk0")
    at = 17 * MIB
    assert list(disk.extents(100, 30 * MIB)) == [
        (100, at - 100, ExtentKind.HOLE),
        (at, CHUNK, ExtentKind.DATA),
        (at + CHUNK, 13 * MIB + 100 - CHUNK, ExtentKind.HOLE),
    ]
    assert list(disk.extents(at + 7, 5)) == [(at + 7, 5, ExtentKind.DATA)]
    assert list(disk.extents(5, 0)) == []


def test_an_empty_disk_of_any_size_costs_nothing() -> None:
    repository, backend = new_repository()
    manifest = back_up(repository, Zeros(2000 * GIB))
    assert (manifest.disks["disk0"].data_bytes, manifest.new_bytes) == (0, 0)
    assert not list(backend.list("packs"))
    assert len(list(repository.open_disk(manifest, "disk0").extents(0, 2000 * GIB))) == 1


def test_an_incremental_backup_reads_what_has_changed_and_nothing_else() -> None:
    repository, _ = new_repository()
    disk = MemoryDisk(scattered(40 * MIB, 3, pieces=40))
    base = back_up(repository, disk)
    disk.pwrite(5 * MIB + 100, b"changed")
    disk.pwrite(30 * MIB, random.Random(1).randbytes(CHUNK))
    disk.read_bytes = 0
    changed = [(30 * MIB, CHUNK), (5 * MIB + 100, 7)]
    manifest = back_up(repository, disk, base=base, changed=changed)
    assert disk.read_bytes == manifest.disks["disk0"].read_bytes == 2 * CHUNK
    assert manifest.base == base.id
    assert content_of(repository.open_disk(manifest, "disk0")) == disk.content
    assert manifest.new_bytes < 3 * CHUNK


@settings(max_examples=10, deadline=None)
@given(st.data())
def test_any_series_of_incremental_backups_is_right(data: st.DataObject) -> None:
    """Changes, zeros, growth and shrinking, each backup based on the one before."""
    repository, _ = new_repository()
    disk = MemoryDisk(scattered(data.draw(st.integers(1, 40)) * MIB // 2, 1))
    manifest = back_up(repository, disk)
    for seed in range(data.draw(st.integers(1, 3))):
        size = data.draw(st.sampled_from([disk.size_bytes, 512, CHUNK, 17 * MIB, 33 * MIB + 512]))
        grown = disk.content[:size] + bytes(max(0, size - disk.size_bytes))
        disk = MemoryDisk(grown)
        changed = []
        for _ in range(data.draw(st.integers(0, 4))):
            offset = data.draw(st.integers(0, size - 1))
            length = data.draw(st.integers(0, min(size - offset, 3 * CHUNK)))
            piece = bytes(length) if data.draw(st.booleans()) else random.Random(seed).randbytes(length)
            disk.pwrite(offset, piece)
            changed.append((offset, length))
        manifest = back_up(repository, disk, base=manifest, changed=changed)
        stored = manifest.disks["disk0"]
        assert content_of(repository.open_disk(manifest, "disk0")) == disk.content
        chunks = [bytes(disk.content[at : at + CHUNK]) for at in range(0, size, CHUNK)]
        assert stored.data_bytes == sum(map(any, chunks)) * CHUNK
    report = verify(repository)
    assert report.is_whole, report.findings


@pytest.mark.parametrize("size", [17 * MIB, 5 * GIB])
def test_a_disk_that_grew_and_lost_all_it_had_is_one_of_zeros(size: int) -> None:
    """The nodes above the base's root are as empty as new ones: nothing is stored for them."""
    repository, _ = new_repository()
    base = back_up(repository, MemoryDisk(b"x" * 512))
    manifest = back_up(repository, Zeros(size), base=base, changed=[(0, 512)])
    assert (manifest.disks["disk0"].data_bytes, manifest.new_bytes) == (0, 0)
    opened = repository.open_disk(manifest, "disk0")
    for offset in (0, size - 4096):
        buffer = bytearray(b"?" * 4096)
        opened.pread(offset, buffer)
        assert not any(buffer)
    assert verify(repository).is_whole


def test_two_partitions_with_the_same_base_store_it_once() -> None:
    repository, _ = new_repository()
    base = scattered(20 * MIB, 5, pieces=30)
    first = back_up(repository, MemoryDisk(base), partition="web")
    other = MemoryDisk(base)
    other.pwrite(MIB, b"its own")
    second = back_up(repository, other, partition="mail")
    assert first.new_bytes > 8 * CHUNK
    assert second.new_bytes < 2 * CHUNK
    assert back_up(repository, MemoryDisk(base), partition="copy").new_bytes == 0


@pytest.mark.parametrize("size", [0, 1, CHUNK, 17 * MIB + 1])
def test_a_blob_of_any_length(size: int) -> None:
    class Dribble(io.BytesIO):
        """A pipe gives less than was asked for."""

        def read(self, size: int | None = -1) -> bytes:
            return super().read(min(size or 0, 70_001))

    repository, _ = new_repository()
    content = random.Random(2).randbytes(size)
    with begin_backup(repository, "web", definition="name = 'web'") as backup:
        backup.add_blob("memory", Dribble(content), notes={"format": "qemu"})
        backup.add_blob("tpm", content)
        manifest = backup.commit()
    assert content_of(repository.open_blob(manifest, "memory")) == content
    assert manifest.blobs["memory"].size_bytes == size
    assert manifest.blobs["tpm"].new_bytes == 0
    assert repository.backups("web")[0].definition == "name = 'web'"


def test_changes_outside_the_disk_are_refused_and_nothing_is_left() -> None:
    repository, _ = new_repository()
    disk = MemoryDisk(bytes(MIB))
    base = back_up(repository, disk)
    with pytest.raises(InvalidError, match="outside a disk"):
        back_up(repository, disk, base=base, changed=[(MIB - 5, 6)])
    with pytest.raises(InvalidError, match="nothing"), begin_backup(repository, "web") as backup:
        backup.commit()
    assert [manifest.id for manifest in repository.backups()] == [base.id]
    assert not list(repository.backend.list("leases"))


def test_a_backup_is_only_read() -> None:
    repository, _ = new_repository()
    disk = repository.open_disk(back_up(repository, MemoryDisk(bytes(MIB))), "disk0")
    assert disk.read_only
    for refused in (lambda: disk.pwrite(0, b"x"), lambda: disk.discard(0, 1), lambda: disk.write_zeroes(0, 1)):
        with pytest.raises(StateError):
            refused()
    with pytest.raises(InvalidError, match="outside"):
        disk.pread(MIB - 1, bytearray(2))
    with pytest.raises(InvalidError, match="the disk of the backup"):
        disk.restore(MemoryDisk(bytes(MIB - 512)))


def test_keys() -> None:
    _, backend = new_repository()
    with pytest.raises(WrongKeyError):
        Repository.open(backend, "wrong")
    with pytest.raises(InvalidError):
        Repository.open(backend, "")
    with pytest.raises(RepositoryExistsError):
        Repository.create(backend, "another")


def test_nothing_that_is_stored_shows_what_it_is() -> None:
    repository, backend = new_repository()
    with begin_backup(repository, "secret-name", definition="secret-definition") as backup:
        backup.add_disk("secret-disk", MemoryDisk(b"secret-content" * 5000))
        backup.commit()
    everything = b"".join(backend.objects.values()) + "".join(backend.objects).encode()
    assert b"secret" not in everything
    assert b"secret" not in repr(repository.keys).encode()
    assert repository.keys.secret.hex() not in repr(repository.keys)


def test_an_id_may_be_shortened_while_it_is_unique() -> None:
    repository, _ = new_repository()
    manifest = back_up(repository, MemoryDisk(bytes(MIB)))
    assert repository.backup(manifest.id[:4]) == manifest
    for text in (manifest.id[:3], "ffff" if manifest.id[0] != "f" else "0000", "../config", ""):
        with pytest.raises(NotFoundError):
            repository.backup(text)


def test_a_prune_and_a_backup_exclude_each_other() -> None:
    repository, backend = new_repository()
    other = Repository.open(backend, PASSPHRASE)
    with begin_backup(repository, "web"):
        with begin_backup(other, "mail"):
            pass
        with pytest.raises(RepositoryBusyError, match="backup of web"):
            prune(other)
    with other.lease("prune", exclusive=True), pytest.raises(RepositoryBusyError, match="prune"):
        begin_backup(repository, "web")
    assert not list(backend.list("leases"))


def test_who_was_taken_for_dead_does_not_publish() -> None:
    repository, backend = new_repository()
    with begin_backup(repository, "web") as backup:
        backup.add_disk("disk0", MemoryDisk(b"x" * MIB))
        for listed in list(backend.list("leases")):
            backend.delete(listed.name)
        with pytest.raises(LeaseLostError):
            backup.commit()
    assert repository.backups() == []


def test_who_is_taken_for_dead_while_publishing_takes_it_back() -> None:
    repository, backend = new_repository()

    def steal(number: int) -> None:
        for name in [name for name in backend.objects if name.startswith("backups/")]:
            assert name
            for lease in [name for name in backend.objects if name.startswith("leases/")]:
                del backend.objects[lease]

    backend.after_change = steal
    with pytest.raises(LeaseLostError):
        back_up(repository, MemoryDisk(b"x" * MIB))
    assert repository.backups() == []


def test_many_small_backups_keep_the_index_short() -> None:
    repository, backend = new_repository(pack_bytes=4 * KIB)
    disk = MemoryDisk(bytes(MIB))
    for number in range(40):
        disk.pwrite(number * 1000, bytes([number + 1]) * 1000)
        back_up(repository, disk)
    assert len(list(backend.list("index"))) <= 18
    for manifest in repository.backups():
        assert repository.open_disk(manifest, "disk0").size_bytes == MIB
    assert content_of(repository.open_disk(repository.backups()[-1], "disk0")) == disk.content
    assert verify(repository).is_whole


def test_reading_needs_few_requests() -> None:
    """Chunks that were written together are fetched together."""
    repository, backend = new_repository(pack_bytes=64 * MIB)
    disk = MemoryDisk(random.Random(5).randbytes(8 * MIB))
    opened = repository.open_disk(back_up(repository, disk), "disk0")
    backend.gets = 0
    assert content_of(opened) == disk.content
    assert backend.gets < 20


def test_a_place_that_is_not_empty_is_left_alone() -> None:
    backend = FakeBackend()
    backend.objects["holiday.jpg"] = b"picture"
    with pytest.raises(RepositoryExistsError):
        Repository.create(backend, PASSPHRASE)
    assert backend.objects == {"holiday.jpg": b"picture"}
