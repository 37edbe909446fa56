"""What a repair copies, leaves and says."""

from __future__ import annotations

import pytest
from tests.unit.repository.disks import MemoryDisk, back_up, content_of, new_repository, scattered

from mullion.base.units import MIB
from mullion.repository.errors import RepositoryBusyError
from mullion.repository.fake import FakeBackend
from mullion.repository.lease import Lease
from mullion.repository.repair import repair
from mullion.repository.verify import verify

pytestmark = pytest.mark.unit


def packs(backend: FakeBackend) -> list[str]:
    return sorted(name for name in backend.objects if name.startswith("packs/"))


def flip(backend: FakeBackend, name: str, offset: int) -> None:
    changed = bytearray(backend.objects[name])
    changed[offset] ^= 0x40
    backend.objects[name] = bytes(changed)


@pytest.mark.parametrize("discard", [False, True])
def test_a_pack_whose_directory_is_lost_is_emptied_by_what_the_index_knows(discard: bool) -> None:
    repository, backend = new_repository()
    disk = MemoryDisk(scattered(3 * MIB, 1))
    manifest = back_up(repository, disk)
    (name,) = packs(backend)
    flip(backend, name, -20)  # within the directory
    damaged = backend.objects[name]
    done = repair(repository, discard=discard)
    assert done.lost_chunks == 0
    assert done.rescued_chunks > 0
    assert (done.left, done.discarded) == (([], [name]) if discard else ([name], []))
    assert done.is_whole is discard
    assert not done.after.damaged
    assert backend.objects.get(name) == (None if discard else damaged)
    assert content_of(repository.open_disk(manifest, "disk0")) == disk.content
    assert verify(repository).is_whole is discard


def test_what_is_whole_beside_a_damaged_chunk_is_copied_and_the_rest_is_said() -> None:
    repository, backend = new_repository()
    disk = MemoryDisk(scattered(3 * MIB, 2))
    first = back_up(repository, disk)
    (name,) = packs(backend)
    flip(backend, name, 1000)
    done = repair(repository, discard=True)
    assert done.lost_chunks == 1
    assert done.rescued_chunks == done.indexed_chunks > 1
    assert list(done.after.damaged) == [first.id]
    assert name not in backend.objects
    second = back_up(repository, disk)
    assert content_of(repository.open_disk(second, "disk0")) == disk.content
    report = verify(repository)  # the lost chunk is the same in both
    assert report.is_whole
    assert content_of(repository.open_disk(first, "disk0")) == disk.content


def test_a_missing_pack_is_said_and_its_content_is_stored_again() -> None:
    repository, backend = new_repository()
    disk = MemoryDisk(scattered(2 * MIB, 3))
    manifest = back_up(repository, disk)
    (name,) = packs(backend)
    del backend.objects[name]
    done = repair(repository)
    assert [finding.name for finding in done.found] == [name]
    assert done.lost_chunks > 0
    assert list(done.after.damaged) == [manifest.id]
    assert done.left == []
    back_up(repository, disk)
    assert verify(repository).is_whole


def test_a_copy_of_a_damaged_pack_brings_all_of_it_back() -> None:
    repository, backend = new_repository()
    manifest = back_up(repository, MemoryDisk(scattered(2 * MIB, 4)))
    (name,) = packs(backend)
    copy = backend.objects[name]
    flip(backend, name, 1000)
    assert list(repair(repository).after.damaged) == [manifest.id]
    backend.objects[name] = copy
    assert repair(repository).is_whole
    assert verify(repository).is_whole


def test_a_quick_repair_reads_directories_only() -> None:
    repository, backend = new_repository()
    back_up(repository, MemoryDisk(scattered(2 * MIB, 5)))
    (name,) = packs(backend)
    flip(backend, name, 1000)
    assert repair(repository, read_data=False).found == []
    assert [finding.name for finding in repair(repository).found] == [name]


@pytest.mark.parametrize("discard", [False, True])
def test_a_quick_repair_does_not_take_up_what_an_earlier_one_has_left_behind(discard: bool) -> None:
    """Its directory is whole, and its damaged chunk would be taken for stored by the next backup."""
    repository, backend = new_repository()
    disk = MemoryDisk(scattered(2 * MIB, 7))
    back_up(repository, disk)
    (name,) = packs(backend)
    flip(backend, name, 1000)
    assert repair(repository).left == [name]
    done = repair(repository, read_data=False, discard=discard)
    assert (done.left, done.discarded) == (([], [name]) if discard else ([name], []))
    manifest = back_up(repository, disk)
    assert content_of(repository.open_disk(manifest, "disk0")) == disk.content
    assert not verify(repository).damaged


def test_a_copy_that_nobody_has_read_is_no_reason_to_discard_another() -> None:
    """A chunk is in two packs: damaged in the one with a directory, whole in the one without."""
    repository, backend = new_repository()
    manifest = back_up(repository, MemoryDisk(scattered(3 * MIB, 1)))
    (first,) = packs(backend)
    segments = {name: backend.objects.pop(name) for name in list(backend.objects) if name.startswith("index/")}
    kept = backend.objects.pop(first)
    repository.reload_index()
    back_up(repository, MemoryDisk(scattered(3 * MIB, 1)))
    (second,) = packs(backend)
    backend.objects |= {first: kept, **segments}
    repository.reload_index()
    flip(backend, first, 1000)
    flip(backend, second, -20)  # within the directory
    repair(repository, read_data=False, discard=True)
    assert second not in backend.objects
    done = repair(repository)
    assert done.lost_chunks == 0
    assert not done.after.damaged
    assert content_of(repository.open_disk(manifest, "disk0")) == scattered(3 * MIB, 1)


def test_nothing_is_touched_while_another_works_on_the_repository() -> None:
    repository, backend = new_repository()
    back_up(repository, MemoryDisk(scattered(MIB, 6)))
    with Lease(repository.backend, repository.keys, "backup of web"):
        before = dict(backend.objects)
        with pytest.raises(RepositoryBusyError, match="backup of web"):
            repair(repository)
        assert backend.objects == before
