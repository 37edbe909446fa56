"""A guest that starts from its backup: it reads what is not there yet, and all comes home, whoever is killed."""

from __future__ import annotations

import hashlib
import os
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest
from tests.framework.guest_console import logged_in
from tests.framework.providers import Control
from tests.framework.service import GUEST_S, Service
from tests.vm.test_reboot import reboot

from mullion.base.process import read_identity
from mullion.base.units import KIB, MIB
from mullion.model.states import OperationState
from mullion.model.views import ExportView, OperationView
from mullion.services.image.build import BuiltImage
from mullion.wire.nbd import NbdClient

pytestmark = [pytest.mark.vm, pytest.mark.timeout(900)]

SLOWLY = {"MULLION_HOMECOMING_RATE": str(16 * KIB)}
"""So that most of a disk is in its backup only, for as long as a test likes."""


def content_hash(service: Service, name: str, disk: str) -> str:
    """Of a disk of one file, of a stopped partition."""
    (found,) = service.cli("vhd", "hash", f"{service.paths.disks}/{name}-{disk}.vhd", "--format", "json").json
    return str(found["sha256"])


def homecoming(service: Service, name: str) -> OperationView:
    """The operation of a partition's way home, when it has ended."""
    with service.client() as client:
        (found,) = [view for view in client.operations() if view.target == f"homecoming/{name}"]
        return client.wait(found.id)


def wait_until(what: str, is_so: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + GUEST_S
    while not is_so():
        assert time.monotonic() < deadline_s, what
        time.sleep(0.05)


def wait_until_merged(service: Service) -> None:
    """Until each disk of `now` is one file."""
    names = ["now-disk0.vhd", "now-disk1.vhd"]
    wait_until(
        "layers are not merged",
        lambda: sorted(file for file in os.listdir(service.paths.disks) if file.startswith("now")) == names,
    )


def back_up(service: Service, image: BuiltImage, content: bytes, size_bytes: int) -> str:
    """Back up a partition that never ran, with a data disk that begins with this content; the backup's id."""
    with service.client() as client:
        client.create_disk(path="web", parent=image.path)
        client.create_disk(path="data", size_bytes=size_bytes)
    service.cli("vhd", "write", f"{service.paths.disks}/data.vhd", "--offset", "0", stdin=content)
    service.cli("partition", "create", "web", "--memory", "256M", "--disk", "web", "--disk", "data")
    with service.client() as client:
        client.add_repository("near", f"{service.home}/repository", "a passphrase", create=True)
        return str((client.wait(client.create_backup("web")).result or {})["backup"])


def kill_server(service: Service) -> None:
    """Kill the process that gives what is not home, once it is there."""
    identity_path = service.paths.partition("now").backup_server_identity
    wait_until("no server", lambda: read_identity(identity_path) is not None)
    server = read_identity(identity_path)
    assert server is not None
    server.send_signal(signal.SIGKILL)


def backings(service: Service) -> list[dict[str, Any] | None]:
    """What the provider says of each disk's way home."""
    control = Control(service.paths.partition("now").provider_control)
    try:
        answer = control.ask("status")
        while "disks" not in answer:  # an event that came first
            answer = control.receive()
    finally:
        control.close()
    return [disk["backing"] for disk in answer["disks"]]


def come_home_fast(service: Service) -> None:
    """By another service with another setting, and a provider that is killed."""
    service.environ["MULLION_HOMECOMING_RATE"] = "0"
    service.end()
    service.start()
    pid = service.partition("now").provider_pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)  # not by its identity: after `reboot` that is of a boot that only the service sees


def exported_hashes(export: ExportView) -> list[str]:
    """Of all disks of an export, read to the end."""
    found = []
    for disk in export.disks:
        digest = hashlib.sha256()
        with NbdClient(disk.uri.partition("?socket=")[2], disk.id, read_only=True) as client:
            for offset in range(0, client.size_bytes, 4 * MIB):
                buffer = bytearray(min(4 * MIB, client.size_bytes - offset))
                client.pread(offset, buffer)
                digest.update(buffer)
        found.append(digest.hexdigest())
    return found


def test_a_guest_lives_on_what_only_its_backup_has(service: Service, iocheck_image: BuiltImage) -> None:
    """Through kills, checkpoints with memory, a repository that goes away, and a power cut of the host."""
    service.environ.update(SLOWLY)
    service.start()
    content = os.urandom(56 * MIB)
    wanted = hashlib.sha256(content + bytes(8 * MIB)).hexdigest()
    backup = back_up(service, iocheck_image, content, 64 * MIB)
    repository = f"{service.home}/repository"
    service.cli("backup", "restore", backup, "--as", "now", "--instant")
    with service.client() as client:
        begun = client.partition_action("now", "start")
    kill_server(service)
    service.kill()
    service.start()
    with service.client() as client:
        client.wait(begun.id, check=False)
    service.wait_agent("now")
    checkpoints_with_memory(service)
    with logged_in(service, "now") as console:
        assert wanted in console.command("sha256sum /dev/vdb")
        console.command("echo 3 >/proc/sys/vm/drop_caches")
        moved = f"{repository}-moved"
        os.rename(repository, moved)
        kill_server(service)
        console.type("sha256sum /dev/vdb\n")
        wait_until("the guest does not wait", lambda: any(one and one["is_waited_for"] for one in backings(service)))
        wait_until("nobody is told", lambda: "wait" in str(service.partition("now").reason))
        with service.client() as client:
            later = client.create_checkpoint("now", "later")
            wait_until("it does not wait", lambda: "only the backup has" in str(client.operation(later.id).stage))
            find_moved(service, moved)
            client.wait(later.id)
        console.wait_for(wanted)
        console.command("echo flushed-$((40+2)) >/root/last; sync")
    os.rename(moved, f"{moved}-again")
    reboot(service, run_folder_survives=False)
    service.wait_state("now", "running")
    os.rename(f"{moved}-again", moved)
    service.wait_agent("now")
    with logged_in(service, "now") as console:
        assert "flushed-42" in console.command("cat /root/last")
        assert wanted in console.command("sha256sum /dev/vdb")
        assert service.partition("now").reason is not None, "all is home: nothing was tested"
    come_home_fast(service)
    assert homecoming(service, "now").state is OperationState.SUCCEEDED
    wait_until("the server stays", lambda: not os.path.exists(service.paths.partition("now").backing("disk1")))
    assert backings(service) == [None, None]
    for checkpoint in ("then", "later"):
        service.cli("checkpoint", "delete", "now", checkpoint)
    wait_until_merged(service)
    with logged_in(service, "now") as console:
        console.command("echo 3 >/proc/sys/vm/drop_caches")
        assert wanted in console.command("sha256sum /dev/vdb")


def find_moved(service: Service, place: str) -> None:
    """Say where the repository is now: only that one is believed, and only with its passphrase."""
    say = ("backup", "repository", "set", "near")
    wrong = service.cli(*say, place, "--passphrase-file", "-", stdin=b"another passphrase\n", check=False)
    assert "passphrase" in wrong.stderr
    service.cli(
        "backup", "repository", "add", "other", f"{place}-other", "--create", "--passphrase-file", "-", stdin=b"a b\n"
    )
    other = service.cli(*say, f"{place}-other", "--passphrase-file", "-", stdin=b"a b\n", check=False)
    assert "another repository" in other.stderr
    service.cli("backup", "repository", "remove", "other")
    service.cli(*say, place)


def checkpoints_with_memory(service: Service) -> None:
    """Back and forth, and files of both, while most blocks are not home."""
    with logged_in(service, "now") as console:
        console.command("echo then-$((40+2)) >/run/note; echo before >/root/note; sync")
        service.cli("checkpoint", "create", "now", "then", "--memory")
        console.command("rm /run/note; echo after >/root/note; dd if=/dev/zero of=/dev/vdb bs=1M count=9; sync")
    disk = ("--disk", "disk0", "--volume", "2")
    assert service.cli("files", "cat", "now@then:/root/note", *disk).stdout == "before\n"
    assert service.cli("files", "cat", "now:/root/note", *disk).stdout == "after\n"
    service.cli("checkpoint", "apply", "now", "then", "--yes")
    service.wait_agent("now")
    with logged_in(service, "now") as console:
        assert "then-42" in console.command("cat /run/note")
        assert "before" in console.command("cat /root/note")


def test_frozen_layers_are_read_before_all_is_home(service: Service, iocheck_image: BuiltImage) -> None:
    """Without a guest that writes, so that the disks can be compared: backups, exports, merges; and killed providers."""
    service.environ.update(SLOWLY)
    service.start()
    backup = back_up(service, iocheck_image, os.urandom(64 * MIB), 256 * MIB)
    service.cli("backup", "restore", backup, "--as", "full")
    wanted = [content_hash(service, "full", disk) for disk in ("disk0", "disk1")]
    service.cli("backup", "restore", backup, "--as", "now", "--instant")

    # Nothing is home, and the partition does not run.
    service.cli("checkpoint", "create", "now", "one")
    with service.client() as client:
        second = str((client.wait(client.create_backup("now")).result or {})["backup"])
    service.cli("backup", "restore", second, "--as", "copy")
    assert [content_hash(service, "copy", disk) for disk in ("disk0", "disk1")] == wanted
    assert "coming home from backup" in str(service.partition("now").reason)
    for words in (("prune", backup), ("repository", "remove", "near")):
        needed = service.cli("backup", *words, check=False)
        assert needed.status == 4, needed
        assert "coming home" in needed.stderr

    # It runs, and little is home.
    with service.client() as client:
        client.wait(client.partition_action("now", "start", paused=True))
        client.wait(client.create_checkpoint("now", "two"))
        client.wait(client.create_checkpoint("now", "three"))
        export = client.export_checkpoint("now", "two")
        assert exported_hashes(export) == wanted
        client.wait(client.delete_checkpoint("now", "one"))
        assert exported_hashes(export) == wanted

    # A killed provider; then all comes home while the export is there, and the export goes on.
    come_home_fast(service)
    assert homecoming(service, "now").state is OperationState.SUCCEEDED
    assert exported_hashes(export) == wanted
    service.cli("checkpoint", "unexport", "now", "two")
    wait_until("the server stays", lambda: not os.path.exists(service.paths.partition("now").backing("disk1")))
    for checkpoint in ("two", "three"):
        service.cli("checkpoint", "delete", "now", checkpoint)
    service.cli("backup", "repository", "remove", "near")
    wait_until_merged(service)
    service.cli("partition", "stop", "now", "--force")
    assert [content_hash(service, "now", disk) for disk in ("disk0", "disk1")] == wanted
