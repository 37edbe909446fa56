"""Caps, traces and faults of a partition that runs, by CLI and API: real service, provider and QEMU, no guest needed."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator

import msgspec
import pytest
from tests.framework.leftovers import Leftovers, checked_home
from tests.framework.service import READY_S, Service

from mullion.base.errors import MullionError
from mullion.base.units import MIB
from mullion.model.definition import DiskAttachment, DiskLimits, PartitionDefinition
from mullion.model.views import ProviderView
from mullion.wire.nbd import NbdClient

pytestmark = pytest.mark.interop

NAME = "web"


@pytest.fixture(scope="module")
def service(leftovers: Leftovers) -> Iterator[Service]:
    """A service with a partition that runs on an empty disk."""
    with checked_home(leftovers) as home:
        os.chmod(home, 0o711)
        made = Service(str(home), environ={"MULLION_FAULT_INJECTION": "on"})
        try:
            made.start()
            with made.client() as client:
                path = client.create_disk(path="web", size_bytes=16 * MIB).path
                disk = DiskAttachment(path, limits=DiskLimits(iops=1000))
                client.create_partition(PartitionDefinition(NAME, memory_bytes=64 * MIB, disks=(disk,)))
                client.wait(client.partition_action(NAME, "start"))
            yield made
        finally:
            made.destroy()


def provider(service: Service) -> ProviderView:
    """The provider, as soon as there is one."""
    deadline_s = time.monotonic() + READY_S
    while True:
        try:
            with service.client() as client:
                return client.provider(NAME)
        except MullionError:
            assert time.monotonic() < deadline_s, "no provider"
            time.sleep(0.1)


def nbd(service: Service) -> str:
    with service.client() as client:
        path = client.partition(NAME).disks[0].nbd_socket
    assert path is not None
    return path


def test_caps_of_the_definition_hold_from_the_start_change_live_and_come_back_with_a_new_provider(
    service: Service,
) -> None:
    assert provider(service).disks[0].limits == {"iops": 1000}
    done = service.cli("disk", "limit", NAME, "disk0", "--iops", "700", "--bandwidth", "5M")
    assert "700 requests/s; 5 MiB/s" in done.stdout
    assert provider(service).disks[0].limits == {"iops": 700, "bytes_per_s": 5 * MIB}
    service.cli("disk", "limit", NAME, "--iops", "900")
    old = provider(service)
    assert old.limits == {"iops": 900}
    os.kill(old.pid, signal.SIGKILL)
    deadline_s = time.monotonic() + READY_S
    while (new := provider(service)).pid == old.pid:
        assert time.monotonic() < deadline_s
        time.sleep(0.1)
    assert (new.limits, new.disks[0].limits) == (old.limits, old.disks[0].limits)
    assert "700 requests/s; 5 MiB/s" in service.cli("partition", "show", NAME).stdout
    service.cli("disk", "limit", NAME, "--none")
    service.cli("disk", "limit", NAME, "disk0", "--none")
    assert (provider(service).limits, provider(service).disks[0].limits) == ({}, {})


def test_a_definition_that_changed_while_no_service_ran_is_followed_by_the_next(service: Service) -> None:
    """The provider may have missed the change: whoever adopts it compares."""
    with service.client() as client:
        view = client.partition(NAME)
        capped = msgspec.structs.replace(view.definition, disk_limits=DiskLimits(iops=123))
        client.update_partition(NAME, capped, view.etag)
    before = provider(service)
    service.kill()
    service.start()
    after = provider(service)
    assert (after.pid, after.limits) == (before.pid, {"iops": 123})
    service.cli("disk", "limit", NAME, "--none")


def test_requests_are_traced_while_somebody_looks(service: Service) -> None:
    assert not provider(service).disks[0].is_traced
    is_over = threading.Event()

    def load() -> None:
        with NbdClient(nbd(service)) as client:
            while not is_over.is_set():
                client.pwrite(8 * MIB, bytes(8192))
                client.pread(4 * MIB, bytearray(4096))

    thread = threading.Thread(target=load)
    thread.start()
    try:
        done = service.cli("provider", "trace", NAME, "--disk", "disk0", "--seconds", "1", "--format", "json")
    finally:
        is_over.set()
        thread.join()
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    requests, summary = lines[:-1], lines[-1]
    assert {(one["kind"], one["offset"], one["length"]) for one in requests} >= {
        ("write", 8 * MIB, 8192),
        ("read", 4 * MIB, 4096),
    }
    assert sum(row["requests"] for row in summary["summary"]) == len(requests)
    assert not provider(service).disks[0].is_traced


def test_a_drill_hits_what_was_asked_for_and_ends(service: Service) -> None:
    service.cli(
        "provider", "fault", NAME, "disk0", "--error", "EIO", "--kind", "read", "--offset", "1M", "--length", "4K"
    )
    with NbdClient(nbd(service)) as client:
        client.pread(0, bytearray(4096))
        with pytest.raises(OSError, match="Input/output error"):
            client.pread(MIB, bytearray(512))
        assert "read EIO (1 hit)" in service.cli("provider", "show", NAME).stdout
        service.cli("provider", "fault", NAME, "disk0", "--none")
        client.pread(MIB, bytearray(512))


def test_what_makes_no_sense_is_refused_with_a_remedy(service: Service) -> None:
    for words in (
        ("disk", "limit", NAME, "disk9", "--iops", "5"),
        ("disk", "limit", NAME, "disk0", "--iops", "5", "--burst-iops", "5"),
        ("provider", "trace", NAME, "--disk", "disk9", "--seconds", "1"),
        ("provider", "show", "nobody"),
    ):
        done = service.cli(*words, check=False)
        assert done.status != 0
        assert "→" in done.stderr, done
