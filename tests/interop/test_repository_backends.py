"""One suite for every storage of repositories: a folder, OpenSSH's SFTP server, Swift's S3 face, and the double in memory."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tests.framework.backup_servers import S3Server, SftpServer, s3_server, sftp_server
from tests.unit.repository.disks import MemoryDisk, content_of, scattered

from mullion.base.units import MIB
from mullion.repository import Backend, Repository, begin_backup
from mullion.repository.backend import ObjectMissingError
from mullion.repository.errors import RepositoryExistsError, RepositoryMissingError
from mullion.repository.fake import FakeBackend
from mullion.repository.local import FolderBackend
from mullion.repository.prune import prune
from mullion.repository.s3 import S3Backend
from mullion.repository.sftp import SftpBackend
from mullion.repository.verify import verify

pytestmark = pytest.mark.interop

KINDS = ("fake", "folder", "sftp", "s3")


@pytest.fixture(scope="module")
def sftp(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SftpServer]:
    with sftp_server(tmp_path_factory.mktemp("sshd")) as server:
        yield server


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with s3_server(tmp_path_factory.mktemp("swift")) as server:
        yield server


@pytest.fixture(params=KINDS)
def backend(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Backend]:
    """An empty storage of each kind."""
    made: Backend
    match request.param:
        case "fake":
            made = FakeBackend()
        case "folder":
            made = FolderBackend.create(str(tmp_path / "repository"))
        case "sftp":
            server = request.getfixturevalue("sftp")
            folder = str(tmp_path / "repository")
            made = SftpBackend("127.0.0.1", folder, server.credentials, user=server.user, port=server.port)
        case _:
            server = request.getfixturevalue("s3")
            made = S3Backend("backup", f"for-{os.urandom(4).hex()}", server.credentials, endpoint=server.endpoint)
    yield made
    made.close()


def test_what_is_put_can_be_had(backend: Backend) -> None:
    content = random.Random(1).randbytes(3 * MIB + 17)
    pieces = [content[:5], memoryview(content)[5:100], bytearray(content[100:])]
    backend.put("packs/0a", pieces)
    assert backend.get("packs/0a") == content
    assert backend.size("packs/0a") == len(content)
    assert backend.get("packs/0a", 70_000, 200_000) == content[70_000:270_000]
    assert backend.get("packs/0a", len(content) - 5, 100) == content[-5:]
    assert backend.get("packs/0a", len(content) - 5) == content[-5:]
    assert backend.get("packs/0a", len(content), 4) == b""
    assert backend.get("packs/0a", 5, 0) == b""


def test_an_object_of_many_pieces(backend: Backend) -> None:
    pieces = [bytes([number % 251]) * 100 for number in range(3000)]
    backend.put("packs/many", pieces)
    assert backend.get("packs/many") == b"".join(pieces)


def test_an_object_that_is_made_while_it_is_put(backend: Backend) -> None:
    """By somebody who needs the storage for it."""
    backend.put("packs/source", [b"x" * MIB])

    class Made:
        def __iter__(self) -> Iterator[bytes]:
            for offset in range(0, MIB, MIB // 4):
                with ThreadPoolExecutor() as threads:  # connections have locks that one thread may take twice
                    yield threads.submit(backend.get, "packs/source", offset, MIB // 4).result(60)

    backend.put("packs/made", Made())
    assert backend.get("packs/made") == b"x" * MIB


def test_an_empty_object(backend: Backend) -> None:
    backend.put("damaged/0b", [])
    assert backend.size("damaged/0b") == 0
    assert backend.get("damaged/0b") == b""


def test_putting_again_replaces(backend: Backend) -> None:
    backend.put("leases/0c", [b"first, and longer"], durable=False)
    backend.put("leases/0c", [b"second"])
    assert backend.get("leases/0c") == b"second"


def test_what_is_not_there(backend: Backend) -> None:
    assert backend.size("packs/none") is None
    assert list(backend.list("packs")) == []
    assert list(backend.list("")) == []
    with pytest.raises(ObjectMissingError):
        backend.get("packs/none", 0, 10)
    backend.put("config", [b"x"])
    with pytest.raises(ObjectMissingError):
        backend.get("packs/none")
    backend.delete("packs/none")


def test_listing_knows_folders_from_names_that_begin_alike(backend: Backend) -> None:
    for name in ("config", "index/aa", "index/bb", "index2/cc", "packs/dd"):
        backend.put(name, [name.encode()])
    assert sorted(backend.list("index")) == [("index/aa", 8), ("index/bb", 8)]
    assert sorted(listed.name for listed in backend.list("")) == [
        "config",
        "index/aa",
        "index/bb",
        "index2/cc",
        "packs/dd",
    ]
    backend.delete("index/aa")
    assert [listed.name for listed in backend.list("index")] == ["index/bb"]


def test_many_objects(backend: Backend) -> None:
    """More than the 1000 that an answer of S3 has would take Swift a minute to make."""
    count = 1203 if not isinstance(backend, S3Backend) else 30
    for number in range(count):
        backend.put(f"index/{number:04}", [b"x"], durable=False)
    assert len({listed.name for listed in backend.list("index")}) == count


def test_several_threads_at_once(backend: Backend) -> None:
    failed: list[BaseException] = []

    def work(seed: int) -> None:
        content = random.Random(seed).randbytes(100_000)
        try:
            for number in range(5):
                backend.put(f"packs/{seed}-{number}", [content])
                assert backend.get(f"packs/{seed}-{number}", 50_000, 1000) == content[50_000:51_000]
                assert backend.size(f"packs/{seed}-{number}") == 100_000
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert len(list(backend.list("packs"))) == 20


def test_closing_twice_and_using_it_again(backend: Backend) -> None:
    backend.put("config", [b"x"])
    backend.close()
    backend.close()
    assert backend.get("config") == b"x"


def test_a_repository_s_whole_life(backend: Backend) -> None:
    backend.put("index/zz", [b""])
    with pytest.raises(RepositoryMissingError):
        Repository.open(backend, "secret")
    backend.delete("index/zz")
    repository = Repository.create(backend, "secret", scrypt_log2_n=10)
    with pytest.raises(RepositoryExistsError):
        Repository.create(backend, "secret")
    disk = MemoryDisk(scattered(2 * MIB, 1))
    with begin_backup(repository, "web") as backup:
        backup.add_disk("disk0", disk)
        backup.add_blob("firmware-vars", b"variables")
        first = backup.commit()
    disk.pwrite(MIB, b"changed")
    with begin_backup(repository, "web", base=first) as backup:
        backup.add_disk("disk0", disk, changed=[(MIB, 7)])
        second = backup.commit()
    repository = Repository.open(backend, "secret")
    assert [manifest.id for manifest in repository.backups()] == [first.id, second.id]
    assert content_of(repository.open_disk(second, "disk0")) == disk.content
    report = verify(repository)
    assert report.is_whole, report.findings
    assert prune(repository, [first.id]).forgotten == (first.id,)
    assert content_of(repository.open_disk(repository.backup(second.id), "disk0")) == disk.content
    assert verify(repository).is_whole
