"""Repositories on real servers that refuse, stop, fill up and lie: each is told for what it is, and nothing is lost."""

from __future__ import annotations

import dataclasses
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.framework.backup_servers import (
    S3Server,
    SftpServer,
    end_group,
    free_port,
    s3_server,
    sftp_server,
    start_sshd,
)
from tests.framework.cut_line import CutLine, cut_line
from tests.framework.small_filesystem import small_filesystem
from tests.unit.repository.disks import MemoryDisk, back_up, content_of, scattered

from mullion.base.units import KIB, MIB
from mullion.repository import Backend, Repository
from mullion.repository.backend import Patience, Persistent
from mullion.repository.credentials import Credentials
from mullion.repository.errors import (
    HostKeyError,
    TargetDeniedError,
    TargetFaultError,
    TargetFullError,
    TargetTimeoutError,
    TargetUnreachableError,
)
from mullion.repository.local import FolderBackend
from mullion.repository.location import open_backend
from mullion.repository.prune import prune
from mullion.repository.s3 import S3Backend
from mullion.repository.sftp import SftpBackend
from mullion.repository.verify import verify

pytestmark = pytest.mark.interop

ROOM_BYTES = 4 * MIB


@pytest.fixture(scope="module")
def sftp(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SftpServer]:
    with sftp_server(tmp_path_factory.mktemp("sshd")) as server:
        yield server


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with s3_server(tmp_path_factory.mktemp("swift")) as server:
        yield server


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    with small_filesystem(tmp_path / "small", ROOM_BYTES) as folder:
        yield folder


@pytest.fixture
def silent() -> Iterator[int]:
    """A port where connections are taken and nothing is ever said."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield int(server.getsockname()[1])


def on_sftp(server: SftpServer, folder: Path, **changes: object) -> SftpBackend:
    fields: dict[str, object] = {"user": server.user, "port": server.port} | changes
    credentials = fields.pop("credentials", server.credentials)
    assert isinstance(credentials, Credentials)
    return SftpBackend("127.0.0.1", str(folder), credentials, **fields)  # type: ignore[arg-type]


def on_s3(server: S3Server, bucket: str = "backup", **changes: str) -> S3Backend:
    credentials = dataclasses.replace(server.credentials, **changes)
    return S3Backend(bucket, f"for-{os.urandom(4).hex()}", credentials, endpoint=server.endpoint)


# ---------------------------------------------------------------------- SFTP


def test_sftp_place_as_people_write_it(sftp: SftpServer, tmp_path: Path) -> None:
    place = f"sftp://{sftp.user}@127.0.0.1:{sftp.port}{tmp_path}/repository"
    backend = open_backend(place, sftp.credentials, create=True)
    assert backend.location == place
    Repository.create(backend, "secret", scrypt_log2_n=10).close()
    with Repository.open(open_backend(place, sftp.credentials), "secret") as repository:
        assert repository.backups() == []
    assert oct((tmp_path / "repository").stat().st_mode & 0o777) == "0o700"


def test_sftp_unknown_host(sftp: SftpServer, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    unknown = dataclasses.replace(sftp.credentials, known_hosts=str(tmp_path / "empty"))
    with pytest.raises(HostKeyError, match="is not in"):
        on_sftp(sftp, tmp_path, credentials=unknown).size("config")
    nowhere = dataclasses.replace(sftp.credentials, known_hosts=str(tmp_path / "none"))
    with pytest.raises(HostKeyError, match="cannot be read"):
        on_sftp(sftp, tmp_path, credentials=nowhere).size("config")


def test_sftp_another_host_s_key(sftp: SftpServer, tmp_path: Path) -> None:
    kind, key = (sftp.folder / "user_key.pub").read_text().split()[:2]
    (tmp_path / "wrong").write_text(f"[127.0.0.1]:{sftp.port} {kind} {key}\n")
    wrong = dataclasses.replace(sftp.credentials, known_hosts=str(tmp_path / "wrong"))
    with pytest.raises(HostKeyError, match="another than"):
        on_sftp(sftp, tmp_path, credentials=wrong).size("config")


def test_sftp_key_that_is_not_accepted(sftp: SftpServer, tmp_path: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / "other")], check=True)
    other = dataclasses.replace(sftp.credentials, sftp_key_file=str(tmp_path / "other"))
    with pytest.raises(TargetDeniedError):
        on_sftp(sftp, tmp_path, credentials=other).size("config")


def test_sftp_nobody_listens(sftp: SftpServer, tmp_path: Path) -> None:
    with pytest.raises(TargetUnreachableError, match="cannot be reached"):
        on_sftp(sftp, tmp_path, port=free_port()).size("config")


def test_sftp_silence(sftp: SftpServer, tmp_path: Path, silent: int) -> None:
    with pytest.raises((TargetTimeoutError, TargetUnreachableError)):
        on_sftp(sftp, tmp_path, port=silent, connect_timeout_s=0.3).size("config")


def test_sftp_full(sftp: SftpServer, small: Path) -> None:
    backend = on_sftp(sftp, small / "repository")
    goes_on_when_there_is_room(backend, small / "ballast")
    backend.close()


def test_sftp_names_are_made_durable(sftp: SftpServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenSSH opens a folder as it does a file, and syncs it: what an object's name is in, and what is settled."""
    synced: list[str] = []
    sync = SftpBackend._sync_folder

    def said(self: SftpBackend, connection: Any, folder: str) -> None:
        sync(self, connection, folder)
        if self._can_sync_folders:
            synced.append(folder)

    monkeypatch.setattr(SftpBackend, "_sync_folder", said)
    backend = on_sftp(sftp, tmp_path / "repository")
    backend.put("packs/aa", [b"x"])
    backend.put("leases/bb", [b"x"], durable=False)
    backend.delete("packs/aa")
    backend.settle("packs")
    backend.settle("index")  # which nobody has made
    assert synced == ["packs", "packs"]
    backend.close()


def test_sftp_connection_lost_and_found(tmp_path: Path) -> None:
    """The server goes away with all of its sessions; the first call after that says so, tried again it works."""
    with sftp_server(tmp_path / "sshd") as server:
        backend = on_sftp(server, tmp_path / "repository")
        backend.put("config", [b"x"])
        end_group(server.process)
        _end_sessions(backend)
        with pytest.raises(TargetUnreachableError):
            backend.get("config")
        with pytest.raises(TargetUnreachableError):
            backend.put("index/aa", [b"y"])
        waits: list[float] = []
        again: list[subprocess.Popen[bytes]] = []

        def restart(wait_s: float) -> None:
            waits.append(wait_s)
            if len(waits) == 2:
                again.append(start_sshd(server.folder, server.port))

        persistent = Persistent(backend, Patience(tries=4), sleep=restart)
        try:
            persistent.put("index/bb", [b"z"])
            assert waits == [0.5, 1.0]
            assert persistent.get("config") == b"x"
            persistent.close()
        finally:
            for process in again:
                end_group(process)


def _end_sessions(backend: SftpBackend) -> None:
    """Sessions of sshd are in sessions of their own: the connection is cut from our side of the network."""
    assert backend._ssh is not None
    transport = backend._ssh.get_transport()
    assert transport is not None
    transport.sock.shutdown(socket.SHUT_RDWR)


# ---------------------------------------------------------------------- S3


def test_s3_place_as_people_write_it(s3: S3Server) -> None:
    place = f"s3+http://127.0.0.1:{s3.port}/backup/some/where"
    Repository.create(open_backend(place, s3.credentials, create=True), "secret", scrypt_log2_n=10).close()
    with Repository.open(open_backend(place, s3.credentials), "secret") as repository:
        assert repository.backups() == []


@pytest.mark.parametrize(
    "changes",
    [
        {"s3_secret_key": "wrong"},
        {"s3_access_key": "nobody"},
        {"s3_access_key": "test:reader", "s3_secret_key": "reading"},
    ],
)
def test_s3_wrong_credentials(s3: S3Server, changes: dict[str, str]) -> None:
    backend = on_s3(s3, **changes)
    with pytest.raises(TargetDeniedError):
        backend.put("config", [b"x"])
    with pytest.raises(TargetDeniedError):
        list(backend.list(""))
    assert "wrong" not in repr(dataclasses.replace(s3.credentials, **changes))


def test_s3_no_key_at_all(s3: S3Server) -> None:
    with pytest.raises(TargetDeniedError, match="no access key"):
        on_s3(s3, s3_access_key="")


def test_s3_no_such_bucket(s3: S3Server) -> None:
    backend = on_s3(s3, "no-such-bucket")
    for act in (lambda: backend.put("config", [b"x"]), lambda: backend.get("config"), lambda: list(backend.list(""))):
        with pytest.raises(TargetFaultError, match="no such bucket"):
            act()


def test_s3_quota(s3: S3Server) -> None:
    backend = on_s3(s3, "backup-small")

    def put_all() -> None:
        for number in range(5):
            backend.put(f"packs/{number}", [bytes(100_000)])

    with pytest.raises(TargetFullError):
        put_all()
    for number in range(5):
        backend.delete(f"packs/{number}")


def test_s3_nobody_listens(s3: S3Server) -> None:
    backend = S3Backend("backup", "", s3.credentials, endpoint=f"http://127.0.0.1:{free_port()}")
    with pytest.raises(TargetUnreachableError):
        backend.get("config")


def test_s3_silence(s3: S3Server, silent: int) -> None:
    backend = S3Backend("backup", "", s3.credentials, endpoint=f"http://127.0.0.1:{silent}", request_timeout_s=0.3)
    with pytest.raises(TargetTimeoutError):
        backend.put("config", [b"x"])


def test_s3_connection_cut_in_the_middle_of_an_answer(s3: S3Server) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            connection.recv(65536)
            connection.sendall(
                b'HTTP/1.1 200 OK\r\nContent-Length: 1000\r\nETag: "x"\r\n'
                b"Last-Modified: Thu, 26 Nov 2026 00:00:00 GMT\r\n\r\nhalf"
            )
            connection.close()

        thread = threading.Thread(target=answer)
        thread.start()
        backend = S3Backend("backup", "", s3.credentials, endpoint=f"http://127.0.0.1:{server.getsockname()[1]}")
        with pytest.raises((TargetUnreachableError, TargetFaultError)):
            backend.get("config")
        thread.join()


# ---------------------------------------------------------------------- a folder


def test_folder_full(small: Path) -> None:
    goes_on_when_there_is_room(FolderBackend.create(str(small / "repository")), small / "ballast")
    assert os.listdir(small / "repository" / "packs")


def test_folder_that_went_away(tmp_path: Path) -> None:
    backend = FolderBackend.create(str(tmp_path / "repository"))
    backend.put("config", [b"x"])
    (tmp_path / "repository").rename(tmp_path / "elsewhere")
    with pytest.raises(TargetUnreachableError, match="not there any more"):
        backend.get("config")
    with pytest.raises(TargetUnreachableError):
        backend.put("packs/aa", [b"x"])


def test_folder_that_is_read_only(small: Path) -> None:
    backend = FolderBackend.create(str(small / "repository"))
    backend.put("config", [b"x"])
    subprocess.run(["mount", "-o", "remount,ro", str(small)], check=True)
    with pytest.raises(TargetDeniedError):
        backend.put("index/aa", [b"x"])
    assert backend.get("config") == b"x"


def goes_on_when_there_is_room(backend: Backend, ballast: Path) -> None:
    """A backup that fills the storage is refused by name; with room it goes on from what is there."""
    repository = Repository.create(backend, "secret", scrypt_log2_n=10)
    first = MemoryDisk(scattered(256 * KIB, 1))
    manifest = back_up(repository, first)
    ballast.write_bytes(bytes(MIB))
    second = MemoryDisk(os.urandom(3 * MIB))
    with pytest.raises(TargetFullError):
        back_up(repository, second)
    assert verify(repository).is_whole
    assert content_of(repository.open_disk(manifest, "disk0")) == first.content
    ballast.unlink()
    manifest = back_up(repository, second)
    assert content_of(repository.open_disk(manifest, "disk0")) == second.content
    assert prune(repository, [repository.backups()[0].id]).kept == 1


# ---------------------------------------------------------------------- a network that breaks


class SmallSftp(SftpBackend):
    pack_bytes = 256 * KIB


class SmallS3(S3Backend):
    pack_bytes = 256 * KIB


@pytest.fixture(params=["sftp", "s3"])
def far(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Backend, CutLine]]:
    """A storage behind a line that can be cut, tried twice."""
    server = request.getfixturevalue(request.param)
    with cut_line(server.port) as line:
        inner: Backend
        if isinstance(server, SftpServer):
            known = (server.folder / "known_hosts").read_text().replace(f":{server.port}", f":{line.port}")
            (tmp_path / "known_hosts").write_text(known)
            credentials = dataclasses.replace(server.credentials, known_hosts=str(tmp_path / "known_hosts"))
            folder = str(tmp_path / "repository")
            inner = SmallSftp("127.0.0.1", folder, credentials, user=server.user, port=line.port)
        else:
            prefix = f"for-{os.urandom(4).hex()}"
            inner = SmallS3("backup", prefix, server.credentials, endpoint=f"http://127.0.0.1:{line.port}")
        backend = Persistent(inner, Patience(tries=2), sleep=lambda _: None)
        yield backend, line
        backend.close()


def test_a_network_lost_in_a_backup_says_so_and_what_was_stored_is_used(far: tuple[Backend, CutLine]) -> None:
    backend, line = far
    repository = Repository.create(backend, "secret", scrypt_log2_n=10)
    disk = MemoryDisk(os.urandom(3 * MIB))
    for cut_bytes in (100_000, 900_000, 2_000_000):
        line.cut_after(cut_bytes)
        with pytest.raises((TargetUnreachableError, TargetTimeoutError, TargetFaultError)) as raised:
            back_up(repository, disk)
        assert raised.value.remedy
        line.cut_after(None)
    assert line.cuts == 3
    before = line.carried_bytes
    manifest = back_up(repository, disk)
    assert line.carried_bytes - before < 2 * MIB, "what the tries before had stored was sent again"
    assert verify(repository).is_whole
    assert content_of(repository.open_disk(manifest, "disk0")) == disk.content


def test_a_network_lost_in_a_restore_says_so_and_writes_nothing_wrong(far: tuple[Backend, CutLine]) -> None:
    backend, line = far
    repository = Repository.create(backend, "secret", scrypt_log2_n=10)
    disk = MemoryDisk(os.urandom(2 * MIB))
    manifest = back_up(repository, disk)
    for cut_bytes in (50_000, 700_000):
        line.cut_after(cut_bytes)
        target = MemoryDisk(bytes(2 * MIB))
        with pytest.raises((TargetUnreachableError, TargetTimeoutError, TargetFaultError)):
            repository.open_disk(manifest, "disk0").restore(target)
        line.cut_after(None)
        written = [at for at in range(0, 2 * MIB, 64 * KIB) if any(target.content[at : at + 64 * KIB])]
        assert all(target.content[at : at + 64 * KIB] == disk.content[at : at + 64 * KIB] for at in written)
    target = MemoryDisk(bytes(2 * MIB))
    repository.open_disk(manifest, "disk0").restore(target)
    assert target.content == disk.content


# ---------------------------------------------------------------------- killed

_WRITER = """
import sys
from tests.unit.repository.disks import MemoryDisk, scattered
from mullion.repository import Repository, begin_backup
from mullion.repository.local import FolderBackend
class Small(FolderBackend):
    pack_bytes = 65536
repository = Repository.open(Small(sys.argv[1]), "secret")
disk = MemoryDisk(scattered(8 << 20, 9, pieces=60))
while True:
    with begin_backup(repository, "web") as backup:
        backup.add_disk("disk0", disk)
        manifest = backup.commit()
        print(manifest.id, flush=True)
    disk.pwrite(disk.content.find(bytes(4096)), bytes([len(repository.backup_ids()) % 255 + 1]) * 4096)
"""


def test_killed_at_any_instant(tmp_path: Path) -> None:
    """kill -9 after each of several amounts of output; what was announced is there, and the repository goes on."""
    folder = str(tmp_path / "repository")
    Repository.create(FolderBackend.create(folder), "secret", scrypt_log2_n=10).close()
    announced: list[str] = []
    root = str(Path(__file__).parents[2])
    for number in range(4):
        writer = subprocess.Popen(
            [sys.executable, "-c", _WRITER, folder],
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": root},
        )
        assert writer.stdout is not None
        announced += [writer.stdout.readline().decode().strip() for _ in range(number % 3 + 1)]
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        announced += writer.stdout.read().decode().split()
        writer.stdout.close()
        with Repository.open(FolderBackend(folder), "secret") as repository:
            report = verify(repository)
            assert report.is_whole, report
            assert set(filter(None, announced)) <= set(repository.backup_ids())
    with Repository.open(FolderBackend(folder), "secret") as repository:
        assert prune(repository, announced[:-1]).kept >= 1  # the dead do not hold their leases
        assert verify(repository).is_whole
