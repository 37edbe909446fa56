"""Checkpoints of a guest that verifies its own I/O: made, applied and deleted while it runs."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.framework.guest_console import GuestConsole, logged_in
from tests.framework.service import GUEST_S, Service
from tests.vm.test_survival import begin_iocheck, end_iocheck, start_guest, wait_for_another_provider, wait_for_writes

from mullion.base.units import MIB
from mullion.model.definition import DiskAttachment, PartitionDefinition, Transport
from mullion.services.image.build import BuiltImage
from mullion.vhd import create_fixed, inspect_chain
from mullion.vhd.layout import DiskType
from mullion.wire.nbd import NbdClient

pytestmark = [pytest.mark.vm, pytest.mark.timeout(900)]

ROUNDS = 4
SYSCTL = Path("/proc/sys/vm/unprivileged_userfaultfd")


def layer_files(service: Service, name: str) -> set[str]:
    """The files of a partition's disks in the pool."""
    return {file for file in os.listdir(service.paths.disks) if file.startswith(name)}


def wait_until_merged(service: Service, name: str) -> None:
    """Until a partition's disks are single files again."""
    wanted = {f"{name}.vhd", f"{name}-data.vhd"}
    deadline_s = time.monotonic() + GUEST_S
    while layer_files(service, name) != wanted:
        listed = service.cli("checkpoint", "list", name, check=False).stdout
        assert time.monotonic() < deadline_s, listed + service.tail("data/mullion.log")
        time.sleep(0.1)


@pytest.mark.parametrize("transport", [Transport.NBD, Transport.VHOST_USER])
def test_checkpoints_under_load_cost_no_wrong_byte(
    shared_service: Service, iocheck_image: BuiltImage, transport: Transport
) -> None:
    service, name = shared_service, f"load-{transport.value}"
    start_guest(service, iocheck_image, name, transport)
    with logged_in(service, name) as console:
        begin_iocheck(console)
        for number in range(ROUNDS):
            service.cli("checkpoint", "create", name, f"c{number}")
            wait_for_writes(console)
            with service.client() as client:
                upgraded = client.wait(client.upgrade_provider(name)).result
            assert upgraded is not None
            assert upgraded["is_handed_over"] is True, upgraded
        wait_for_writes(console)
        chains = [disk.chain for disk in service.partition(name).disks]
        assert [len(chain) for chain in chains] == [ROUNDS + 2, ROUNDS + 1]  # the first lies on an image
        for number in (1, 3, 0, 2):
            service.cli("checkpoint", "delete", name, f"c{number}")
        wait_until_merged(service, name)
        wait_for_writes(console)
        report = end_iocheck(console)
    assert (report.wrong, report.errors) == (0, 0)
    assert [len(disk.chain) for disk in service.partition(name).disks] == [2, 1]
    service.cli("partition", "stop", name, "--force")
    assert service.cli("vhd", "check", f"{service.paths.disks}/{name}-data.vhd").status == 0


def test_a_partition_goes_back_to_a_checkpoint_and_forth_again(service: Service, iocheck_image: BuiltImage) -> None:
    service.start()
    start_guest(service, iocheck_image, "web", Transport.NBD)
    with logged_in(service, "web") as console:
        console.command("echo before > /root/mark && sync")
        service.cli("checkpoint", "create", "web", "before", "--consistent")
        console.command("echo after > /root/mark && sync")
    service.cli("checkpoint", "apply", "web", "before", "--keep-as", "after")
    service.wait_agent("web")
    with logged_in(service, "web") as console:
        assert "before" in console.command("cat /root/mark")
    service.cli("checkpoint", "apply", "web", "after", "--yes")
    service.wait_agent("web")
    with logged_in(service, "web") as console:
        assert "after" in console.command("cat /root/mark")
    drawn = service.cli("checkpoint", "list", "web").stdout
    assert [line.split()[0] for line in drawn.splitlines()[1:4]] == ["before", "after", "present"]
    for checkpoint in ("before", "after"):
        service.cli("checkpoint", "delete", "web", checkpoint)
    wait_until_merged(service, "web")
    service.cli("partition", "stop", "web")


@pytest.mark.parametrize("transport", [Transport.NBD, Transport.VHOST_USER])
def test_a_guest_goes_on_where_its_memory_was(
    shared_service: Service, iocheck_image: BuiltImage, transport: Transport
) -> None:
    service, name = shared_service, f"memory-{transport.value}"
    start_guest(service, iocheck_image, name, transport)
    with logged_in(service, name) as console:
        console.command("MARK=before; echo before > /root/mark; sync; dd if=/dev/zero of=/dev/vdb bs=4k count=1")
        service.cli("checkpoint", "create", name, "remembered", "--memory")
        console.command("MARK=after; echo after > /root/mark; sync")
    service.cli("checkpoint", "apply", name, "remembered", "--yes")
    with GuestConsole(service, name) as console:  # the shell is the one that was there
        console.type("\n")
        console.wait_for("# ")
        assert "before before" in console.command("echo $MARK $(cat /root/mark)")
        console.command("dd if=/dev/vdb of=/dev/null bs=64k count=16 && echo again > /root/mark && sync")
    view = service.partition(name)
    assert view.state.value == "running"
    service.cli("checkpoint", "delete", name, "remembered")
    wait_until_merged(service, name)
    service.cli("partition", "stop", name, "--force")


@pytest.fixture
def userfaultfd() -> Iterator[None]:
    """Let QEMU, under its partition's user, protect pages: what an administrator would set."""
    before = SYSCTL.read_text()
    SYSCTL.write_text("1")
    yield
    SYSCTL.write_text(before)


def test_a_guest_runs_on_while_its_memory_is_written(
    shared_service: Service, iocheck_image: BuiltImage, userfaultfd: None
) -> None:
    """The guest's own memory says what its disk must hold: they are of one instant, or `iocheck` finds wrong bytes."""
    service, name = shared_service, "live"
    start_guest(service, iocheck_image, name, Transport.NBD, system_transport=Transport.NBD)
    with logged_in(service, name) as console:
        begin_iocheck(console)
        wait_for_writes(console)
        with service.client() as client:
            made = client.wait(client.create_checkpoint(name, "running", memory=True).id)
        assert made.result is not None
        assert made.result["is_live"] is True
        wait_for_writes(console)
    assert "the guest ran on" in service.cli("checkpoint", "show", name, "running").stdout
    for _ in range(2):  # the second time what the first has written is thrown away
        service.cli("checkpoint", "apply", name, "running", "--yes")
        with GuestConsole(service, name) as console:
            wait_for_writes(console)
    with GuestConsole(service, name) as console:
        wait_for_writes(console)
        report = end_iocheck(console)
    assert (report.wrong, report.errors) == (0, 0)

    SYSCTL.write_text("0")
    with service.client() as client:
        made = client.wait(client.create_checkpoint(name, "still", memory=True).id)
    assert made.result is not None
    assert made.result["is_live"] is False
    assert "vm.unprivileged_userfaultfd" in service.cli("checkpoint", "show", name, "still").stdout
    for checkpoint in ("running", "still"):
        service.cli("checkpoint", "delete", name, checkpoint)
    wait_until_merged(service, name)
    service.cli("partition", "stop", name, "--force")
    assert service.cli("vhd", "check", f"{service.paths.disks}/{name}-data.vhd").status == 0


@pytest.mark.parametrize("victim", ["provider", "service"])
def test_a_death_in_the_middle_of_merges_loses_nothing(
    service: Service, iocheck_image: BuiltImage, victim: str
) -> None:
    service.environ["MULLION_MERGE_RATE"] = str(2 * 1024 * 1024)
    service.start()
    start_guest(service, iocheck_image, "web", Transport.NBD)
    with logged_in(service, "web") as console:
        begin_iocheck(console)
        for number in range(3):
            service.cli("checkpoint", "create", "web", f"c{number}")
            wait_for_writes(console)
        service.cli("checkpoint", "delete", "web", "c1", "--no-wait")
        service.cli("checkpoint", "delete", "web", "c0", "--no-wait")
        if victim == "provider":
            identity = service.provider("web")
            assert identity is not None
            identity.send_signal(signal.SIGKILL)
            wait_for_another_provider(service, "web", identity.pid)
    if victim == "service":
        service.kill()
        service.environ.clear()
        service.start()
    service.cli("checkpoint", "delete", "web", "c2")
    wait_until_merged(service, "web")
    with GuestConsole(service, "web") as console:  # where the load has gone on
        wait_for_writes(console)
        report = end_iocheck(console)
    assert (report.wrong, report.errors) == (0, 0)
    service.cli("partition", "stop", "web", "--force")
    assert service.cli("vhd", "check", f"{service.paths.disks}/web-data.vhd").status == 0


def test_a_fixed_disk_grows_when_its_checkpoint_goes(shared_service: Service) -> None:
    """The disk became larger above its checkpoint: the fixed file below grows while the partition has it open."""
    service, path = shared_service, f"{shared_service.paths.disks}/rigid.vhd"
    os.makedirs(service.paths.disks, exist_ok=True)
    create_fixed(path, 8 * MIB)
    with service.client() as client:
        disk = DiskAttachment(path="rigid", id="disk0", transport=Transport.VHOST_USER)
        client.create_partition(PartitionDefinition(name="rigid", memory_bytes=64 * MIB, disks=(disk,)))
        client.wait(client.partition_action("rigid", "start", paused=True))
        with NbdClient(service.paths.partition("rigid").nbd("disk0")) as nbd:
            nbd.pwrite(0, b"below" * 100 + bytes(12))
        client.wait(client.create_checkpoint("rigid", "small").id)
        client.wait(client.resize_disk("rigid", "disk0", 24 * MIB))
        with NbdClient(service.paths.partition("rigid").nbd("disk0")) as nbd:
            nbd.pwrite(16 * MIB, b"above" * 100 + bytes(12))
        client.wait(client.delete_checkpoint("rigid", "small").id)
        assert [disk.chain for disk in client.partition("rigid").disks] == [(path,)]
        found = bytearray(512)
        with NbdClient(service.paths.partition("rigid").nbd("disk0")) as nbd:
            for offset, text in ((0, b"below"), (16 * MIB, b"above")):
                nbd.pread(offset, found)
                assert found.startswith(text)
        client.wait(client.partition_action("rigid", "stop", force=True))
    (whole,) = inspect_chain(path).files
    assert (whole.type, whole.size_bytes) == (DiskType.FIXED, 24 * MIB)
    assert service.cli("vhd", "check", path).status == 0
