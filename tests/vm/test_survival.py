"""What runs goes on: the parent dies, providers die, and the guest that verifies its own I/O sees no error."""

from __future__ import annotations

import signal
import time

import pytest
from tests.framework.guest_console import INTERRUPT, GuestConsole, logged_in
from tests.framework.iocheck import IocheckProgress, IocheckReport
from tests.framework.service import GUEST_S, Service

from mullion.base.units import MIB
from mullion.model.definition import DiskAttachment, PartitionDefinition, Transport
from mullion.services.image.build import BuiltImage

pytestmark = [pytest.mark.vm, pytest.mark.timeout(900)]

KILLS = 20


def start_guest(
    service: Service,
    image: BuiltImage,
    name: str,
    transport: Transport,
    *,
    system_transport: Transport = Transport.AUTO,
) -> None:
    """A partition with a data disk over this transport, its guest up."""
    with service.client() as client:
        client.create_disk(path=name, parent=image.path)
        client.create_disk(path=f"{name}-data", size_bytes=64 * MIB)
        client.create_partition(
            PartitionDefinition(
                name=name,
                memory_bytes=256 * MIB,
                disks=(
                    DiskAttachment(path=name, transport=system_transport),
                    DiskAttachment(path=f"{name}-data", transport=transport),
                ),
            )
        )
        client.wait(client.partition_action(name, "start"))
    service.wait_agent(name)


def begin_iocheck(console: GuestConsole) -> None:
    console.type("iocheck --device /dev/vdb --seconds 3600 --depth 4 --range 33554432 --progress\n")
    console.wait_for("alive")


def wait_for_writes(console: GuestConsole) -> None:
    """Until the guest's writes go on: two lines of progress in a row, a second apart, with more writes in each."""
    growing = 0
    writes: int | None = None
    while growing < 2:
        progress = IocheckProgress.find(console.wait_for("iocheck: alive ") + console.wait_for("\n"))
        if progress is not None:
            growing = growing + 1 if writes is not None and progress.writes > writes else 0
            writes = progress.writes


def end_iocheck(console: GuestConsole) -> IocheckReport:
    console.type(INTERRUPT)
    return report_in(console.wait_for("}"))


def report_in(printed: str) -> IocheckReport:
    report = IocheckReport.find(printed)
    assert report is not None, printed
    return report


def wait_for_another_provider(service: Service, name: str, pid: int) -> int:
    deadline_s = time.monotonic() + GUEST_S
    while True:
        identity = service.provider(name)
        if identity is not None and identity.pid != pid and identity.is_alive:
            return identity.pid
        assert time.monotonic() < deadline_s, "no provider took over"
        time.sleep(0.01)


@pytest.mark.parametrize("transport", [Transport.NBD, Transport.VHOST_USER])
def test_a_provider_killed_twenty_times_costs_no_wrong_byte(
    shared_service: Service, iocheck_image: BuiltImage, transport: Transport
) -> None:
    name = f"kill-{transport.value}"
    start_guest(shared_service, iocheck_image, name, transport)
    with logged_in(shared_service, name) as console:
        begin_iocheck(console)
        for _ in range(KILLS):
            identity = shared_service.provider(name)
            assert identity is not None
            assert identity.send_signal(signal.SIGKILL)
            wait_for_another_provider(shared_service, name, identity.pid)
            wait_for_writes(console)
        report = end_iocheck(console)
    assert report.wrong == 0
    assert report.errors == 0
    assert report.writes > KILLS
    assert shared_service.partition(name).state.value == "running"
    shared_service.cli("partition", "stop", name, "--force")


def test_a_provider_killed_while_its_guest_is_paused_is_not_the_last(
    shared_service: Service, iocheck_image: BuiltImage
) -> None:
    """QEMU before 9.1 notices nothing of a back end's second death, if its first was while it stood still."""
    name = "kill-paused"
    start_guest(shared_service, iocheck_image, name, Transport.VHOST_USER)
    with logged_in(shared_service, name) as console:
        begin_iocheck(console)
        for is_paused in (True, False, True, True, False):
            if is_paused:
                shared_service.cli("partition", "pause", name)
            identity = shared_service.provider(name)
            assert identity is not None
            assert identity.send_signal(signal.SIGKILL)
            wait_for_another_provider(shared_service, name, identity.pid)
            if is_paused:
                shared_service.cli("partition", "resume", name)
            wait_for_writes(console)
        report = end_iocheck(console)
    assert (report.wrong, report.errors) == (0, 0)
    shared_service.cli("partition", "stop", name, "--force")


def test_a_parent_killed_finds_its_guests_again_and_none_notices(service: Service, iocheck_image: BuiltImage) -> None:
    service.start()
    start_guest(service, iocheck_image, "calm", Transport.NBD)
    with logged_in(service, "calm") as console:
        console.type(
            "(sleep 2; iocheck --device /dev/vdb --seconds 8 --depth 2 --range 33554432 >/root/report; echo $? >/root/status) &\n"
        )
        console.command("sync")
    before = service.partition("calm")
    service.kill()
    service.start()
    after = service.partition("calm")
    assert after.state.value == "running"
    assert (after.qemu_pid, after.provider_pid) == (before.qemu_pid, before.provider_pid)
    assert after.boot_s == before.boot_s
    assert after.disks == before.disks
    with logged_in(service, "calm") as console:
        printed = console.command("while ! [ -e /root/status ]; do sleep 1; done; cat /root/report; cat /root/status")
    report = report_in(printed)
    assert (report.wrong, report.errors) == (0, 0)
    assert report.writes > 0
    # A provider that dies while nobody watches is replaced when the parent is back.
    service.kill()
    identity = service.provider("calm")
    assert identity is not None
    identity.send_signal(signal.SIGKILL)
    service.start()
    wait_for_another_provider(service, "calm", identity.pid)
    with logged_in(service, "calm") as console:
        console.command("dd if=/dev/zero of=/root/after bs=1M count=1 conv=fsync")
    service.cli("partition", "stop", "calm")


def test_a_killed_qemu_is_told_and_starts_again_with_one_command(service: Service) -> None:
    service.start()
    service.cli("partition", "create", "web", "--memory", "256M", "--disk", "web,parent=image:demo", "--start")
    service.wait_agent("web")
    qemu = service.qemu("web")
    assert qemu is not None
    qemu.send_signal(signal.SIGKILL)
    view = service.wait_state("web", "failed")
    assert view.exit_status == 128 + signal.SIGKILL
    assert "SIGKILL" in (view.reason or "")
    assert view.remedy == "Start it again: mullion partition start web"
    assert view.log_excerpt
    assert view.provider_pid is None
    service.cli("partition", "start", "web")
    assert service.wait_agent("web").state.value == "running"
    # The same while no service runs: it is noticed when one does again.
    service.kill()
    qemu = service.qemu("web")
    assert qemu is not None
    qemu.send_signal(signal.SIGKILL)
    service.start()
    assert service.wait_state("web", "failed").exit_status == 128 + signal.SIGKILL
