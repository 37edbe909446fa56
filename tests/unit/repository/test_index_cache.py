"""Copies of a repository's index on this host: fetched once, believed only when they are whole, and never needed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tests.unit.repository.disks import PASSPHRASE, MemoryDisk, back_up, content_of, new_repository, scattered

from mullion.base.units import KIB, MIB
from mullion.repository import Repository
from mullion.repository.backup import SEGMENTS_LIMIT
from mullion.repository.fake import FakeBackend
from mullion.repository.index_cache import IndexCache
from mullion.repository.location import index_cache_of
from mullion.repository.prune import prune

pytestmark = pytest.mark.unit


class CountingBackend(FakeBackend):
    """A storage that says which segments of its index were fetched."""

    def __init__(self, other: FakeBackend) -> None:
        super().__init__(other.pack_bytes)
        self.objects = other.objects
        self.fetched: list[str] = []

    def get(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        if name.startswith("index/"):
            self.fetched.append(name)
        return super().get(name, offset, length)


class Scene:
    """A repository with a backup of a disk, whose index is read through a cache."""

    def __init__(self, folder: Path) -> None:
        _, made = new_repository()
        self.backend = CountingBackend(made)
        self.cache = IndexCache(str(folder / "cache" / "index"))
        self.disk = MemoryDisk(scattered(2 * MIB, 1, pieces=12))
        self.last = back_up(self.open(), self.disk)

    def open(self) -> Repository:
        self.backend.fetched.clear()
        return Repository.open(self.backend, PASSPHRASE, index_cache=self.cache)

    def copies(self) -> list[str]:
        return sorted(f"index/{name}" for name in os.listdir(self.cache.folder))

    def segments(self) -> list[str]:
        return sorted(name for name in self.backend.objects if name.startswith("index/"))

    def check(self, *, fetched: int) -> None:
        """The disk can be read, and so many segments had to be fetched for it."""
        assert content_of(self.open().open_disk(self.last, "disk0")) == self.disk.content
        assert len(self.backend.fetched) == fetched
        assert self.copies() == self.segments()


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path)


def test_an_incremental_backup_fetches_nothing_of_an_index_that_is_here(scene: Scene) -> None:
    for seed in range(3):
        scene.disk.content[: 256 * KIB] = os.urandom(256 * KIB)
        repository = scene.open()
        scene.last = back_up(repository, scene.disk, base=scene.last, changed=[(0, 256 * KIB)])
        assert scene.backend.fetched == [], seed
    assert len(scene.segments()) > 1
    scene.check(fetched=0)


def test_another_host_fetches_it_once(scene: Scene, tmp_path: Path) -> None:
    scene.cache = IndexCache(str(tmp_path / "another"))
    assert content_of(scene.open().open_disk(scene.last, "disk0")) == scene.disk.content
    assert scene.backend.fetched == scene.segments()
    scene.check(fetched=0)


def test_merged_segments_are_here_under_their_new_name(scene: Scene) -> None:
    for _ in range(SEGMENTS_LIMIT + 1):
        scene.disk.content[: 64 * KIB] = os.urandom(64 * KIB)
        scene.last = back_up(scene.open(), scene.disk, base=scene.last, changed=[(0, 64 * KIB)])
    assert len(scene.segments()) < SEGMENTS_LIMIT
    scene.check(fetched=0)


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "another's", "of another repository"])
def test_a_damaged_copy_is_fetched_again(scene: Scene, damage: str) -> None:
    name = scene.segments()[0]
    path = Path(scene.cache.folder, name.removeprefix("index/"))
    whole = path.read_bytes()
    match damage:
        case "cut":
            path.write_bytes(whole[:-1])
        case "flipped":
            path.write_bytes(whole[:50] + bytes([whole[50] ^ 1]) + whole[51:])
        case "empty":
            path.write_bytes(b"")
        case "another's":
            scene.disk.content[:MIB] = os.urandom(MIB)
            scene.last = back_up(scene.open(), scene.disk)
            (other,) = set(scene.segments()) - {name}
            path.write_bytes(scene.backend.objects[other])
        case _:
            repository, backend = new_repository()
            back_up(repository, MemoryDisk(scattered(MIB, 2)))
            path.write_bytes(next(content for name, content in backend.objects.items() if name.startswith("index/")))
    scene.check(fetched=1)
    assert path.read_bytes() == whole
    scene.check(fetched=0)


def test_what_the_storage_has_no_more_goes(scene: Scene) -> None:
    first = scene.last
    scene.disk.content[:MIB] = os.urandom(MIB)
    scene.last = back_up(scene.open(), scene.disk)
    prune(Repository.open(scene.backend, PASSPHRASE), [first.id])
    scene.check(fetched=len(scene.segments()))
    scene.check(fetched=0)


def test_a_cache_that_cannot_be_written_costs_only_time(scene: Scene, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    scene.cache = IndexCache(str(tmp_path / "file" / "below"))
    assert content_of(scene.open().open_disk(scene.last, "disk0")) == scene.disk.content
    scene.disk.content[:MIB] = os.urandom(MIB)
    scene.last = back_up(scene.open(), scene.disk)
    assert content_of(scene.open().open_disk(scene.last, "disk0")) == scene.disk.content


def test_what_does_not_fit_is_not_kept(tmp_path: Path) -> None:
    cache = IndexCache(str(tmp_path), limit_bytes=100)
    first, second, third = (f"index/{digit * 32}" for digit in "abc")
    cache.put(first, bytes(60))
    cache.put(second, bytes(41))
    cache.put(third, bytes(40))
    assert cache.get(first) == bytes(60)
    assert cache.get(second) is None
    assert cache.get(third) == bytes(40)


def test_only_names_of_segments_become_files(tmp_path: Path) -> None:
    """What a hostile storage lists is a name of an object, and need not be one of a segment."""
    (tmp_path / "notes").write_bytes(b"somebody else's")
    cache = IndexCache(str(tmp_path))
    for name in ("index/notes", "index/aa/bb", "packs/" + "a" * 32, "index/" + "a" * 33):
        cache.put(name, b"x")
        cache.drop(name)
        assert cache.get(name) is None
    cache.keep([])
    assert os.listdir(tmp_path) == ["notes"]


def test_a_folder_of_this_host_needs_no_copies() -> None:
    assert index_cache_of("/srv/backups", "/x") is None
    assert index_cache_of("file:///srv/backups", "/x") is None
    assert index_cache_of("s3://bucket/here", "/x") is not None
    assert index_cache_of("sftp://host/folder", "/x") is not None
