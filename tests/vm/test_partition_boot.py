"""As a new user would: create, start, log in, write a file, stop, start, and it is there."""

from __future__ import annotations

import pytest
from tests.framework.guest_console import logged_in
from tests.framework.service import Service

pytestmark = pytest.mark.vm


@pytest.mark.parametrize("bus", ["virtio", "sata"])
def test_a_guest_boots_from_its_disk_and_goes_down_when_asked(service: Service, bus: str) -> None:
    service.start()
    disk = f"web,parent=image:demo,bus={bus}"
    service.cli("partition", "create", "web", "--memory", "256M", "--disk", disk)
    service.cli("partition", "start", "web")
    view = service.wait_agent("web")
    assert view.state.value == "running"
    assert view.boot_s is not None
    assert len(view.disks[0].chain) == 2
    assert service.cli("partition", "stop", "web", "--format", "json").json["result"]["how"] in ("agent", "acpi")
    assert service.partition("web").state.value == "stopped"
    assert (service.provider("web"), service.qemu("web")) == (None, None)


def test_a_file_written_at_the_console_is_there_after_stop_and_start(service: Service) -> None:
    service.start()
    service.cli("partition", "create", "web", "--memory", "256M", "--disk", "web,parent=image:demo", "--start")
    service.wait_agent("web")
    with logged_in(service, "web") as console:
        console.command("echo kept-$((6*7)) >/root/note")
    service.cli("partition", "stop", "web")
    service.cli("partition", "start", "web")
    service.wait_agent("web")
    with logged_in(service, "web") as console:
        assert "kept-42" in console.command("cat /root/note")
        console.type("poweroff\n")
        console.wait_for("Power down")
    assert service.wait_state("web", "stopped").reason is None
    service.cli("partition", "delete", "web", "--with-disks", "--yes")
    assert service.cli("partition", "list", "--format", "json").json == []
    assert service.cli("disk", "list", "--format", "json").json == []
