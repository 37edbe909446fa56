"""A guest that starts from its backup: it reads what is not there yet, and all comes home, whoever is killed."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

import pytest
from tests.framework.guest_console import logged_in
from tests.framework.service import GUEST_S, Service
from tests.vm.test_survival import start_guest

from mullion.base.process import read_identity
from mullion.base.units import MIB
from mullion.model.definition import Transport
from mullion.model.states import OperationState
from mullion.model.views import OperationView
from mullion.services.image.build import BuiltImage

pytestmark = [pytest.mark.vm, pytest.mark.timeout(900)]


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


def test_a_guest_starts_from_its_backup(service: Service, iocheck_image: BuiltImage) -> None:
    service.start()
    start_guest(service, iocheck_image, "web", Transport.NBD)
    with logged_in(service, "web") as console:
        console.command("dd if=/dev/urandom of=/dev/vdb bs=1M count=56 && sync")
        wanted = console.command("sha256sum /dev/vdb").split()[-2]
    service.cli("partition", "stop", "web")
    with service.client() as client:
        client.add_repository("near", f"{service.home}/repository", "a passphrase", create=True)
        backup = str((client.wait(client.create_backup("web")).result or {})["backup"])
    service.cli("backup", "restore", backup, "--as", "full")
    service.cli("backup", "restore", backup, "--as", "now", "--instant")
    with service.client() as client:
        begun = client.partition_action("now", "start")
    identity_path = service.paths.partition("now").backup_server_identity
    wait_until("no server", lambda: read_identity(identity_path) is not None)
    server = read_identity(identity_path)
    assert server is not None
    server.send_signal(signal.SIGKILL)
    service.kill()
    service.start()
    with service.client() as client:
        client.wait(begun.id, check=False)
    service.wait_agent("now")
    with logged_in(service, "now") as console:
        assert wanted in console.command("sha256sum /dev/vdb")
        console.command("dd if=/dev/zero of=/dev/vdb bs=1M seek=8 count=1 conv=notrunc && sync")
    assert homecoming(service, "now").state is OperationState.SUCCEEDED
    wait_until("the server stays", lambda: not os.path.exists(service.paths.partition("now").backing("disk1")))
    status = service.cli("provider", "show", "now", "--format", "json").json
    assert [disk.get("backing") for disk in status["disks"]] == [None, None]
    wait_until_merged(service)
    service.cli("partition", "stop", "now")
    assert service.cli("checkpoint", "create", "now").status == 0


def test_what_came_home_is_what_was_backed_up(service: Service, iocheck_image: BuiltImage) -> None:
    """Without a guest that writes, so that the disks can be compared; and killed providers go on."""
    service.start()
    with service.client() as client:
        client.create_disk(path="web", parent=iocheck_image.path)
        client.create_disk(path="data", size_bytes=256 * MIB)
    service.cli("vhd", "write", f"{service.paths.disks}/data.vhd", "--offset", "0", stdin=os.urandom(192 * MIB))
    service.cli("partition", "create", "web", "--memory", "128M", "--disk", "web", "--disk", "data")
    with service.client() as client:
        client.add_repository("near", f"{service.home}/repository", "a passphrase", create=True)
        backup = str((client.wait(client.create_backup("web")).result or {})["backup"])
    service.cli("backup", "restore", backup, "--as", "full")
    service.cli("backup", "restore", backup, "--as", "now", "--instant")
    service.cli("checkpoint", "create", "now", "empty")
    assert "coming home from backup" in str(service.partition("now").reason)
    for words in (("prune", backup), ("repository", "remove", "near")):
        needed = service.cli("backup", *words, check=False)
        assert needed.status == 4, needed
        assert "coming home" in needed.stderr
    with service.client() as client:
        client.wait(client.partition_action("now", "start", paused=True))
    provider = service.provider("now")
    assert provider is not None
    provider.send_signal(signal.SIGKILL)
    service.cli("checkpoint", "create", "now", "half")
    assert homecoming(service, "now").state is OperationState.SUCCEEDED
    service.cli("checkpoint", "delete", "now", "empty")
    service.cli("checkpoint", "delete", "now", "half")
    wait_until_merged(service)
    service.cli("partition", "stop", "now", "--force")
    for disk in ("disk0", "disk1"):
        assert content_hash(service, "now", disk) == content_hash(service, "full", disk)
