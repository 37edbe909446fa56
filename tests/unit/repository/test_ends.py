"""An end at any change of the storage: the repository opens, is whole, has every backup that was made, and goes on."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from tests.unit.repository.disks import (
    CHUNK,
    PASSPHRASE,
    QUICK_SCRYPT,
    EndedError,
    MemoryDisk,
    back_up,
    check_whole,
    content_of,
    end_at,
    new_repository,
    scattered,
)

from mullion.base.errors import NoSpaceError
from mullion.base.units import MIB
from mullion.repository import Manifest, Repository
from mullion.repository.errors import RepositoryMissingError, TargetFullError
from mullion.repository.fake import FakeBackend
from mullion.repository.lease import Holder
from mullion.repository.prune import prune
from mullion.repository.repair import repair
from mullion.repository.verify import verify

pytestmark = pytest.mark.unit


@pytest.fixture(autouse=True)
def others_are_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was killed cannot be told from this process by its pid, so every other lease counts as dead."""
    monkeypatch.setattr(Holder, "is_dead", property(lambda self: True))


def ended_everywhere(
    backend: FakeBackend, operation: Callable[[Repository], object], check: Callable[[Repository, bool], None]
) -> int:
    """Run an operation on copies, ended before each change; after each end look, repeat it, and look again."""
    fuse = 0
    while True:
        copy = backend.copy()
        repository = Repository.open(copy, PASSPHRASE)
        end_at(copy, fuse)
        try:
            operation(repository)
        except EndedError:
            is_over = False
        else:
            is_over = True
        survivor = copy.copy()
        repository = Repository.open(survivor, PASSPHRASE)
        check(repository, is_over)
        if is_over:
            return fuse
        operation(repository)
        check(repository, True)
        assert not [name for name in survivor.objects if name.startswith("leases/")]
        fuse += 1


def test_a_backup_ends_anywhere() -> None:
    repository, backend = new_repository(pack_bytes=2 * CHUNK)
    disk = MemoryDisk(scattered(2 * MIB, 1, pieces=12))
    first = back_up(repository, disk)
    before = bytes(disk.content)
    disk.content[MIB : MIB + 9 * CHUNK] = scattered(9 * CHUNK, 2, pieces=14)
    stored: list[int] = []

    def operation(repository: Repository) -> Manifest:
        manifest = back_up(repository, disk, base=first, changed=[(MIB, 9 * CHUNK)])
        stored.append(manifest.new_bytes)
        return manifest

    def check(repository: Repository, is_over: bool) -> None:
        check_whole(repository, {first.id: before})
        others = [manifest for manifest in repository.backups() if manifest.id != first.id]
        assert bool(others) or not is_over
        for manifest in others:
            assert content_of(repository.open_disk(manifest, "disk0")) == disk.content

    assert ended_everywhere(backend, operation, check) > 6
    assert min(stored) == 0  # everything had been put before the end, and was used again


def test_what_an_interrupted_backup_stored_is_used() -> None:
    repository, backend = new_repository(pack_bytes=CHUNK)
    disk = MemoryDisk(scattered(4 * MIB, 7, pieces=30))
    end_at(backend, 6)
    with pytest.raises(EndedError):
        back_up(repository, disk)
    packs = {name for name in backend.objects if name.startswith("packs/")}
    assert len(packs) == 5
    survivor = backend.copy()
    repository = Repository.open(survivor, PASSPHRASE)
    back_up(repository, disk)
    assert packs <= set(survivor.objects)
    whole, fresh = new_repository(pack_bytes=CHUNK)
    back_up(whole, disk)
    size = sum(len(content) for name, content in survivor.objects.items() if name.startswith("packs/"))
    assert size <= sum(len(content) for name, content in fresh.objects.items() if name.startswith("packs/")) + CHUNK


def test_a_prune_ends_anywhere() -> None:
    repository, backend = new_repository(pack_bytes=2 * CHUNK)
    disk = MemoryDisk(scattered(3 * MIB, 1, pieces=20))
    manifests, contents = [], []
    for seed in range(4):
        disk.content[seed * MIB // 2 : seed * MIB // 2 + 5 * CHUNK] = scattered(5 * CHUNK, seed, pieces=10)
        manifests.append(back_up(repository, disk))
        contents.append(bytes(disk.content))
    doomed = [manifests[0].id, manifests[2].id]
    kept = {manifests[1].id: contents[1], manifests[3].id: contents[3]}

    def check(repository: Repository, is_over: bool) -> None:
        check_whole(repository, kept)
        if is_over:
            assert set(repository.backup_ids()) == set(kept)
            assert prune(repository).freed_bytes == 0

    assert ended_everywhere(backend, lambda repository: prune(repository, doomed), check) > 6


def test_a_repair_of_the_index_ends_anywhere() -> None:
    repository, backend = new_repository(pack_bytes=2 * CHUNK)
    disk = MemoryDisk(scattered(2 * MIB, 1, pieces=12))
    manifest = back_up(repository, disk)
    back_up(repository, MemoryDisk(scattered(MIB, 3)), partition="mail")
    ended_everywhere(
        backend,
        repair,
        lambda repository, is_over: check_whole(repository, {manifest.id: bytes(disk.content)}),
    )


def test_making_a_repository_ends_anywhere() -> None:
    for fuse in range(2):
        backend = FakeBackend()
        end_at(backend, fuse)
        with pytest.raises(EndedError):
            Repository.create(backend, PASSPHRASE, scrypt_log2_n=QUICK_SCRYPT)
        survivor = backend.copy()
        with pytest.raises(RepositoryMissingError):
            Repository.open(survivor, PASSPHRASE)
        Repository.create(survivor, PASSPHRASE, scrypt_log2_n=QUICK_SCRYPT)
        assert verify(Repository.open(survivor, PASSPHRASE)).is_whole


def test_a_full_target_at_every_change_is_told_and_costs_nothing() -> None:
    """Deleting still works; what could not be put is said, and the next try goes on from there."""
    repository, backend = new_repository(pack_bytes=2 * CHUNK)
    disk = MemoryDisk(scattered(MIB, 1, pieces=8))
    fuse = 0
    while True:
        copy = backend.copy()
        repository = Repository.open(copy, PASSPHRASE)
        state = {"puts": 0}
        put = copy.put

        def limited(name, buffers, *, durable=True, put=put, state=state, fuse=fuse):  # type: ignore[no-untyped-def]
            state["puts"] += 1
            if state["puts"] > fuse:
                raise TargetFullError("the storage is full")
            put(name, buffers, durable=durable)

        copy.put = limited  # type: ignore[method-assign]
        try:
            manifest = back_up(repository, disk)
        except NoSpaceError:
            copy.put = put  # type: ignore[method-assign]
            assert repository.backups() == []
            assert not [name for name in copy.objects if name.startswith("leases/")]
            assert verify(repository).is_whole
            manifest = back_up(repository, disk)
            assert content_of(repository.open_disk(manifest, "disk0")) == disk.content
        else:
            assert content_of(repository.open_disk(manifest, "disk0")) == disk.content
            break
        fuse += 1
    assert fuse > 3
