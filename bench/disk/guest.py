"""Requests of a guest, by the guest's clock, against a QCOW2 disk of the same QEMU: virtio-blk with an iothread.

One guest has four disks: the one that it boots from, one of ours over NBD (the default where the processor is
emulated), one of ours over vhost-user, and a QCOW2 that its QEMU serves itself (io_uring, an iothread of its own),
plugged in by QEMU's second monitor. `bench/guest_io.c` in the guest takes them in turns, so that all three are measured
by the same processor, kernel and program within seconds. The ratio is time: 1 means as fast, and 1 / 0.9 is the bar of
"0.9 times as fast" for 1 MiB requests. The processor is emulated (TCG): most of a request's time is the guest's work.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Final, NamedTuple

from bench.disk.back_ends import Monitor
from bench.figures import BenchFault, Row
from bench.runner import Scale
from bench.scene import image_with, service_at_home
from bench.vhd.scratch import disk_folder, run_program, scratch_folder
from tests.framework.guest_console import GuestConsole, logged_in
from tests.framework.service import Service

from mullion.base.units import KIB, MIB
from mullion.model.definition import DiskAttachment, PartitionDefinition, Transport

SOURCE: Final = Path(__file__).parents[1] / "guest_io.c"
DISK_BYTES: Final = 64 * MIB
BAR: Final = 1.0
SEQUENTIAL_BAR: Final = 1 / 0.9
NAME: Final = "io"
OURS: Final = {"NBD": "/dev/vdb", "vhost-user": "/dev/vdc"}
PEER_DEVICE: Final = "/dev/vdd"
_PEER: Final = "QCOW2, virtio-blk, iothread"


class Case(NamedTuple):
    name: str
    kind: str
    request_bytes: int
    depth: int
    count: int
    bar: float


CASES: Final = (
    Case("4K random read, depth 1", "read", 4 * KIB, 1, 1500, BAR),
    Case("4K random read, depth 32", "read", 4 * KIB, 32, 3000, BAR),
    Case("4K random write, depth 1", "write", 4 * KIB, 1, 1500, BAR),
    Case("4K random write, depth 32", "write", 4 * KIB, 32, 3000, BAR),
    Case("1 MiB sequential read", "read", MIB, 1, 192, SEQUENTIAL_BAR),
    Case("1 MiB sequential write", "write", MIB, 1, 192, SEQUENTIAL_BAR),
)


def run(scale: Scale) -> list[Row]:
    rounds = 5 if scale.quick else 9
    with scratch_folder(disk_folder()) as folder, service_at_home(images=True) as service:
        os.chmod(folder, 0o755)
        _start(service, folder)
        with logged_in(service, NAME) as console:
            _plug_peer(service, folder, console)
            for device in (*OURS.values(), PEER_DEVICE):
                _guest_io(console, device, "fill", DISK_BYTES)
            rows = [row for case in CASES for row in _measure(console, case, rounds)]
        service.cli("partition", "stop", NAME, "--force")
    return rows


def _start(service: Service, folder: str) -> None:
    program = f"{folder}/guest_io"
    run_program("gcc", "-std=c11", "-O2", "-static", "-pthread", "-o", program, str(SOURCE))
    image = image_with({"/usr/bin/guest_io": program})
    service.start()
    with service.client() as client:
        client.create_disk(path=NAME, parent=image.path)
        disks = [DiskAttachment(path=NAME, transport=Transport.NBD)]
        for name, transport in (("nbd", Transport.NBD), ("vhost", Transport.VHOST_USER)):
            client.create_disk(path=f"{NAME}-{name}", size_bytes=DISK_BYTES)
            disks.append(DiskAttachment(path=f"{NAME}-{name}", transport=transport))
        client.create_partition(PartitionDefinition(name=NAME, memory_bytes=256 * MIB, disks=tuple(disks)))
        client.wait(client.partition_action(NAME, "start"))
    service.wait_agent(NAME)


def _plug_peer(service: Service, folder: str, console: GuestConsole) -> None:
    """Make the QCOW2 disk and plug it into the partition's QEMU, whose user may write it."""
    path = f"{folder}/peer.qcow2"
    run_program("qemu-img", "create", "-q", "-f", "qcow2", path, str(DISK_BYTES))
    os.chmod(path, 0o666)
    monitor = Monitor(service.paths.partition(NAME).qmp_rescue)
    try:
        monitor.ask("object-add", **{"qom-type": "iothread", "id": "peer-thread"})
        file = {"driver": "file", "filename": path, "aio": "io_uring", "cache": {"direct": False}}
        monitor.ask("blockdev-add", **{"driver": "qcow2", "node-name": "peer", "file": file})
        device = {"driver": "virtio-blk-pci", "id": "peer-disk", "drive": "peer", "iothread": "peer-thread"}
        monitor.ask("device_add", **device, **{"bus": _free_port(monitor), "num-queues": "1", "config-wce": "off"})
    finally:
        monitor.close()
    console.command(f"while ! [ -b {PEER_DEVICE} ]; do sleep 0.1; done")


def _free_port(monitor: Monitor) -> str:
    """A bus into which a device can be plugged."""
    for bus in monitor.ask("query-pci"):
        for device in bus["devices"]:
            if "pci_bridge" in device and not device["pci_bridge"].get("devices") and device["qdev_id"]:
                return str(device["qdev_id"])
    raise BenchFault("the partition's machine has no free port")


def _measure(console: GuestConsole, case: Case, rounds: int) -> list[Row]:
    found: dict[str, list[float]] = {device: [] for device in (*OURS.values(), PEER_DEVICE)}
    for number in range(rounds):
        for device, figures in found.items():
            words = (case.kind, case.request_bytes, case.depth, case.count, DISK_BYTES, number + 1)
            figures.append(_guest_io(console, device, *words) / case.count * 1e6)
    peer = found[PEER_DEVICE]
    return [
        Row(f"{case.name}, {transport}", "us", found[device], case.bar, peer=peer, peer_name=_PEER)
        for transport, device in OURS.items()
    ]


def _guest_io(console: GuestConsole, device: str, *words: object) -> float:
    """Seconds by the guest's clock."""
    printed = console.command(" ".join(map(str, ("guest_io", device, *words))))
    answer = next((line for line in printed.splitlines() if '{"requests"' in line), None)
    if answer is None:
        raise BenchFault(f"guest_io in the guest said nothing: {printed!r}")
    return float(json.loads(answer[answer.index("{") : answer.index("}") + 1])["seconds"])
