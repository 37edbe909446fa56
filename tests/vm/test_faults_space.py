"""A full filesystem pauses a partition and says so; when there is room it goes on by itself, and nothing was lost."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from tests.framework.guest_console import INTERRUPT, GuestConsole, logged_in
from tests.framework.iocheck import IocheckReport
from tests.framework.service import Service
from tests.framework.small_filesystem import small_filesystem

from mullion.base.units import MIB
from mullion.model.definition import DiskAttachment, PartitionDefinition, Transport
from mullion.model.views import PartitionView
from mullion.services.image.build import BuiltImage

pytestmark = [pytest.mark.vm, pytest.mark.timeout(900)]

ROOM_BYTES = 256 * MIB
FREE_BYTES = 12 * MIB
"""What a filler leaves: each stage of the test writes into 32 MiB more of the disk than the one before."""
FIRST_BYTES, SECOND_BYTES, THIRD_BYTES, FOURTH_BYTES = (stage * 32 * MIB for stage in range(1, 5))


@dataclass
class SmallFilesystem:
    """A tmpfs in the service's home, most of it taken by a filler."""

    folder: str

    @property
    def filler(self) -> str:
        return f"{self.folder}/filler"

    def fill(self) -> None:
        """Leave FREE_BYTES."""
        status = os.statvfs(self.folder)
        with open(self.filler, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, status.f_bavail * status.f_frsize - FREE_BYTES)

    def make_room(self) -> None:
        os.unlink(self.filler)


@pytest.fixture
def small(service: Service) -> Iterator[SmallFilesystem]:
    with small_filesystem(f"{service.home}/small", ROOM_BYTES, 0o755) as folder:
        try:
            yield SmallFilesystem(folder)
        finally:
            service.destroy()


def begin(console: GuestConsole, *, seed: int, range_bytes: int) -> None:
    console.type(f"iocheck --device /dev/vdb --seconds 3600 --depth 4 --range {range_bytes} --seed {seed} --progress\n")
    console.wait_for("alive")


def finish(console: GuestConsole) -> IocheckReport:
    console.type(INTERRUPT)
    printed = console.wait_for("}")
    report = IocheckReport.find(printed)
    assert report is not None, printed
    return report


def wait_short_of_space(service: Service, small: SmallFilesystem) -> PartitionView:
    view = service.wait_state("web", "paused")
    assert view.reason == f"disk1: no space left in {small.folder} (for data.vhd)"
    assert view.remedy == "Mend what is named, make room: the partition goes on by itself, nothing is lost."
    return view


def goes_on(service: Service, console: GuestConsole) -> None:
    """The guest runs again, and its check of its own writes goes on."""
    console.wait_for("alive")
    console.wait_for("alive")
    assert service.wait_state("web", "running").reason is None


def start_guest(service: Service, image: BuiltImage, data: str, transport: Transport) -> None:
    with service.client() as client:
        client.create_disk(path="web", parent=image.path)
        client.create_disk(path=data, size_bytes=256 * MIB)
        client.create_partition(
            PartitionDefinition(
                name="web",
                memory_bytes=256 * MIB,
                disks=(DiskAttachment(path="web"), DiskAttachment(path=data, transport=transport)),
            )
        )
        client.wait(client.partition_action("web", "start"))
    service.wait_agent("web")


def wait_told(service: Service, small: SmallFilesystem) -> None:
    """An event says that it is paused, and why."""
    expected = {"from": "running", "to": "paused", "reason": f"disk1: no space left in {small.folder} (for data.vhd)"}
    with service.client() as client:
        for event in client.events(follow=True):
            if event.kind == "partition.state" and event.data == expected:
                return


def kill_provider(service: Service) -> None:
    """SIGKILL. Whether another one can start on a full filesystem does not matter."""
    provider = service.provider("web")
    assert provider is not None
    assert provider.send_signal(signal.SIGKILL)


@pytest.mark.parametrize("transport", [Transport.NBD, Transport.VHOST_USER])
def test_a_full_filesystem_pauses_the_guest_until_there_is_room(
    service: Service, iocheck_image: BuiltImage, small: SmallFilesystem, transport: Transport
) -> None:
    service.start()
    start_guest(service, iocheck_image, f"{small.folder}/data.vhd", transport)
    with logged_in(service, "web") as console:
        # Alone.
        small.fill()
        begin(console, seed=1, range_bytes=FIRST_BYTES)
        wait_short_of_space(service, small)
        wait_told(service, small)
        shown = service.cli("partition", "show", "web").stdout
        assert "no space left" in shown
        assert "make room" in shown
        small.make_room()
        goes_on(service, console)
        report = finish(console)
        assert (report.wrong, report.errors) == (0, 0)
        # And the provider is killed meanwhile.
        small.fill()
        begin(console, seed=2, range_bytes=SECOND_BYTES)
        wait_short_of_space(service, small)
        kill_provider(service)
        wait_short_of_space(service, small)
        small.make_room()
        goes_on(service, console)
        report = finish(console)
        assert (report.wrong, report.errors) == (0, 0)
        # And the parent.
        small.fill()
        begin(console, seed=3, range_bytes=THIRD_BYTES)
        wait_short_of_space(service, small)
        service.kill()
    service.start()
    wait_short_of_space(service, small)
    with GuestConsole(service, "web") as console:
        small.make_room()
        goes_on(service, console)
        report = finish(console)
        assert (report.wrong, report.errors) == (0, 0)
        # Turned off while it waits: the disk is whole, and nothing is left.
        small.fill()
        begin(console, seed=4, range_bytes=FOURTH_BYTES)
        wait_short_of_space(service, small)
        service.cli("partition", "stop", "web", "--force")
    view = service.partition("web")
    assert (view.state.value, view.reason) == ("stopped", None)
    small.make_room()
    assert service.cli("disk", "show", f"{small.folder}/data.vhd", "--format", "json").json["name"] == "data"
    with service.client() as client:  # what could not be flushed is, now
        client.wait(client.partition_action("web", "start", paused=True))
        client.wait(client.partition_action("web", "stop", force=True))
    assert service.cli("disk", "show", f"{small.folder}/data.vhd", "--format", "json").json["warnings"] == []
    assert not os.path.exists(service.paths.partition("web").run)
