"""A repository's folder: in which order an object becomes durable and visible, and what is not believed in it."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import random
import stat
from pathlib import Path

import pytest
from tests.unit.repository.disks import MemoryDisk, back_up, content_of, scattered

from mullion.base.units import MIB
from mullion.repository import Repository
from mullion.repository.errors import TargetFaultError
from mullion.repository.local import FolderBackend
from mullion.repository.verify import verify

pytestmark = pytest.mark.unit


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is asked of the filesystem that matters after a power cut, in order."""
    seen: list[str] = []
    fsync, link, rename, write = os.fsync, os.link, os.rename, os.write

    def said_fsync(fd: int) -> None:
        seen.append("sync folder" if stat.S_ISDIR(os.fstat(fd).st_mode) else "sync file")
        fsync(fd)

    def said_how(fd: int) -> str:
        return "direct " if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT else ""

    monkeypatch.setattr(os, "fsync", said_fsync)
    monkeypatch.setattr(os, "link", lambda *given, **named: (seen.append("name"), link(*given, **named)))
    monkeypatch.setattr(os, "rename", lambda *given: (seen.append("name"), rename(*given)))
    monkeypatch.setattr(os, "write", lambda fd, content: (seen.append(f"{said_how(fd)}write"), write(fd, content))[1])
    return seen


@pytest.fixture
def without_tmpfile(monkeypatch: pytest.MonkeyPatch) -> None:
    """A filesystem such as NFS, which knows no files without a name."""
    real = os.open

    def refuse(path: str, flags: int, mode: int = 0o777, **named: int) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, "no such thing here")
        return real(path, flags, mode, **named)

    monkeypatch.setattr(os, "open", refuse)


def test_an_object_is_synced_before_it_has_its_name(tmp_path: Path, calls: list[str]) -> None:
    backend = FolderBackend.create(str(tmp_path / "r"))
    backend.put("packs/aa", [b"first"])
    calls.clear()
    backend.put("packs/bb", [b"content"] * 3)
    assert calls == ["write", "write", "write", "sync file", "name", "sync folder"]
    calls.clear()
    backend.put("leases/cc", [b"x"], durable=False)
    assert "sync file" not in calls


def test_what_must_not_come_back_is_gone_when_its_folder_is_synced(tmp_path: Path, calls: list[str]) -> None:
    backend = FolderBackend.create(str(tmp_path / "r"))
    backend.put("packs/aa", [b"first"])
    backend.put("packs/bb", [b"second"])
    del calls[:]
    backend.delete("packs/aa")
    assert calls == []
    backend.settle("packs")
    assert calls == ["sync folder"]
    backend.settle("index")  # which nobody has made


def test_large_buffers_go_around_the_page_cache(tmp_path: Path, calls: list[str]) -> None:
    """As long as they fit: what is not aligned, and all that lies behind it, is written as anything else."""
    backend = FolderBackend.create(str(tmp_path / "r"))
    room = memoryview(mmap.mmap(-1, 4 * MIB))
    room[:] = random.Random(1).randbytes(len(room))
    pieces = [room[: 2 * MIB], room[2 * MIB : 3 * MIB + 17], room[: 2 * MIB]]
    backend.put("packs/aa", pieces)
    writes = [call for call in calls if call.endswith("write")]
    assert writes == ["direct write", "direct write", "write", "write"]
    assert backend.get("packs/aa") == b"".join(pieces)


@pytest.mark.parametrize("refused", ["flag", "write"])
def test_a_filesystem_that_cannot_go_around_the_page_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: str
) -> None:
    write, control = os.write, fcntl.fcntl

    def refuse_write(fd: int, content: memoryview) -> int:
        if control(fd, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "not here")
        return write(fd, content)

    def refuse_flag(fd: int, what: int, value: int = 0) -> int:
        if what == fcntl.F_SETFL and value & os.O_DIRECT:
            raise OSError(errno.EINVAL, "not here")
        return control(fd, what, value)

    monkeypatch.setattr(os, "write", refuse_write)
    if refused == "flag":
        monkeypatch.setattr(fcntl, "fcntl", refuse_flag)
    backend = FolderBackend.create(str(tmp_path / "r"))
    pieces = [random.Random(1).randbytes(2 * MIB), b"end"]
    backend.put("packs/aa", pieces)
    assert backend.get("packs/aa") == b"".join(pieces)


def test_without_files_without_a_name(tmp_path: Path, without_tmpfile: None, calls: list[str]) -> None:
    backend = FolderBackend.create(str(tmp_path / "r"))
    backend.put("packs/aa", [b"first"])
    calls.clear()
    backend.put("packs/aa", [b"again"])
    assert calls == ["write", "sync file", "name", "sync folder"]
    repository = Repository.create(FolderBackend.create(str(tmp_path / "other")), "secret", scrypt_log2_n=10)
    disk = MemoryDisk(scattered(MIB, 1))
    assert content_of(repository.open_disk(back_up(repository, disk), "disk0")) == disk.content
    assert verify(repository).is_whole
    assert os.listdir(tmp_path / "other" / "tmp") == []


def test_new_folders_are_durable_before_what_is_in_them(tmp_path: Path, calls: list[str]) -> None:
    FolderBackend.create(str(tmp_path / "r")).put("packs/aa", [b"x"])
    assert calls == ["sync folder", "sync folder", "write", "sync file", "name", "sync folder"]


def test_what_a_writer_that_died_has_left_is_swept(tmp_path: Path) -> None:
    folder = tmp_path / "r"
    FolderBackend.create(str(folder)).put("config", [b"x"])
    (folder / "tmp").mkdir()
    (folder / "tmp" / "left").write_bytes(b"half")
    backend = FolderBackend(str(folder))
    assert os.listdir(folder / "tmp") == []
    assert [listed.name for listed in backend.list("")] == ["config"]


def test_only_the_owner_can_read_it(tmp_path: Path) -> None:
    backend = FolderBackend.create(str(tmp_path / "r"))
    backend.put("packs/aa", [b"x"])
    for path in (tmp_path / "r", tmp_path / "r/packs", tmp_path / "r/packs/aa"):
        assert path.stat().st_mode & 0o077 == 0


def test_pipes_and_links_in_it_are_not_followed(tmp_path: Path) -> None:
    backend = FolderBackend.create(str(tmp_path / "r"))
    backend.put("packs/aa", [b"x"])
    os.mkfifo(tmp_path / "r/packs/bb")
    os.symlink("/etc/passwd", tmp_path / "r/packs/cc")
    for name in ("packs/bb", "packs/cc"):
        with pytest.raises(TargetFaultError):
            backend.get(name)
