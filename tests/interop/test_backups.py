"""Backups through the real service, into a folder, onto an SFTP server and into an S3 bucket; and all that goes wrong."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.framework.backup_servers import SftpServer, end_group, s3_server, sftp_server, start_sshd
from tests.framework.service import Command, Service
from tests.framework.small_filesystem import small_filesystem
from tests.interop.filesystem_images import make_ext

from mullion.base.units import MIB
from mullion.model.states import OperationState

pytestmark = pytest.mark.interop

PASSPHRASE = f"correct-horse-battery-{os.urandom(8).hex()}"  # of this run alone: other processes are searched for it
OTHER_PASSPHRASE = f"stapler-{os.urandom(8).hex()}"
PATIENCE_S = 60.0
BIG_BYTES = 96 * MIB
"""Several packs: between the first and the last there is time for accidents."""


@pytest.fixture
def service(short_tmp: Path) -> Iterator[Service]:
    made = Service(str(short_tmp))
    made.start()
    try:
        (short_tmp / "passphrase").write_text(f"{PASSPHRASE}\n")
        (short_tmp / "passphrase").chmod(0o600)
        yield made
    finally:
        made.end()


def add_repository(service: Service, name: str, place: str, credentials: dict[str, str] | None = None) -> None:
    words = ["backup", "repository", "add", name, place, "--create"]
    words += ["--passphrase-file", f"{service.home}/passphrase"]
    if credentials:
        path = Path(service.home, f"{name}.toml")
        path.write_text("".join(f'{field} = "{value}"\n' for field, value in credentials.items()))
        path.chmod(0o600)
        words += ["--credentials-file", str(path)]
    service.cli(*words)


def change_passphrase(service: Service, name: str, passphrase: str) -> Command:
    words = ("backup", "repository", "passphrase", name, "--passphrase-file", "-")
    return service.cli(*words, stdin=f"{passphrase}\n".encode())


def known_by(service: Service, place: str, name: str, passphrase: str) -> Command:
    """What becomes of it when another host wants to know the repository with this passphrase."""
    words = ("backup", "repository", "add", name, place, "--passphrase-file", "-")
    return service.cli(*words, stdin=f"{passphrase}\n".encode(), check=False)


def content_hash(service: Service, path: str) -> str:
    (found,) = service.cli("vhd", "hash", path, "--format", "json").json
    return str(found["sha256"])


def backups(service: Service, repository: str) -> list[dict[str, Any]]:
    found = service.cli("backup", "list", "--repository", repository, "--format", "json").json
    assert isinstance(found, list)
    return found


def checkpoint_count(service: Service, partition: str) -> int:
    with service.client() as client:
        return len(client.checkpoints(partition).checkpoints)


def secret_places(service: Service, secret: str) -> list[str]:
    """Where a secret can be read that is not its own file: files of the service, other processes."""
    found = [
        str(path)
        for path in Path(service.home).rglob("*")
        if path.is_file() and not path.is_relative_to(service.paths.secrets) and secret.encode() in path.read_bytes()
    ]
    for process in Path("/proc").glob("[0-9]*"):
        for what in ("cmdline", "environ"):
            with contextlib.suppress(OSError):
                if secret.encode() in (process / what).read_bytes():
                    found.append(f"{what} of process {process.name}")
    return found


def test_the_whole_way_over_every_kind_of_storage(service: Service, tmp_path: Path) -> None:
    service.cli("partition", "create", "web", "--memory", "128M", "--disk", "web,size=64M")
    service.write("web", MIB, os.urandom(3 * MIB))
    (tmp_path / "tree/etc").mkdir(parents=True)
    (tmp_path / "tree/etc/hostname").write_text("from-the-backup\n")
    image = make_ext(tmp_path / "image", tmp_path / "tree")
    service.cli("vhd", "convert", str(image), f"{service.paths.disks}/mail.vhd", "--from", "raw")
    service.cli("partition", "create", "mail", "--memory", "128M", "--disk", "mail")
    with sftp_server(tmp_path / "sshd") as sftp, s3_server(tmp_path / "swift") as s3:
        keys = {name: str(getattr(s3.credentials, name)) for name in ("s3_access_key", "s3_secret_key")}
        add_repository(service, "near", f"{service.home}/near")
        add_repository(service, "shell", sftp_place(sftp, tmp_path / "far"), sftp_credentials(sftp))
        add_repository(service, "bucket", f"s3+{s3.endpoint}/backup/web", keys)
        for name in ("near", "shell", "bucket"):
            there_and_back(service, name)
            files_out_of_it(service, name, tmp_path)
        copies = {name: Path(service.paths.index_cache(name)) for name in ("near", "shell", "bucket")}
        assert sorted(os.listdir(copies["shell"])) == sorted(os.listdir(tmp_path / "far/index"))
        assert not copies["near"].exists()
        assert stat_bits(copies["bucket"]) == "0o700"
        for name in ("shell", "bucket"):
            change_passphrase(service, name, OTHER_PASSPHRASE)
            assert len(backups(service, name)) == 3
        service.cli("backup", "repository", "remove", "bucket")
        assert not copies["bucket"].exists()
        assert secret_places(service, PASSPHRASE) == [f"{service.home}/passphrase"]
        assert secret_places(service, OTHER_PASSPHRASE) == []
        assert secret_places(service, keys["s3_secret_key"]) == [f"{service.home}/bucket.toml"]
    assert stat_bits(service.paths.secrets) == "0o700"
    for path in Path(service.paths.secrets).iterdir():
        assert stat_bits(path) == "0o600", path

    service.cli("backup", "repository", "remove", "near")
    wrong = service.cli(
        "backup", "repository", "add", "near", f"{service.home}/near", "--passphrase-file", "-",
        stdin=b"wrong\n", check=False,
    )  # fmt: skip
    assert wrong.status == 12
    assert "passphrase" in wrong.stderr


def stat_bits(path: str | Path) -> str:
    return oct(os.stat(path).st_mode & 0o777)


def sftp_place(server: SftpServer, folder: Path) -> str:
    return f"sftp://{server.user}@127.0.0.1:{server.port}{folder}"


def sftp_credentials(server: SftpServer) -> dict[str, str]:
    credentials = server.credentials
    return {"sftp_key_file": str(credentials.sftp_key_file), "known_hosts": str(credentials.known_hosts)}


def there_and_back(service: Service, repository: str) -> None:
    service.cli("backup", "create", "web", "--repository", repository)
    service.write("web", 8 * MIB, os.urandom(MIB))
    service.cli("backup", "create", "web", "--repository", repository)
    first, second = backups(service, repository)
    assert second["base"] == first["id"]
    assert sum(disk["read_bytes"] for disk in first["disks"]) >= 3 * MIB
    assert sum(disk["read_bytes"] for disk in second["disks"]) < 3 * MIB
    assert "whole: 2 backups" in service.cli("backup", "verify", "--repository", repository).stdout
    service.cli("backup", "restore", second["id"], "--as", f"from-{repository}", "--repository", repository)
    assert content_hash(service, f"{service.paths.disks}/from-{repository}-disk0.vhd") == content_hash(
        service, service.head_of("web")
    )


def files_out_of_it(service: Service, repository: str, folder: Path) -> None:
    """Single files out of a backup, by a reader that sees only what the reader of the repository gives it."""
    made = service.cli("backup", "create", "mail", "--repository", repository, "--format", "json").json
    where = (f"{made['result']['backup'][:8]}:/etc/hostname", "--repository", repository)
    assert service.cli("backup", "ls", *where).stdout == "hostname\n"
    assert service.cli("backup", "cat", *where).stdout == "from-the-backup\n"
    (folder / repository).mkdir()
    service.cli("backup", "get", where[0], str(folder / repository), *where[1:])
    assert (folder / repository / "hostname").read_text() == "from-the-backup\n"
    volumes = service.cli("backup", "ls", where[0][:8], "--volumes", *where[1:], "--format", "json").json
    assert [volume["filesystem"] for volume in volumes] == ["ext4"]
    missing = service.cli("backup", "cat", f"{where[0]}s", *where[1:], check=False)
    assert missing.status == 3


# ------------------------------------------------------------------------------------------------------------- accidents


def workers(service: Service) -> list[int]:
    """The processes that work on repositories for this service."""
    assert service.process is not None
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError):
            words = (process / "cmdline").read_bytes().split(b"\0")
            parent = int((process / "stat").read_text().rpartition(")")[2].split()[1])
            if b"mullion.services.backup.worker" in words and parent == service.process.pid:
                found.append(int(process.name))
    return found


def interrupted(service: Service, repository: str, packs: Path, accident: Callable[[], None]) -> Any:
    """A backup of `big`, with an accident when it has stored its first pack; the operation in the end."""
    with service.client() as client:
        begun = client.create_backup("big", repository=repository)
    deadline_s = time.monotonic() + PATIENCE_S
    while not [path for path in packs.rglob("*") if path.is_file() and path.stat().st_size > MIB]:
        assert time.monotonic() < deadline_s, "nothing is stored"
        time.sleep(0.005)
    (worker,) = workers(service)
    os.kill(worker, signal.SIGSTOP)  # so that it cannot be faster than we are
    accident()
    with contextlib.suppress(ProcessLookupError):
        os.kill(worker, signal.SIGCONT)
    with service.client() as client:
        return client.wait(begun.id, check=False)


def resumed(service: Service, repository: str, packs: Path) -> None:
    """The next backup uses what was stored, and is right."""
    before = len(backups(service, repository))
    with service.client() as client:
        done = client.wait(client.create_backup("big", repository=repository).id)
    assert done.state is OperationState.SUCCEEDED, done.error
    assert (done.result or {})["read_bytes"] >= BIG_BYTES
    stored_bytes = sum(path.stat().st_size for path in packs.rglob("*") if path.is_file())
    assert BIG_BYTES <= stored_bytes < BIG_BYTES + MIB, "what was stored is not stored again"
    assert len(backups(service, repository)) == before + 1
    assert "whole: " in service.cli("backup", "verify", "--repository", repository).stdout


def test_accidents_cost_nothing_that_was_stored(service: Service, tmp_path: Path) -> None:
    service.cli("partition", "create", "big", "--memory", "128M", "--disk", "big,size=128M")
    service.write("big", 0, os.urandom(BIG_BYTES))

    with sftp_server(tmp_path / "sshd") as sftp:
        add_repository(service, "shell", sftp_place(sftp, tmp_path / "far"), sftp_credentials(sftp))
        lost = interrupted(service, "shell", tmp_path / "far/packs", lambda: end_sshd(sftp))
        assert lost.error is not None, lost
        assert lost.error.code == "target-unreachable"
        assert checkpoint_count(service, "big") == 0
        again = start_sshd(sftp.folder, sftp.port)
        try:
            resumed(service, "shell", tmp_path / "far/packs")
            service.cli("backup", "repository", "remove", "shell")
        finally:
            end_group(again)

    add_repository(service, "near", f"{service.home}/near")
    ended = interrupted(service, "near", Path(service.home, "near/packs"), lambda: crash(service))
    assert ended.error.code == "interrupted"
    assert "mullion backup create big" in ended.error.remedy
    assert checkpoint_count(service, "big") == 0
    resumed(service, "near", Path(service.home, "near/packs"))


def end_sshd(server: SftpServer) -> None:
    """The server and the sessions, which are in groups of their own."""
    sessions = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
    end_group(server.process)
    for session in sessions:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(int(session), signal.SIGKILL)


def crash(service: Service) -> None:
    service.kill()
    service.start()


def test_a_damaged_repository_is_repaired_and_filled_again(service: Service) -> None:
    service.cli("partition", "create", "web", "--memory", "128M", "--disk", "web,size=64M")
    service.write("web", 0, os.urandom(8 * MIB))
    add_repository(service, "near", f"{service.home}/near")
    service.cli("backup", "create", "web")
    (pack,) = [path for path in Path(service.home, "near/packs").rglob("*") if path.is_file()]
    with open(pack, "r+b") as file:
        file.seek(MIB)
        file.write(b"rubbish")
    found = service.cli("--quiet", "backup", "verify", check=False)
    assert (found.status, found.stderr) == (11, "")
    assert " backup repair near" in found.stdout
    repaired = service.cli("backup", "repair", "near", check=False)
    assert repaired.status == 11
    (hurt,) = backups(service, "near")
    assert "1 lost" in repaired.stdout
    assert f"backup {hurt['id']} is hurt" in repaired.stdout
    assert f"packs/{pack.name} is left" in repaired.stdout
    service.cli("backup", "create", "web", "--full")
    assert service.cli("backup", "repair", "near", "--discard").status == 0
    assert not pack.exists()
    assert "whole: 2 backups" in service.cli("backup", "verify").stdout
    newest = backups(service, "near")[-1]
    service.cli("backup", "restore", newest["id"], "--as", "again")
    assert content_hash(service, f"{service.paths.disks}/again-disk0.vhd") == content_hash(
        service, service.head_of("web")
    )


def test_a_passphrase_is_changed_whoever_is_killed(service: Service) -> None:
    service.cli("partition", "create", "web", "--memory", "128M", "--disk", "web,size=64M")
    service.write("web", 0, os.urandom(8 * MIB))
    place = f"{service.home}/near"
    add_repository(service, "near", place)
    service.cli("backup", "create", "web")
    words = ("backup", "repository", "passphrase", "near")
    unasked = service.cli(*words, environ={"MULLION_REPOSITORY_PASSPHRASE": PASSPHRASE}, check=False)
    assert unasked.status == 2, "what is in the environment is the present one"
    assert "--passphrase-file" in unasked.stderr

    with service.client() as client:
        begun = client.change_repository_passphrase("near", OTHER_PASSPHRASE)
    deadline_s = time.monotonic() + PATIENCE_S
    while not (found := workers(service)):
        assert time.monotonic() < deadline_s, "nobody works on it"
    for worker in found:
        os.kill(worker, signal.SIGSTOP)
    crash(service)
    for worker in found:
        os.kill(worker, signal.SIGCONT)
    with service.client() as client:
        client.wait(begun.id)
    assert known_by(service, place, "old", PASSPHRASE).status == 12
    assert known_by(service, place, "elsewhere", OTHER_PASSPHRASE).status == 0

    third = f"{OTHER_PASSPHRASE}-and-more"
    with service.client() as client:
        backup = client.create_backup("web", repository="near", full=True)
        assert "Tell other hosts" in change_passphrase(service, "near", third).stderr
        client.wait(backup.id)
    assert "whole: 2 backups" in service.cli("backup", "verify", "--repository", "near").stdout
    refused = service.cli("backup", "list", "--repository", "elsewhere", check=False)
    assert refused.status == 12
    assert "backup repository set NAME --passphrase-file" in refused.stderr
    service.cli("backup", "repository", "set", "elsewhere", "--passphrase-file", "-", stdin=f"{third}\n".encode())
    assert len(backups(service, "elsewhere")) == 2
    assert secret_places(service, OTHER_PASSPHRASE) == []
    assert stat_bits(f"{service.paths.secrets}/repository-near.json") == "0o600"


def test_a_full_target_and_a_partition_that_goes(service: Service, tmp_path: Path) -> None:
    service.cli("partition", "create", "big", "--memory", "128M", "--disk", "big,size=128M")
    service.write("big", 0, os.urandom(BIG_BYTES))
    with small_filesystem(tmp_path / "small", 48 * MIB) as small:
        add_repository(service, "small", f"{small}/repository")
        full = service.cli("backup", "create", "big", "--repository", "small", check=False)
        assert full.status == 9
        assert "backup prune" in full.stderr
        assert checkpoint_count(service, "big") == 0
        subprocess.run(["mount", "-o", "remount,size=160M", str(small)], check=True)
        resumed(service, "small", small / "repository/packs")
        service.cli("backup", "repository", "remove", "small")

    add_repository(service, "near", f"{service.home}/near")
    interrupted(
        service,
        "near",
        Path(service.home, "near/packs"),
        lambda: service.cli("partition", "delete", "big", "--with-disks", "--yes") and None,
    )
    assert "whole: " in service.cli("backup", "verify", "--repository", "near").stdout
    assert os.listdir(service.paths.disks) == []
    service.cli("partition", "create", "big", "--memory", "128M", "--disk", "big,size=64M")
    with service.client() as client:
        done = client.wait(client.create_backup("big", repository="near").id)
    assert done.state is OperationState.SUCCEEDED, done.error
