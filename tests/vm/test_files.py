"""Files out of a guest that writes: of one instant, without its help, and without a trace."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from tests.framework.guest_console import logged_in
from tests.framework.service import GUEST_S, Service
from tests.vm.test_survival import begin_iocheck, end_iocheck, start_guest, wait_for_writes

from mullion.model.definition import Transport
from mullion.services.image.build import BuiltImage

pytestmark = [pytest.mark.vm, pytest.mark.timeout(900)]

ROOT = ("--disk", "disk0", "--volume", "2")


def wait_until_single(service: Service, name: str) -> None:
    """Until nothing is left of the instants that were read: the disks are the files that they were."""
    wanted = {f"{name}.vhd", f"{name}-data.vhd"}
    deadline_s = time.monotonic() + GUEST_S
    while {file for file in os.listdir(service.paths.disks) if file.startswith(name)} != wanted:
        assert time.monotonic() < deadline_s, os.listdir(service.paths.disks)
        time.sleep(0.1)


def test_files_of_a_guest_that_writes_meanwhile(service: Service, iocheck_image: BuiltImage, tmp_path: Path) -> None:
    service.start()
    start_guest(service, iocheck_image, "web", Transport.NBD)
    shown = service.cli("files", "ls", "web", "--volumes", "--format", "json").json
    assert any(one["filesystem"] == "ext4" and one["readable"] for one in shown), shown
    with logged_in(service, "web") as console:
        console.command("mkdir /root/new && dd if=/dev/urandom of=/root/new/data bs=1M count=4 && sync")
        wanted = console.command("sha256sum /root/new/data").split()
        begin_iocheck(console)
        assert service.cli("files", "ls", "web:/root/new", *ROOT).stdout == "data\n"
        service.cli("files", "get", "web:/root/new", str(tmp_path / "new"), *ROOT)
        assert _sha256(tmp_path / "new/data") in wanted
        assert service.cli("files", "cat", "web:/etc/hostname", *ROOT).stdout.strip()
        wait_for_writes(console)
        with service.client() as client:
            assert client.checkpoints("web").checkpoints == ()
        wait_until_single(service, "web")
        report = end_iocheck(console)
    assert (report.wrong, report.errors) == (0, 0)
    service.cli("partition", "stop", "web", "--force")


def test_a_consistent_instant_needs_no_journal(service: Service, iocheck_image: BuiltImage) -> None:
    service.start()
    start_guest(service, iocheck_image, "web", Transport.NBD)
    with logged_in(service, "web") as console:
        console.command("echo unsynced > /root/late")
    done = service.cli("files", "cat", "web:/root/late", *ROOT, "--consistent")
    assert done.stdout == "unsynced\n"
    assert "journal" not in done.stderr, done.stderr
    service.cli("partition", "stop", "web", "--force")


def test_a_service_that_dies_while_files_are_read_leaves_nothing(service: Service, iocheck_image: BuiltImage) -> None:
    service.start()
    start_guest(service, iocheck_image, "web", Transport.NBD)
    with logged_in(service, "web") as console:
        console.command("dd if=/dev/urandom of=/root/data bs=1M count=20 && sync")
    with service.client() as client:
        body = client.partition_files("web", "file", path="/root/data", disk="disk0", volume=2)
        body.read_exactly(1 << 16)
        service.kill()
        body.close()
    service.start()
    wait_until_single(service, "web")
    with logged_in(service, "web") as console:
        console.command("sha256sum /root/data")
    service.cli("partition", "stop", "web", "--force")


def _sha256(path: Path) -> str:
    import hashlib

    return hashlib.sha256(path.read_bytes()).hexdigest()
