"""A power cut at any change of a repository's folder: what was acknowledged is whole, what was not is begun again.

What a cut may leave (`local`): every object that was put durably; of the others, and of what was deleted since, any.
"""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Callable, Iterable

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
    opens,
    scattered,
)

from mullion.base.block import Buffer
from mullion.base.units import MIB
from mullion.repository import Manifest, Repository
from mullion.repository.fake import FakeBackend
from mullion.repository.lease import Holder
from mullion.repository.prune import prune

pytestmark = pytest.mark.unit

STATES = 4
"""Of those that one cut may leave, how many are looked at."""


class ForgetfulBackend(FakeBackend):
    """Knows what its folder has not made durable: names that may be missing after a cut, and such that may be back."""

    def __init__(self, pack_bytes: int) -> None:
        super().__init__(pack_bytes)
        self._unsure: dict[str, bytes | None] = {}
        """By name what a cut may bring back; None: nothing was there."""

    def put(self, name: str, buffers: Iterable[Buffer], *, durable: bool = True) -> None:
        """In two changes: between them the object has its name, and its folder is not synced."""
        before = self.objects.get(name)
        super().put(name, buffers, durable=durable)
        self._unsure.setdefault(name, before)
        if durable:
            self.settle(os.path.dirname(name))

    def delete(self, name: str) -> None:
        before = self.objects.get(name)
        super().delete(name)
        self._unsure.setdefault(name, before)

    def settle(self, folder: str) -> None:
        super().settle(folder)
        self._unsure = {name: before for name, before in self._unsure.items() if os.path.dirname(name) != folder}

    def after_cut(self, choose: random.Random) -> ForgetfulBackend:
        """One of the states that the platter may be in."""
        left = of_objects(self.objects, self.pack_bytes)
        for name, before in self._unsure.items():
            if choose.random() < 0.5:
                left.objects.pop(name, None)
                if before is not None:
                    left.objects[name] = before
        return left


def of_objects(objects: dict[str, bytes], pack_bytes: int) -> ForgetfulBackend:
    backend = ForgetfulBackend(pack_bytes)
    backend.objects = dict(objects)
    return backend


@pytest.fixture(autouse=True)
def others_are_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leases of before the cut are of another boot; here they are of this process."""
    monkeypatch.setattr(Holder, "is_dead", property(lambda self: True))


def cut_everywhere(
    backend: FakeBackend, operation: Callable[[FakeBackend], object], look: Callable[[FakeBackend, bool], None]
) -> int:
    """Cut the power before each change and look at what may be left; how many changes there are."""
    for fuse in itertools.count():
        here = of_objects(backend.objects, backend.pack_bytes)
        end_at(here, fuse)
        try:
            operation(here)
        except EndedError:
            is_over = False
        else:
            is_over = True
        for seed in range(STATES):
            look(here.after_cut(random.Random(f"{fuse} {seed}")), is_over)
        if is_over:
            break
    return fuse


def cut_and_repeated(
    backend: FakeBackend, operation: Callable[[Repository], object], check: Callable[[Repository, bool], None]
) -> int:
    """The same; what was cut off is done again on what is left, and that is looked at too."""

    def look(left: FakeBackend, is_over: bool) -> None:
        repository = Repository.open(left, PASSPHRASE)
        check(repository, is_over)
        operation(repository)
        check(repository, True)

    return cut_everywhere(backend, lambda here: operation(Repository.open(here, PASSPHRASE)), look)


def test_a_backup() -> None:
    repository, backend = new_repository(pack_bytes=2 * CHUNK)
    disk = MemoryDisk(scattered(MIB, 1, pieces=8))
    first = back_up(repository, disk)
    before = bytes(disk.content)
    disk.content[: 6 * CHUNK] = scattered(6 * CHUNK, 2, pieces=10)

    def operation(repository: Repository) -> Manifest:
        return back_up(repository, disk, base=first, changed=[(0, 6 * CHUNK)])

    def check(repository: Repository, is_over: bool) -> None:
        check_whole(repository, {first.id: before})
        others = [manifest for manifest in repository.backups() if manifest.id != first.id]
        assert bool(others) or not is_over, "an acknowledged backup is there"
        for manifest in others:
            assert content_of(repository.open_disk(manifest, "disk0")) == disk.content

    assert cut_and_repeated(backend, operation, check) > 4


def test_a_passphrase_that_takes_the_place_of_another() -> None:
    """Old, both or new: never neither; and what is acknowledged is the new one alone."""
    _, backend = new_repository()

    def look(left: FakeBackend, is_over: bool) -> None:
        opening = [words for words in (PASSPHRASE, "the new one") if opens(left, words)]
        assert opening
        assert opening == ["the new one"] or not is_over
        take_place(left, opening[0])
        assert opens(left, "the new one")
        assert not opens(left, PASSPHRASE)
        assert len(left.objects) == 2, "config and one slot"

    assert cut_everywhere(backend, lambda here: take_place(here, PASSPHRASE), look) > 1


def take_place(backend: FakeBackend, present: str) -> None:
    repository = Repository.open(backend, present)
    replaced = repository.add_passphrase("the new one", scrypt_log2_n=QUICK_SCRYPT)
    Repository.open(backend, "the new one").remove_slots(replaced, "the new one")


@pytest.fixture
def pruned() -> tuple[ForgetfulBackend, list[str], dict[str, bytes]]:
    """A repository with four backups, of which two are to be forgotten: it, their ids, and what the others are."""
    repository, backend = new_repository(pack_bytes=2 * CHUNK)
    disk = MemoryDisk(scattered(MIB, 1, pieces=8))
    manifests, contents = [], []
    for seed in range(4):
        disk.content[: 4 * CHUNK] = scattered(4 * CHUNK, seed, pieces=8)
        manifests.append(back_up(repository, disk))
        contents.append(bytes(disk.content))
    kept = {manifests[1].id: contents[1], manifests[3].id: contents[3]}
    return of_objects(backend.objects, backend.pack_bytes), [manifests[0].id, manifests[2].id], kept


def test_a_prune(pruned: tuple[ForgetfulBackend, list[str], dict[str, bytes]]) -> None:
    backend, doomed, kept = pruned

    def operation(repository: Repository) -> object:
        return prune(repository, [one for one in doomed if one in repository.backup_ids()])

    def check(repository: Repository, _is_over: bool) -> None:
        check_whole(repository, kept)
        for backup_id in repository.backup_ids():  # one that came back is whole, or it would be told
            content_of(repository.open_disk(repository.backup(backup_id), "disk0"))

    assert cut_and_repeated(backend, operation, check) > 4


def ended_everywhere(
    backend: FakeBackend,
    first: Callable[[Repository], object],
    then: Callable[[Repository], object],
    check: Callable[[Repository], None],
) -> int:
    """End one operation at each change, do another to its end, and cut the power; how many changes the first has."""
    for fuse in itertools.count():
        for seed in range(STATES):
            here = of_objects(backend.objects, backend.pack_bytes)
            end_at(here, fuse)
            is_over = True
            try:
                first(Repository.open(here, PASSPHRASE))
            except EndedError:
                is_over = False
            here.before_change = lambda number: None
            then(Repository.open(here, PASSPHRASE))
            check(Repository.open(here.after_cut(random.Random(f"{fuse} {seed}")), PASSPHRASE))
        if is_over:
            break
    return fuse


def test_a_prune_after_one_that_died(pruned: tuple[ForgetfulBackend, list[str], dict[str, bytes]]) -> None:
    """What the first had taken away, or copied, and not made durable, the second builds on."""
    backend, doomed, kept = pruned

    def operation(repository: Repository) -> object:
        return prune(repository, [one for one in doomed if one in repository.backup_ids()], repack_below=1.0)

    def check(repository: Repository) -> None:
        check_whole(repository, kept)
        assert sorted(repository.backup_ids()) == sorted(kept), "none that was forgotten has come back"

    assert ended_everywhere(backend, operation, operation, check) > 6


def test_a_backup_after_one_that_died(pruned: tuple[ForgetfulBackend, list[str], dict[str, bytes]]) -> None:
    """What the first had stored, and not made durable, the second takes up; so does a prune."""
    backend, _, kept = pruned
    disk = MemoryDisk(scattered(MIB, 9, pieces=12))
    acknowledged: list[str] = []

    def again(repository: Repository) -> None:
        acknowledged[:] = [back_up(repository, disk).id]
        prune(repository)

    def check(repository: Repository) -> None:
        check_whole(repository, {**kept, acknowledged[0]: bytes(disk.content)})

    assert ended_everywhere(backend, lambda repository: back_up(repository, disk), again, check) > 6
